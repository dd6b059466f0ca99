"""The public benchmarks without a model: what they extract and count as right, resume, prompts, and what they refuse.

A stub over HTTP plays the server; the scripts run as they do for a user, in this process.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.once

pytest.importorskip("openai")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
NAMES = ("eval_reasoning", "eval_longbench_v2", "eval_longmemeval", "eval_ruler")
MATH = [
    {"problem": "1+1?", "answer": "2", "unique_id": "a", "level": 1},
    {"problem": "1+2?", "answer": "3", "unique_id": "b", "level": 2},
    {"problem": "1/2?", "answer": "\\frac{1}{2}", "unique_id": "c", "level": 2},
]


class Stub:
    """An endpoint that serves ``tiny``: words are tokens; ``answer`` (body -> text) says what it answers."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.recipe, self.fingerprint, self.key = "nvfp4", "0" * 16, ""
        self.fails_after: int | None = None
        self.thoughts: str | None = None
        self.answer: Any = lambda body: "<think>maybe \\boxed{9}</think>It is \\boxed{2}."
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def reply(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if stub.key and self.headers["Authorization"] != f"Bearer {stub.key}":
                    self.reply(401, {"error": {"message": "wrong key"}})
                elif self.path == "/v1/models":
                    self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
                else:
                    precision = {"prefill": stub.recipe, "decode": "bf16"}
                    state = {
                        "mixquant": {
                            "recipe": stub.recipe,
                            "fingerprint": stub.fingerprint,
                            "precision": precision,
                            "kernel": {"nvfp4": "emulated"},
                        }
                    }
                    self.reply(200, {"version": "0", "quantization": "mixquant", "internal_states": [state]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    self.reply(200, {"tokens": list(range(len(body["prompt"].split())))})
                elif self.path == "/detokenize":
                    self.reply(200, {"text": " ".join(f"t{n}" for n in body["tokens"])})
                elif stub.fails_after is not None and len(stub.asked) >= stub.fails_after:
                    self.reply(400, {"object": "error", "message": "too long", "code": 400})
                else:
                    stub.asked.append(body)
                    message = {"role": "assistant", "content": stub.answer(body), "reasoning_content": stub.thoughts}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
                    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny"}
                    self.reply(200, {**head, "choices": [choice], "usage": usage})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()
    thread.join()


@pytest.fixture
def math(tmp_path: Path) -> Path:
    file = tmp_path / "math.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MATH))
    return file


def run(name: str, stub: Stub, out: Path, *more: object) -> None:
    from scripts.public.run import start

    module = importlib.import_module(f"scripts.public.{name}")
    start(module.main, ["--base-url", stub.url, "--out", str(out), "--concurrency", "1", *map(str, more)])


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


def one_line(capsys: pytest.CaptureFixture[str], stopped: pytest.ExceptionInfo[SystemExit]) -> str:
    """The line that a user would read: SystemExit prints its argument, and nothing else came before it."""
    said = str(stopped.value.code)
    assert "\n" not in said and "Traceback" not in said
    written = re.sub(r"[^\r\n]*\r", "", capsys.readouterr().err).strip()  # the progress bar wipes itself
    assert written == ""
    return said


# -- what is right -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ("<think>\\boxed{1}</think> so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{3} no, \\boxed{4}", "4"),
        ("\\boxed{5} and an open \\boxed{6", "5"),
        ("<think>\\boxed{7}</think> I said so.", "7"),
        ("The answer is 12.", "12"),
        ("first 3, then 1,234", "1,234"),
        ("<|channel>thought 8<channel|>The final answer: 9", "9"),
        ("nothing", None),
        ("", None),
    ],
)
def test_answers_to_mathematics(text: str, found: str | None) -> None:
    from scripts.public.grading import math_answer

    assert math_answer(text) == found


@pytest.mark.parametrize(
    "answer, reference, same",
    [
        ("073", "73", True),
        ("1,234", "1234", True),
        ("\\dfrac{3}{4}", "\\frac34", True),
        ("0.75", "\\frac{3}{4}", True),
        ("x = 5", "5", True),
        ("50\\%", "50", True),
        ("\\text{Paris}", "paris", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True),
        ("90^\\circ", "90", True),
        ("12", "13", False),
        ("x", "y", False),
        ("", "1", False),
    ],
)
def test_equal_in_mathematics(answer: str, reference: str, same: bool) -> None:
    from scripts.public.grading import math_grader, same_plain

    assert same_plain(answer, reference) is same
    assert math_grader()[1](answer, reference) is same


def test_math_verify_is_used_where_it_is() -> None:
    pytest.importorskip("math_verify")
    from scripts.public.grading import math_grader

    name, same = math_grader()
    assert name == "math-verify" and same("\\sqrt{8}", "2\\sqrt{2}") and not same("\\sqrt{8}", "2\\sqrt{3}")


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("The correct answer is (B)", "B", "B"),
        ("**The correct answer is C.**", "C", "C"),
        ("The correct answer is (A). No: the correct answer is (D)", "A", "D"),
        ("<think>The correct answer is (A)</think>Final answer: D", None, "D"),
        ("<think>the correct answer is (A)</think>hm", None, "A"),
        ("The correct answer is Canada", None, None),
        ("", None, None),
    ],
)
def test_choices(text: str, strict: str | None, lenient: str | None) -> None:
    from scripts.public.grading import choice

    assert choice(text, lenient=False) == strict
    assert choice(text, lenient=True) == lenient


REAL_CHOICES = [
    ("The correct answer is (B).", "B"),
    ("The correct answer is B because the author says so.", "B"),
    ("the correct answer is: C", "C"),
    ("The correct option is D.", "D"),
    ("Final answer: A", "A"),
    ("Final Answer: (c)", "C"),
    ("**Final answer:** B", "B"),
    ("Answer: A because the text says so", "A"),
    ("Answer: A\n", "A"),
    ("answer: d.", "D"),
    ("answer: b", "B"),
    ("The answer is B", "B"),
    ("The answer is (D), a rather weak one", "D"),
    ("The answer is option C.", "C"),
    ("I would go with option B.", "B"),
    ("Option A is wrong. Option C is wrong too. Answer: B", "B"),
    ("Answer: B. Option D is wrong since it ignores the letter.", "B"),
    ("The answer is a matter of taste.", None),
    ("The correct answer is a combination of two of them.", None),
    ("Answer: a dog was seen by the witness", None),
    ("Answer: A dog was seen by the witness", None),
    ("The final answer: a summary follows. The correct answer is C", "C"),
    ("There is an option a reader may miss.", None),
    ("The answer is Bob", None),
]


@pytest.mark.parametrize(("text", "found"), REAL_CHOICES)
def test_choices_of_real_answers(text: str, found: str | None) -> None:
    from scripts.public.grading import choice

    assert choice(text, lenient=True) == found


REAL_NUMBERS = [
    ("The answer is 12, because 3 * 4 = 12.", "12"),
    ("The answer is 12 because three fours make it.", "12"),
    ("So the answer is 5 since x > 0", "5"),
    ("The final answer is 7, which is prime.", "7"),
    ("Answer: 42", "42"),
    ("Answer: 42.", "42"),
    ("The answer is $18.", "18"),
    ("**Answer:** 3/4", "3/4"),
    ("The answer is x = 3.", "3"),
    ("The answer is (1, 2).", "(1,2)"),
    ("The answer is (1, 2), as shown above.", "(1,2)"),
    ("The answer is 1,234 so we are done", "1234"),
    ("The answer is 0.5, given the odds", "1/2"),
    ("we get \\boxed{12}, because it is", "12"),
    ("\\boxed{1}. No: \\boxed{2}", "2"),
    ("3 + 4 = 7", "7"),
    ("<think>The answer is 3</think>The answer is 4, but only just.", "4"),
    ("The answer is -5 where x < 0", "-5"),
]


@pytest.mark.parametrize(("text", "reference"), REAL_NUMBERS)
def test_numbers_of_real_answers(text: str, reference: str) -> None:
    from scripts.public.grading import math_answer, same_plain

    found = math_answer(text)
    assert found is not None and same_plain(found, reference), found
    assert not same_plain(found, "99")


def test_tokens_are_counted_without_a_tokenize_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.public.server import Stop, Tokenizer

    asked = []

    def ask(path: str, body: dict[str, Any]) -> Any:
        asked.append(path)
        if path == "/tokenize":
            raise Stop("/tokenize does not work (500): name a local --tokenizer")
        return {"meta_info": {"prompt_tokens": len(body["text"].split())}}

    tokenizer = object.__new__(Tokenizer)
    tokenizer.local, tokenizer.counts, tokenizer.server = None, True, SimpleNamespace(model="m")
    tokenizer._ask = ask
    assert [tokenizer.count("one two three"), tokenizer.count("four")] == [3, 1]
    assert asked == ["/tokenize", "/generate", "/generate"]
    assert capsys.readouterr().err.count("prompts are measured through /generate") == 1


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_its_summary_and_its_resume(
    stub: Stub, math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("--datasets", "math500", "--data", math, "--seeds", 1, 2)
    run("reasoning", stub, out, *command)
    assert len(stub.asked) == 6
    body = stub.asked[0]
    assert body["messages"] == [{"role": "user", "content": "Put your final answer within \\boxed{}.\n1+1?"}]
    assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.6, 0.95, 20, 32768)
    assert body["chat_template_kwargs"] == {"enable_thinking": True} and {b["seed"] for b in stub.asked} == {1, 2}
    made = records(out / "math500.jsonl")
    assert [(r["id"], r["extracted"], r["correct"]) for r in made if r["seed"] == 1] == [
        ("a", "2", True),
        ("b", "2", False),
        ("c", "2", False),
    ]
    text = capsys.readouterr().out
    assert "mixquant nvfp4 (prefill nvfp4 emulated, decode bf16)" in text and "| all | 33.33 +- 65.33 | 3 | 6 |" in text
    assert "| level 2 | 0.00 +- 0.00 | 2 | 4 |" in text and "| Qwen3-8B | 93.73 | 94.12 | 94.40 |" in text
    last = json.loads(text.splitlines()[-1])
    assert last["results"]["math500"]["groups"]["level 1"]["score"] == 100

    # Complete: nothing is asked, the summary is the same.
    run("reasoning", stub, out, *command)
    assert len(stub.asked) == 6 and json.loads(capsys.readouterr().out.splitlines()[-1]) == last

    # Cut short within a line, and one more seed.
    file = out / "math500.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b'"output"')])
    run("reasoning", stub, out, *command, 3)
    assert len(stub.asked) == 6 + 1 + 3 and len(records(file)) == 9
    assert {(r["id"], r["seed"]) for r in records(file)} == {(i, s) for i in "abc" for s in (1, 2, 3)}


def test_worked_examples_stand_before_each_question_and_are_not_asked(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{n}+1?", "answer": f"Count on.\n#### {n + 1}"} for n in range(5)]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("--datasets", "gsm8k", "--data", file, "--temperature", 0)
    run("reasoning", stub, tmp_path / "out", *command, "--shots", 2, "--limit", 2)
    said = [body["messages"][0]["content"] for body in stub.asked]
    shots = "".join(f"Problem: {n}+1?\nSolution: Count on.\n\\boxed{{{n + 1}}}\n\n" for n in (3, 4))
    assert sorted(said) == [f"Put your final answer within \\boxed{{}}.\n\n{shots}Problem: {n}+1?" for n in (0, 1)]
    assert "2 worked examples" in capsys.readouterr().out
    for more, refusal in (((5,), "--shots: 5 of 5 problems leave none"), ((-1,), "--shots: -1 is less than 0")):
        with pytest.raises(SystemExit, match=refusal):
            run("reasoning", stub, tmp_path / "out", *command, "--shots", *more)
    with pytest.raises(SystemExit, match="--shots: aime24 has no worked solutions"):
        run("reasoning", stub, tmp_path / "out", "--datasets", "gsm8k", "aime24", "--data", file, file, "--shots", 1)


def test_a_refused_request_ends_in_one_line_and_keeps_the_rest(
    stub: Stub, math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.fails_after = 2
    command = ("--datasets", "math500", "--data", math)
    with pytest.raises(SystemExit) as stopped:
        run("reasoning", stub, tmp_path / "out", *command)
    assert "refused a request (400: too long)" in one_line(capsys, stopped)
    assert len(records(tmp_path / "out" / "math500.jsonl")) == 2
    stub.fails_after = None
    run("reasoning", stub, tmp_path / "out", *command)
    assert len(stub.asked) == 3


def test_arms_are_paired_over_the_same_prompts(
    stub: Stub, math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--datasets", "math500", "--data", math)
    run("reasoning", stub, tmp_path / "mix", *command, "--limit", 2)
    stub.recipe, stub.answer = "bf16", lambda body: "\\boxed{3}"
    capsys.readouterr()
    run("reasoning", stub, tmp_path / "bf16", *command, "--against", tmp_path / "mix")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["math500"]["against"]
    assert (found["difference"], found["examples"], found["tokens"]) == (0, 2, 0)  # one won, one lost
    assert found["plus_minus"] == pytest.approx(196)
    again = ("--against", tmp_path / "mix", "--temperature", 0, "--max-tokens", 9)
    run("reasoning", stub, tmp_path / "greedy", *command, *again)
    said = capsys.readouterr().out
    assert "not the arms' difference alone: sampling.max_tokens 32768, sampling.temperature 0.6\n" in said
    run("reasoning", stub, tmp_path / "same", *command, "--against", tmp_path / "mix")
    assert "other settings" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, reason",
    [
        (("--temperature", 0), "was made with sampling "),
        (("--max-tokens", 5), "was made with sampling "),
        ("recipe", "was made with server "),
        ("fingerprint", "was made with server "),  # a file of the same name that says another thing
        ("prompt", "example a had another prompt"),
        ("damage", "math500.jsonl:2: not a record"),
    ],
)
def test_another_run_does_not_go_into_the_same_file(
    stub: Stub, math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, reason: str
) -> None:
    command = ("--datasets", "math500", "--data", math)
    run("reasoning", stub, tmp_path, *command)
    capsys.readouterr()
    more: tuple[object, ...] = ()
    if change == "recipe":
        stub.recipe = "bf16"
    elif change == "fingerprint":
        stub.fingerprint = "1" * 16
    elif change == "prompt":
        math.write_text(math.read_text().replace("1+1", "2+0"))
    elif change == "damage":
        file = tmp_path / "math500.jsonl"
        file.write_text(file.read_text().replace('{"id"', "{id", 1))
    else:
        more = change
    with pytest.raises(SystemExit) as stopped:
        run("reasoning", stub, tmp_path, *command, *more)
    assert reason in one_line(capsys, stopped) and len(stub.asked) == 3


# -- what is missing is one line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--data", "{bad}"), "cannot be read as json"),
        (("--data", "{fields}"), "example 1 has no 'problem'; it has question"),
        (("--data", "{math}", "{math}"), "2 files for 1 --datasets"),
        (("--model", "other"), "--model other: not served by"),
        (("--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY: that environment variable is not set"),
        (("--base-url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("--base-url", "127.0.0.1:9"), "no server answers at 127.0.0.1:9 (Request URL"),
        (("--extra-body", "[]"), "--extra-body []: not a JSON object"),
        (("--out", "{math}"), "math500.jsonl: "),
        (("--against", "nowhere"), "no such records"),
    ],
)
def test_what_is_missing_is_one_line(
    stub: Stub, math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, ...], reason: str
) -> None:
    files = {"bad": tmp_path / "bad.json", "fields": tmp_path / "fields.json", "math": math}
    files["bad"].write_text("[{")
    files["fields"].write_text('[{"question": "?"}]')
    given = [word.format(**files) if word.startswith("{") else word for word in wrong]
    with pytest.raises(SystemExit) as stopped:
        run("reasoning", stub, tmp_path, "--datasets", "math500", "--data", math, *given)
    assert reason in one_line(capsys, stopped) and not stub.asked


def test_a_wrong_key_is_one_line(
    stub: Stub, math: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.key = "right"
    monkeypatch.setenv("A_KEY", "wrong")
    command = ("--datasets", "math500", "--data", math, "--api-key-env", "A_KEY")
    with pytest.raises(SystemExit) as stopped:
        run("reasoning", stub, tmp_path, *command)
    assert "refuses the key (wrong key): name its variable with --api-key-env" in one_line(capsys, stopped)
    monkeypatch.setenv("A_KEY", "right")
    run("reasoning", stub, tmp_path, *command)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.public.data import from_hub
    from scripts.public.server import Stop

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nsecond line")

    library = SimpleNamespace(disable_progress_bars=lambda: None, load_dataset=fail)
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(Stop, match=r"a/b cannot be had from the hub \(ConnectionError: .*--data$"):
        from_hub("a/b", None, "test", ("problem",))


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_parse_and_have_the_run_bit(name: str) -> None:
    script = SCRIPTS / name
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_help_says_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"scripts.public.{name.removeprefix('eval_')}")
    with pytest.raises(SystemExit) as stopped:
        module.parse(["--help"])
    assert stopped.value.code == 0 and f"scripts/{name} --out" in capsys.readouterr().out


def test_thoughts_that_a_parser_took_apart_are_put_back(stub: Stub, math: Path, tmp_path: Path) -> None:
    """A box in thoughts that were cut short counts, as it does where the server has no reasoning parser."""
    stub.thoughts, stub.answer = "so \\boxed{2}", lambda body: ""
    run("reasoning", stub, tmp_path, "--datasets", "math500", "--data", math, "--limit", 1)
    (record,) = records(tmp_path / "math500.jsonl")
    assert record["output"] == "<think>so \\boxed{2}</think>" and record["correct"] is True


def test_parquet_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    from scripts.public.data import rows_of

    pandas.DataFrame(MATH).to_parquet(tmp_path / "math.parquet")
    assert rows_of(tmp_path / "math.parquet", ("problem", "answer")) == MATH


# -- LongBench v2 ------------------------------------------------------------------------------------------------------

LONGBENCH = {
    "_id": "x1",
    "context": "word " * 300,
    "question": "Which?",
    "answer": "B",
    "difficulty": "easy",
    "length": "short",
    **{f"choice_{letter}": f"choice {letter.lower()}" for letter in "ABCD"},
}


def test_longbench_cuts_the_middle_and_reads_the_choice(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([LONGBENCH, {**LONGBENCH, "_id": "x2", "context": "short", "length": "long"}]))
    stub.answer = lambda body: "<think>...</think>The correct answer is (B)"
    run("longbench_v2", stub, tmp_path, "--data", data, "--max-context", 250, "--limit", 1)
    (body,) = stub.asked
    assert len(body["messages"][0]["content"].split()) == 250 and body["max_tokens"] == 30720
    run("longbench_v2", stub, tmp_path, "--data", data, "--max-context", 250)
    prompt = stub.asked[-1]["messages"][0]["content"]
    assert prompt.startswith("Please read the following text and answer the question below.\n\n<text>\nshort\n</text>")
    assert prompt.endswith(
        '(D) choice d\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert "| all | 100.00 +- 0.00 | 2 | 2 |" in capsys.readouterr().out
    assert [r["groups"] for r in records(tmp_path / "longbench_v2.jsonl")] == [["easy", "short"], ["easy", "long"]]


def test_longbench_cot_asks_twice(stub: Stub, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([LONGBENCH]))
    stub.answer = lambda body: "The correct answer is (B)" if body["max_tokens"] == 128 else "because"
    run("longbench_v2", stub, tmp_path, "--data", data, "--prompt", "cot")
    first, second = (body["messages"][0]["content"] for body in stub.asked)
    assert first.endswith("think step by step:") and "The text is too long and omitted here." in second
    assert "step by step: because\n\nBased on the above" in second and "word word" not in second
    (record,) = records(tmp_path / "longbench_v2.jsonl")
    assert (record["output"], record["choice"], record["correct"]) == ("because", "The correct answer is (B)", True)


# -- LongMemEval -------------------------------------------------------------------------------------------------------


def memory(name: str, kind: str = "multi-session") -> dict[str, Any]:
    dates = ["2023/05/30 (Tue) 09:00", "2023/05/20 (Sat) 02:21"]
    turns = [[{"role": "user", "content": f"said on {date[:10]} ", "has_answer": True}] for date in dates]
    head = {"question_id": name, "question_type": kind, "question": f"What of {name}?", "answer": 7}
    return {**head, "question_date": "2023/06/01 (Thu) 10:00", "haystack_dates": dates, "haystack_sessions": turns}


def test_longmemeval_generates_then_judges(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([memory("q1"), memory("q2_abs"), memory("q3", "single-session-preference")]))
    stub.answer = lambda body: "<think>hm</think>seven"
    run("longmemeval", stub, tmp_path, "--data", data)
    prompt = stub.asked[0]["messages"][0]["content"]
    sessions = (
        "\n### Session 1:\nSession Date: 2023/05/20 (Sat) 02:21\nSession Content:\n\n\nuser: said on 2023/05/20\n"
    )
    assert sessions in prompt and "has_answer" not in prompt
    assert prompt.endswith("Current Date: 2023/06/01 (Thu) 10:00\nQuestion: What of q1?\nAnswer:")
    assert "3 answers, not judged" in capsys.readouterr().out

    asked = len(stub.asked)
    stub.answer = lambda body: "Yes." if "q1" in body["messages"][0]["content"] else "no"
    judge = ("--data", data, "--judge-base-url", stub.url, "--judge-model", "tiny")
    run("longmemeval", stub, tmp_path, *judge, "--judge-only", "--base-url", "http://127.0.0.1:9")
    bodies = stub.asked[asked:]
    assert len(bodies) == 3 and "top_k" not in bodies[0] and "chat_template_kwargs" not in bodies[0]
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0, 10)
    by_question = {b["messages"][0]["content"].split("What of ")[1][:2]: b["messages"][0]["content"] for b in bodies}
    assert "Correct Answer: 7\n\nModel Response: seven\n\nIs the model response correct?" in by_question["q1"]
    assert "Explanation: 7" in by_question["q2"] and "as unanswerable? Answer yes or no only." in by_question["q2"]
    assert "Rubric: 7" in by_question["q3"]
    text = capsys.readouterr().out
    assert "| multi-session | 100.00 | 1 |" in text and "| abstention | 0.00 | 1 |" in text and "judged by tiny" in text
    assert {r["id"]: r["correct"] for r in records(tmp_path / "longmemeval.jsonl")}["q1"] is True

    # Other answers than the judged ones are not given the old verdicts.
    file = tmp_path / "longmemeval.generated.jsonl"
    file.write_text(file.read_text().replace('"extracted": "seven"', '"extracted": "eight"'))
    with pytest.raises(SystemExit) as stopped:
        run("longmemeval", stub, tmp_path, *judge)
    assert "was judged on another answer" in one_line(capsys, stopped)


def test_longmemeval_names_the_example_that_does_not_fit(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    for wrong, reason in (
        ({"haystack_dates": []}, "q1: haystack_dates and haystack_sessions do not fit"),
        ({"haystack_sessions": [[{"content": "no role"}]] * 2}, "q1: haystack_dates and haystack_sessions do not fit"),
        ({"question_type": "other"}, "q1: question type 'other' is none of"),
    ):
        data.write_text(json.dumps([{**memory("q1"), **wrong}]))
        with pytest.raises(SystemExit) as stopped:
            run("longmemeval", stub, tmp_path, "--data", data)
        assert reason in one_line(capsys, stopped)


def test_longmemeval_looks_for_the_judge_first(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([memory("q1")]))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for wrong, reason in (
        (("--judge-model", "gpt-4o"), "--judge-key-env OPENAI_API_KEY: that environment variable is not set"),
        (("--judge-model", "x", "--judge-base-url", stub.url), "--judge-model x: not served by"),
        (("--judge-only",), "--judge-only: name the --judge-model"),
        (("--judge-only", "--judge-model", "tiny", "--judge-base-url", stub.url), "no such records"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("longmemeval", stub, tmp_path, "--data", data, *wrong)
        assert reason in one_line(capsys, stopped)
    assert not stub.asked


# -- RULER -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> Any:
    from scripts.public.ruler_tasks import Material, Questions, syllable_words

    found = Questions([f"text {n}" for n in range(9)], [("Who?", ["text 3", "he"], [3]), ("When?", ["text 4"], [4])])
    essay = [f"word{n}{'.' if n % 9 == 8 else ''}" for n in range(400)]
    return Material(essay, syllable_words(1000), {"qa_1": found, "qa_2": found})


@pytest.mark.parametrize("name, answers", [
    ("niah_single_1", 1), ("niah_single_2", 1), ("niah_single_3", 1), ("niah_multikey_1", 1), ("niah_multikey_2", 1),
    ("niah_multikey_3", 1), ("niah_multivalue", 4), ("niah_multiquery", 4), ("vt", 5), ("cwe", 10), ("fwe", 3),
    ("qa_1", 2), ("qa_2", 2),
])  # fmt: skip
def test_ruler_prompts_hold_their_answers_and_are_the_same_again(name: str, answers: int, source: Any) -> None:
    from scripts.public.ruler_tasks import make, score

    question, prefix, references = make(name, 120, 4096, 0, 1, source)
    assert (question, prefix, references) == make(name, 120, 4096, 0, 1, source)
    assert len({*references}) == answers
    assert all(reference in question for reference in references) or name.startswith("qa")
    assert make(name, 120, 4096, 1, 1, source)[0] != question != make(name, 120, 4096, 0, 2, source)[0]
    assert len(make(name, 240, 4096, 0, 1, source)[0]) > len(question) or name.startswith("qa")
    assert score(name, " and ".join(references).upper(), references)[1] == 1
    assert score(name, "nothing", references) == ([], 0)
    half = score(name, references[0], references)[1]
    assert half == (1 if name.startswith("qa") else pytest.approx(1 / answers))


def test_ruler_counts_and_chains(source: Any) -> None:
    from collections import Counter

    from scripts.public.ruler_tasks import make

    question, _, names = make("vt", 40, 4096, 0, 1, source)
    chain = question[question.index("\n\nMemorize") :]
    for a, b in pairwise(names):
        assert chain.index(f"VAR {a} ") < chain.index(f"VAR {b} = VAR {a}\n")
    question, _, common = make("cwe", 60, 4096, 0, 1, source)
    counts = Counter(re.findall(r"\d+\. (\w+)", question.rpartition("Below is")[2]))
    assert {word for word, n in counts.most_common(10)} == {*common} and {*counts.values()} == {30, 3}
    question, _, frequent = make("fwe", 400, 4096, 0, 1, source)
    counts = Counter(re.findall(r"\b[a-z]{6}\b", question.split("coded words. ")[1].split("\nQuestion")[0]))
    assert [word for word, _ in counts.most_common(3)] == frequent


def test_fit_finds_the_largest_size() -> None:
    from scripts.public.ruler_tasks import fit

    assert fit(100, 1, lambda size: 3 * size) == 33
    assert fit(2, 1, lambda size: 3 * size) is None
    found = fit(10**6, 20, lambda size: 7 * size + 11)
    assert found is not None and 0.99 * 10**6 < 7 * found + 11 <= 10**6


def test_ruler_files_of_questions(tmp_path: Path) -> None:
    from scripts.public.ruler_tasks import material
    from scripts.public.server import Stop

    squad, hotpotqa = tmp_path / "squad.json", tmp_path / "hotpot.json"
    asked = {"question": "Who?", "answers": [{"text": "he"}], "is_impossible": False}
    none = {"question": "Why?", "answers": [], "is_impossible": True}
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "He did.", "qas": [asked, none]}]}]}))
    hotpotqa.write_text(json.dumps([{"question": "Q?", "answer": "A", "context": [["T", ["One. ", "Two."]]]}]))
    found = material(None, None, squad, hotpotqa).questions
    assert found["qa_1"].asked == [("Who?", ["he"], [0])] and found["qa_2"].documents == ["T\nOne. Two."]
    with pytest.raises(Stop, match=r"hotpot\.json: not the layout"):
        material(None, None, hotpotqa, None)
    with pytest.raises(Stop, match=r"none\.txt: no such file"):
        material(tmp_path / "none.txt", None, None, None)


def test_ruler_fits_its_length_and_begins_the_answer(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any]) -> str:
        question, prefix = (message["content"] for message in body["messages"])
        key = prefix.split(" for ")[1].split(" mentioned")[0]
        return re.search(rf"for {key} is: (\d+)", question).group(1)  # type: ignore[union-attr]

    stub.answer = answer
    command = ("--tasks", "niah_single_1", "niah_multikey_2", "--limit", 3)
    run("ruler", stub, tmp_path, *command, "--lengths", 600)
    assert len(stub.asked) == 6
    body = stub.asked[0]
    assert body["continue_final_message"] is True and body["temperature"] == 0 and body["max_tokens"] == 128
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    sizes = [sum(len(m["content"].split()) for m in body["messages"]) for body in stub.asked]
    assert all(600 - 32 - 128 - 30 < size <= 600 - 32 - 128 for size in sizes)
    text = capsys.readouterr().out
    assert "| niah_multikey_2 | 100.00 +- 0.00 | 3 | 3 |" in text and "essay haystacks: noise" in text
    assert "Mix-Quant published no figures" in text
    for wrong, reason in (
        (("--lengths", 170), "needs"),
        (("--tasks", "qa_1"), "--squad"),
        (("--thinking",), "--max-tokens"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("ruler", stub, tmp_path, *command, *wrong)
        assert reason in one_line(capsys, stopped)


def test_syllable_words_are_different_words() -> None:
    from scripts.public.ruler_tasks import syllable_words

    words = syllable_words(20_000)
    assert len({*words}) == 20_000 and words[:5] == syllable_words(5) and Random(0).choice(words).isalpha()


def test_a_table_names_every_precision_of_its_arm() -> None:
    from scripts.public.report import describe

    state = {
        "recipe": "auto",
        "precision": {"prefill": "nvfp4+fp8", "decode": "bf16"},
        "kernel": {"nvfp4": "emulated", "fp8": "native"},
    }
    said = describe({"mixquant": state})
    assert said == "mixquant auto (prefill nvfp4 emulated + fp8 native, decode bf16)"


def test_a_server_that_goes_away_is_one_line(stub: Stub, tmp_path: Path) -> None:
    from scripts.public.server import Sampling, Server, Stop

    server = Server(stub.url, None, None)
    server.root = "http://127.0.0.1:9"
    server.client = server.client.with_options(base_url="http://127.0.0.1:9/v1", max_retries=0)

    async def ask() -> None:
        async with server.client:
            await server.chat("hello", Sampling(5), 0)

    with pytest.raises(Stop, match=r"no longer answers .*the same command goes on"):
        asyncio.run(ask())


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_line_of_jsonl_ends_at_a_newline_alone(tmp_path: Path, ending: str) -> None:
    """Not at the other characters at which str.splitlines does, which JSON strings hold unescaped."""
    from mixquant_sglang.tools.quantize.calibration import read_samples
    from scripts.public.data import read_json

    rows = [{"text": f"one{mark}two"} for mark in ("\u2028", "\u2029", "\u0085", "\x7f")]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ending.join([*(json.dumps(row, ensure_ascii=False) for row in rows), ""]).encode())
    assert read_json(file) == rows == read_samples(file)


@pytest.mark.parametrize(
    ("text", "whole", "cut"),
    [
        ("There are 12 apples, and half of 48", "48", None),
        ("The answer is 72. To check, 36 + 3", "72", "72"),
        ("So the answer is 1", "1", None),  # of 18, it may be
        (r"It is \boxed{7}. Now 5 and", "7", "7"),
        ("<think>3 or 4", "4", None),
    ],
)
def test_an_answer_that_was_cut_off_is_not_its_last_number(text: str, whole: str, cut: str | None) -> None:
    from scripts.public.grading import math_answer

    assert math_answer(text) == whole
    assert math_answer(text, cut_off=True) == cut
