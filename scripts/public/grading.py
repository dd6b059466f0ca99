r"""What an answer says, and whether that is right.

Mathematics: the last ``\boxed{}``, else what follows "the answer is", else the last number; equal to the reference as a
normalised string or number, or by math-verify where it is installed (``pip install math-verify``).  Choices: the letter
after "the correct answer is".  Both look behind the thinking first, and in all of the text where nothing is there, as
Mix-Quant's scripts do (github.com/haiquanlu/Mix-Quant, evaluation/).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

ENDS_OF_THINKING = ("</think>", "<channel|>")  # DeepSeek and Qwen; Gemma 4
PHRASE = re.compile(
    r"(?:final\s+answer(?:\s+is)?|answer\s+is|\banswer)\s*[:=]?\s*([^\n;]+?)\s*(?:\.?\s*$|\.\s|;)", re.I | re.M
)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")
STRICT = re.compile(r"The correct answer is \(?([A-D])\b")
# The letter: a capital, or a small one that stands alone; "a dog" and "A dog" begin with an article.
LETTER = (
    r"\s*\(?\s*((?!A\s+(?!because|since|as|for|and|is|which|due|given|based|in|with|by|from|so|not|or|but|that)[a-z])[A-D]\b"
    r"|(?<=\()[a-d](?=\s*\))|[a-d](?=\s*(?:[).:]|$)))"
)
LENIENT = [
    re.compile(rf"(?i:{words}){LETTER}", re.M)
    for words in (
        r"the\s+correct\s+(?:answer|option|choice)\s+is:?(?:\s+option)?",
        r"final\s+answer(?:\s+is)?\s*:?(?:\s+option)?",
        r"\banswer(?:\s*:|\s+is:?)(?:\s+option)?",
    )
]
OPTION = re.compile(rf"(?i:\boption\s*:?){LETTER}", re.M)  # only where no answer is named: "option A is wrong"
# Where an answer ends and its reason begins: "12, because", "5 since", "7, which is"
REASON = re.compile(r",?\s+(?:because|since|as|so|which|where|when|after|given|but)\b|,\s+(?=[a-z]{2,}\b)")


def after_thinking(text: str) -> str:
    """What follows the last end of thinking; all of it where there is none."""
    for mark in ENDS_OF_THINKING:
        text = text.rpartition(mark)[2]
    return text.strip()


def last_boxed(text: str) -> str | None:
    r"""The contents of the last complete ``\boxed{}``."""
    found = None
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found = text[match.end() : place].strip()
                break
    return found or None


def math_answer(text: str, *, cut_off: bool = False) -> str | None:
    """``cut_off``: the text ends where it was stopped.  Then the last number is what it was busy with, or part of one,
    and an answer that nothing follows may be."""
    tail = after_thinking(text)
    boxed = last_boxed(tail) or last_boxed(text)
    if boxed:
        return boxed
    phrases = [match[1] for match in PHRASE.finditer(tail) if not cut_off or match.end(1) < len(tail)]
    if phrases:
        return answer_alone(phrases[-1]).strip(" *$")
    numbers = [] if cut_off else NUMBER.findall(tail)
    return numbers[-1] if numbers else None


def answer_alone(text: str) -> str:
    """Without the reason that may follow; a list in brackets is no reason."""
    for match in REASON.finditer(text):
        before = text[: match.start()]
        if before.strip() and before.count("(") == before.count(")") and before.count("{") == before.count("}"):
            return before
    return text


def choice(text: str, lenient: bool) -> str | None:
    """A to D.  ``lenient``: any of the usual phrases, the last one; else LongBench v2's own, the first one."""
    text = text.replace("*", "" if not lenient else " ")
    if not lenient:
        match = STRICT.search(after_thinking(text))
        return match.group(1) if match else None
    for part in (after_thinking(text), text):
        for patterns in (LENIENT, [OPTION]):
            found = [(match.start(1), match.group(1).upper()) for one in patterns for match in one.finditer(part)]
            if found:
                return max(found)[1]
    return None


def normalised(text: str) -> str:
    """LaTeX and spelling that do not change a value, taken away."""
    text = text.strip().strip("$").rstrip(".")
    for plain in (
        r"\left",
        r"\right",
        r"\!",
        r"\,",
        r"\;",
        r"\$",
        r"\%",
        "%",
        "$",
        r"^\circ",
        r"^{\circ}",
        r"\displaystyle",
    ):
        text = text.replace(plain, "")
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace(r"\cdot", "*").replace(r"\ ", " ")
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"(\1)/(\2)", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\((\w+)\)/\((\w+)\)", r"\1/\2", text)
    return re.sub(r"\s+", "", text).lower()


def number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def same_plain(answer: str, reference: str) -> bool:
    a, b = normalised(answer), normalised(reference)
    if a == b:
        return True
    x, y = number(a), number(b)
    if x is None or y is None:  # "x=5" for "5"
        x, y = number(a.rpartition("=")[2]), number(b.rpartition("=")[2])
    return x is not None and x == y


def math_grader() -> tuple[str, Callable[[str, str], bool]]:
    """The name of what compares mathematics here, and the comparison (answer, reference)."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return "strings and numbers (math-verify is not installed)", same_plain

    def same(answer: str, reference: str) -> bool:
        if same_plain(answer, reference):
            return True
        return bool(verify(parse(rf"\boxed{{{reference}}}"), parse(rf"\boxed{{{answer}}}")))

    return "math-verify", same
