"""The texts of eval_text: windows of real documents, in the tokens of the model's own tokenizer.

| source | documents | an answer begins |
|---|---|---|
| essays | `paul-graham-essays.txt` | anywhere |
| code | this repository's package, file by file | anywhere |
| bfcl | BFCL v4 multi-turn: tool schemas, user turns, the calls that are expected | with the assistant's turn |
| tau2 | tau2-bench: the airline's policy, the user's task, the calls that are expected | with the assistant's turn |

A window is a prompt of so many tokens and the answer: the tokens that follow it there, in ``bfcl`` and ``tau2`` the
assistant's turn and what comes after.  No token is in two answers; prompts may overlap.  Conversations are rendered by
the tokenizer's chat template, the schemas in the system's turn; by a plain one where it has none, or has one that
rewrites earlier turns.  The data sets hold no results of tools, so a turn of calls is followed by the next user's.

``conversations`` are whole ones, of sources whose have several turns: there an answer is the assistant's turn alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.public.data import rows_of

SOURCES = ("essays", "code", "bfcl", "tau2")
FILES = {
    "essays": ("paul-graham-essays.txt",),
    "code": (),
    "bfcl": (
        "bfcl-v4-multi-turn-base-60.jsonl",
        "bfcl-v4-multi-turn-base-60-answers.jsonl",
        "bfcl-v4-multi-turn-functions.jsonl",
    ),
    "tau2": ("tau2-airline-tasks.json", "tau2-airline-policy.md", "tau2-telecom-tasks-small.json"),
}
TURNS = ("bfcl",)  # sources of conversations with several turns
_APIS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Window:
    prompt: list[int]
    answer: list[int]


def missing(source: str, data: Path | None) -> str:
    """The file of a source that is not in ``data``; empty where all are."""
    return next((name for name in FILES[source] if data is None or not (data / name).is_file()), "")


def windows(source: str, data: Path | None, tokenizer: Any, n: int, length: int, answer: int) -> list[Window]:
    """``n`` of them, evenly spaced.  SystemExit where the text is too short for so many."""
    tokens, starts = stream(source, data, tokenizer)
    lead = list(tokenizer("").input_ids)  # a token that begins every text, where the model wants one
    own = length - len(lead)
    if starts is None:
        step = (len(tokens) - own) // n
        places = [own + number * step for number in range(n)] if step >= answer else []
    else:
        apart: list[int] = []
        for at in starts:
            if at >= own and at + answer <= len(tokens) and (not apart or at >= apart[-1] + answer):
                apart.append(at)
        places = [apart[number * len(apart) // n] for number in range(n)] if len(apart) >= n else []
    if not places:
        raise SystemExit(
            f"{source} is too short for {n} answers of {answer} tokens behind {length}: give a smaller --n"
        )
    return [Window([*lead, *tokens[at - own : at]], tokens[at : at + answer]) for at in places]


def conversations(source: str, data: Path, tokenizer: Any, n: int, room: int, answer: int) -> list[list[Window]]:
    """At most ``n``, evenly spaced among those of which two turns or more fit into ``room`` tokens: a window for each
    turn that does.  A prompt is all that was said before, so it begins with the one before it and its answer; of an
    answer the first ``answer`` tokens count.  SystemExit where there are none."""
    found = []
    for messages in _bfcl(data) if source == "bfcl" else _tau2(data):
        every = _turns(messages, tokenizer, answer)
        fit = [turn for turn in every if len(turn.prompt) + len(turn.answer) <= room]
        if len(fit) > 1:
            found.append(fit)
    if not found:
        raise SystemExit(f"{source} has no conversation of which two turns fit into {room} tokens")
    n = min(n, len(found))
    return [found[number * len(found) // n] for number in range(n)]


def _turns(messages: Messages, tokenizer: Any, answer: int) -> list[Window]:
    """An answer is what the assistant says and the token that ends its turn: the first that the template puts behind.
    What it puts before (Qwen3: an empty thought, in the last turn) belongs to the prompt."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for using in (tokenizer, None):  # None: a plain rendering, where a template changes what was said
        first, *parts = [text for text, _ in segments(messages, using)]
        if all(text in part for text, part in zip(said, parts, strict=True)):
            break
    prompt, made = encode(first), []
    lead = list(tokenizer("").input_ids)
    prompt = prompt if prompt[: len(lead)] == lead else [*lead, *prompt]
    for text, part in zip(said, parts, strict=True):
        at = part.index(text)
        own, after = encode(text), encode(part[at + len(text) :])
        prompt = [*prompt, *encode(part[:at])]
        made.append(Window(prompt, [*own, *after[:1]][:answer]))
        prompt = [*prompt, *own, *after]
    return made


def stream(source: str, data: Path | None, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """All tokens of a source, and where answers may begin; None: anywhere."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    tokens: list[int] = []
    if source in ("essays", "code"):
        for text in _texts(source, data):
            tokens += encode(text)
        return tokens, None
    assert data is not None
    starts = []
    for messages in _bfcl(data) if source == "bfcl" else _tau2(data):
        for text, is_answer in segments(messages, tokenizer):
            if is_answer:
                starts.append(len(tokens))
            tokens += encode(text)
    return tokens, starts


def segments(messages: Messages, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The rendered conversation in parts, and whether a part begins with what an assistant says."""
    renders = []
    if getattr(tokenizer, "chat_template", None):

        def template(part: Messages, opened: bool) -> str:
            return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=opened))

        renders.append(template)
    for render in (*renders, plain):
        parts, before, whole = [], "", render(messages, False)
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                opened = render(messages[:at], True)
                parts.append(opened.removeprefix(before))
                before += parts[-1]
        parts.append(whole.removeprefix(before))
        if "".join(parts) == whole:
            yield from ((text, number > 0) for number, text in enumerate(parts))
            return
    raise AssertionError("a plain rendering goes on where it stopped")


def plain(messages: Messages, opened: bool) -> str:
    return "".join(f"{m['role']}: {m['content']}\n\n" for m in messages) + ("assistant: " if opened else "")


def _texts(source: str, data: Path | None) -> Iterator[str]:
    if source == "essays":
        assert data is not None
        yield (data / FILES["essays"][0]).read_text(encoding="utf-8")
        return
    package = Path(__file__).resolve().parents[2] / "mixquant_sglang"
    for file in sorted(package.rglob("*.py")):
        yield f"# {file.relative_to(package.parent)}\n{file.read_text(encoding='utf-8')}\n"


def _lines(file: Path) -> list[dict[str, Any]]:
    return rows_of(file, ())


def bfcl_tools(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Class, as rows of BFCL name it -> the schemas of its tools."""
    functions: dict[str, list[dict[str, Any]]] = {}
    for schema in _lines(data / FILES["bfcl"][2]):
        functions.setdefault(schema["_api"], []).append({k: v for k, v in schema.items() if k != "_api"})
    return {name: functions.get(api, []) for name, api in _APIS.items()}


def _bfcl(data: Path) -> Iterator[Messages]:
    tools = bfcl_tools(data)
    answers = {row["id"]: row["ground_truth"] for row in _lines(data / FILES["bfcl"][1])}
    for row in _lines(data / FILES["bfcl"][0]):
        schemas = [json.dumps(schema) for name in row["involved_classes"] for schema in tools[name]]
        messages = [{"role": "system", "content": "You may call these tools:\n" + "\n".join(schemas)}]
        for asked, calls in zip(row["question"], answers[row["id"]], strict=True):
            messages += [{"role": "user", "content": turn["content"]} for turn in asked]
            messages.append({"role": "assistant", "content": "\n".join(calls)})
        yield messages


def _tau2(data: Path) -> Iterator[Messages]:
    policy = (data / FILES["tau2"][1]).read_text(encoding="utf-8")
    for file, system in ((FILES["tau2"][0], policy), (FILES["tau2"][2], "You are a telecom's agent.")):
        for task in _lines(data / file):
            told = task["user_scenario"]["instructions"]
            said = [told[name] for name in ("reason_for_call", "known_info", "task_instructions") if told.get(name)]
            calls = [
                json.dumps({"name": action["name"], "arguments": action["arguments"]})
                for action in task["evaluation_criteria"].get("actions") or ()
            ]
            if calls:
                yield [
                    {"role": "system", "content": system},
                    {"role": "user", "content": "\n".join(said)},
                    {"role": "assistant", "content": "\n".join(calls)},
                ]
