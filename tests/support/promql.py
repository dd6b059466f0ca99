"""Enough of PromQL's grammar to read the expressions of examples/monitoring: raises ``ValueError`` at what is none.

Prometheus's own check is `promtool check rules`; this one is there where promtool is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"\s*(?:(?P<string>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|(?P<duration>\d+(?:ms|[smhdwy])|\$__\w+)"
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-z_:][\w:]*)|(?P<sign>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){}\[\],]))"
)
AGGREGATIONS = {"sum", "min", "max", "avg", "count", "group"}
# name -> the kinds of its arguments
FUNCTIONS = {
    **dict.fromkeys(("rate", "increase", "irate", "resets", "changes", "max_over_time"), ("range",)),
    **dict.fromkeys(("abs", "absent", "clamp_min"), ("instant",)),
    "histogram_quantile": ("instant", "instant"),
}
SETS, COMPARISONS = ("and", "or", "unless"), ("==", "!=", "<=", ">=", "<", ">")
LEVELS = (("or",), ("and", "unless"), COMPARISONS, ("+", "-"), ("*", "/", "%"))


@dataclass(frozen=True)
class Selector:
    metric: str
    matchers: tuple[tuple[str, str, str], ...] = ()  # label, operator, value
    function: str = ""  # whose range it is


@dataclass
class Parser:
    text: str
    at: int = 0
    selectors: list[Selector] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)  # of by (...) and on (...)

    def fail(self, wanted: str) -> ValueError:
        return ValueError(f"{self.text!r}: {wanted} expected at {self.text[self.at :]!r}")

    def token(self) -> tuple[str, str]:
        found = TOKEN.match(self.text, self.at)
        if not found:
            if self.text[self.at :].strip():
                raise self.fail("a token")
            return "end", ""
        return str(found.lastgroup), found[str(found.lastgroup)]

    def take(self, *words: str) -> str:
        """The next token if it is one of ``words``, else ""."""
        kind, word = self.token()
        if kind in ("sign", "name") and word in words:
            self.skip()
            return word
        return ""

    def skip(self) -> str:
        found = TOKEN.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return found[0].strip()

    def need(self, word: str) -> None:
        if not self.take(word):
            raise self.fail(repr(word))

    def expression(self, level: int = 0) -> str:
        """Its kind: "instant" (numbers too) or "range"."""
        if level == len(LEVELS):
            return self.operand()
        kind = self.expression(level + 1)
        while word := self.take(*LEVELS[level]):
            self.take("bool")
            if self.take("on", "ignoring"):
                self.names()
            elif word in SETS and level < 2:
                pass
            if self.take("group_left", "group_right"):
                self.names()
            if "range" in (kind, self.expression(level + 1)):
                raise self.fail("no range beside an operator")
        return kind

    def names(self) -> None:
        self.need("(")
        while not self.take(")"):
            kind, word = self.token()
            if kind != "name":
                raise self.fail("a label")
            self.labels.add(word)
            self.skip()
            self.take(",")

    def operand(self) -> str:
        kind, word = self.token()
        if kind == "number":
            self.skip()
            return "instant"
        if self.take("("):
            inner = self.expression()
            self.need(")")
            return inner
        if kind != "name" and word != "{":
            raise self.fail("an operand")
        if word in AGGREGATIONS:
            self.skip()
            if self.take("by", "without"):
                self.names()
            self.arguments(word, ("instant",))
            if self.take("by", "without"):
                self.names()
            return "instant"
        if re.match(r"\s*[\w:]+\s*\(", self.text[self.at :]):
            if word not in FUNCTIONS:
                raise self.fail("a function")
            self.skip()
            self.arguments(word, FUNCTIONS[word])
            return "instant"
        return self.selector()

    def arguments(self, function: str, kinds: tuple[str, ...]) -> None:
        self.need("(")
        for number, wanted in enumerate(kinds):
            if number:
                self.need(",")
            before = len(self.selectors)
            if self.expression() != wanted:
                raise self.fail(f"a {wanted} vector in {function}()")
            if wanted == "range":
                self.selectors[before:] = [Selector(s.metric, s.matchers, function) for s in self.selectors[before:]]
        self.need(")")

    def selector(self) -> str:
        metric = self.skip() if self.token()[0] == "name" else ""
        matchers: list[tuple[str, str, str]] = []
        if self.take("{"):
            while not self.take("}"):
                kind, label = self.token()
                if kind != "name" or ":" in label:
                    raise self.fail("a label")
                self.skip()
                operator = self.take("=", "!=", "=~", "!~")
                kind, value = self.token()
                if not operator or kind != "string":
                    raise self.fail("a matcher")
                self.skip()
                if "~" in operator and not value.strip("\"'").startswith("$"):
                    re.compile(value[1:-1])
                matchers.append((label, operator, value[1:-1]))
                self.take(",")
        self.selectors.append(Selector(metric, tuple(matchers)))
        if not self.take("["):
            return "instant"
        if self.token()[0] != "duration":
            raise self.fail("a duration")
        self.skip()
        self.need("]")
        return "range"


def parse(text: str) -> Parser:
    """``text`` read to its end: its selectors and labels."""
    parser = Parser(text)
    if parser.expression() != "instant":
        raise parser.fail("a function around a range")
    if parser.token()[0] != "end":
        raise parser.fail("the end")
    return parser
