"""A multi-turn agent conversation through SGLang with mixquant: which tokens ran in which precision.

    scripts/demo [--pd] [--recipe NAME|FILE] [--model PATH] [--turns N] [any sglang.launch_server argument]

Starts a server with --quantization mixquant, on a machine without a GPU on the CPU, plays one conversation, and shows a
table by turn. The small model in tests/models opens page after page with its tool, finds on each the reference that it
was given and in it the number of the next page, and answers what the last page says. Another --model is shown files of
Python's standard library. Every turn sends the whole conversation again with one more long tool result, so the prefix
cache serves the old part and only the new part is prefilled. `new`, `cached` and `generated` are what the API reports
as usage; `low`, `high` and `protected` are what the server counted in its forward passes (/server_info). The last line
of stdout is a line of JSON; `ok` says that the two accounts agree, that prompts ran in low precision, and that no
generated token did.

With --pd a prefill server, a decode server and SGLang's router play it (scripts/serve_pd): on two GPUs, or on the CPU
where there are fewer.  Prompts are then counted by the one and generated tokens by the other, and answers of earlier
turns, which the prefill server never had, are prefilled there beside what is new.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai

from scripts.models.tiny_tasks import Example, correct, examples
from scripts.serve.pair import Pair, Plan, gpus_of
from scripts.serve.pd import gpu_count

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = ROOT / "tests" / "models" / "tiny-qwen3"
CPU_ARGS = ["--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph"]
CPU_ARGS += ["--max-total-tokens", "20000"]
STARTUP_S = 900
NEW_TOKENS = 48
SYSTEM = "You are a coding agent. You read source files with your tools and say in one sentence what each does."
FILES = "json.decoder textwrap heapq fractions string shutil enum functools statistics dataclasses"  # one per turn
EXCERPT = 2400  # characters of a file per tool result
TOOL_CALL = re.compile(r'"name": "(\w+)", "arguments": \{"page": "(\d+)"\}')


def gpu_name() -> str | None:
    """The first NVIDIA GPU, asked of the driver so that this process takes no CUDA context."""
    import pynvml

    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None
    return name.decode() if isinstance(name, bytes) else str(name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def get(url: str) -> bytes | None:
    """The body of a 200 answer; None for anything else, a server that is not up yet included."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bytes(answer.read()) if answer.status == 200 else None
    except OSError:
        return None


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started: they share its process group."""
    for sig, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


@contextlib.contextmanager
def server(command: list[str], url: str, log: Path) -> Iterator[None]:
    """A ready server for as long as the block runs; its log's end on stdout if the block or the server fails."""
    # Not started from the checkout: its package directory would hide the installed one.
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=log.parent, stdout=out, stderr=out, start_new_session=True)
    try:
        began = said = time.monotonic()
        while get(f"{url}/health") is None:
            now = time.monotonic()
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode} before it was ready")
            if now - began > STARTUP_S:
                raise RuntimeError(f"the server was not ready after {STARTUP_S} s")
            if now - said >= 15:
                said = now
                print(f"  starting, {now - began:.0f} s", flush=True)
            time.sleep(1)
        print(f"  ready after {time.monotonic() - began:.0f} s\n", flush=True)
        yield
    except Exception:
        print(f"--- last lines of {log}")
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
        print("---", flush=True)
        raise
    finally:
        stop(process)


def state(url: str) -> dict[str, Any]:
    info = json.loads(get(f"{url}/server_info") or b"{}")
    try:
        return dict(info["internal_states"][0]["mixquant"])
    except (KeyError, IndexError):
        raise RuntimeError("/server_info has no internal_states[0].mixquant: the plugin is not at work") from None


def counters(servers: Sequence[str]) -> dict[str, int]:
    """What the servers have counted so far, by phase and low (any precision but bf16) or high."""
    count: Counter[str] = Counter()
    for found in map(state, servers):
        count["protected"] += int(found["protected_rows"])
        for phase in ("prefill", "decode"):
            tokens = found["tokens"].get(phase, {})
            count[f"{phase}_high"] += tokens.get("bf16", 0)
            count[f"{phase}_low"] += sum(tokens.values()) - tokens.get("bf16", 0)
    return dict(count)


def tool_result(turn: int) -> dict[str, str]:
    """The next excerpt of the next file; a conversation longer than FILES reads on where it stopped."""
    names = FILES.split()
    name, part = names[turn % len(names)], turn // len(names)
    spec = find_spec(name)
    assert spec and spec.origin, f"Python without {name}"
    text = Path(spec.origin).read_text(encoding="utf-8")[part * EXCERPT : (part + 1) * EXCERPT]
    return {"role": "tool", "tool_call_id": f"read-{turn}", "content": f"{name}, part {part + 1}:\n{text}"}


def ask(client: openai.OpenAI, model: str, messages: list[Any]) -> tuple[str, dict[str, int]]:
    """One streamed turn: the text, and the API's account of it with the time to the first token."""
    began, first, text, usage = time.perf_counter(), 0.0, "", None
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=NEW_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            text += chunk.choices[0].delta.content
    if usage is None:
        raise RuntimeError("the server sent no usage with its answer")
    cached = (usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0
    ttft = round(((first or time.perf_counter()) - began) * 1000)
    new = usage.prompt_tokens - cached
    return text, {"new": new, "cached": cached, "generated": usage.completion_tokens, "ttft": ttft}


def short(text: str) -> str:
    found = TOOL_CALL.search(text)
    return f"{found[1]}({found[2]})" if found else text[:40]


def converse(url: str, servers: Sequence[str], turns: int, task: Example | None) -> tuple[dict[str, int], list[str]]:
    """Play the conversation at ``url``; the totals of what ``servers`` count, and what does not hold about them."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "What do these files do?"},
    ]
    if task:
        messages = list(task.messages)
    columns = ("new", "cached", "low", "high", "protected", "generated", "ttft")
    print("turn " + "".join(f"{c + ' ms' if c == 'ttft' else c:>11}" for c in columns) + "  answer")
    total: dict[str, int] = {}
    before = counters(servers)
    for turn in range(turns):
        if not task:
            messages.append(tool_result(turn))
        text, row = ask(client, model, messages)
        messages.append({"role": "assistant", "content": text})
        after = counters(servers)
        row |= {name: after[name] - before[name] for name in after}
        row |= {"low": row["prefill_low"], "high": row["prefill_high"]}
        before = after
        total = {name: total.get(name, 0) + value for name, value in row.items()}
        print(f"{turn + 1:<5}" + "".join(f"{row[c]:>11}" for c in columns) + f"  {short(text)!r}", flush=True)
        if task:
            page = task.reply(text, turn) if turn < task.max_calls else None
            if page is None:
                right = correct("agent", text, task.answer)
                print(f"the answer is {'right' if right else f'wrong: {task.answer!r} it is'}")
                break
            messages.append({"role": "tool", "tool_call_id": f"open-{turn}", "content": page})
    print(f"{'all':<5}" + "".join(f"{total[c]:>11}" for c in columns[:-1]) + "\n")

    wrong = []
    ran = total["low"] + total["high"]
    # A prefill server never had the answers of earlier turns, which the decode server, who tells of it, has cached.
    again = total["generated"] if len(servers) > 1 else 0
    if not total["new"] <= ran <= total["new"] + again:
        wrong.append(f"the API reports {total['new']} new prompt tokens, the server ran {ran}")
    if total["low"] == 0:
        wrong.append("no prompt token ran in low precision")
    if total["cached"] == 0:
        wrong.append("the prefix cache served no token")
    if total["decode_low"]:
        wrong.append(f"{total['decode_low']} decode tokens ran in low precision")
    return total, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pd", action="store_true", help="a prefill and a decode server behind a router")
    parser.add_argument("--recipe", help="a shipped recipe or a recipe file (default: auto)")
    parser.add_argument("--model", help="a checkpoint (default: the small one in tests/models)")
    parser.add_argument("--turns", type=int, default=9, help="turns of the conversation (default: %(default)s)")
    options, server_args = parser.parse_known_args()
    # Ctrl-C, a closed terminal and a plain kill all unwind through server(), which stops what it started.
    for sig in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, lambda number, _: sys.exit(128 + number))

    CACHE.mkdir(exist_ok=True)
    model = options.model or str(MODEL)
    if Path(model).exists():
        model = str(Path(model).resolve())
    task = None if options.model else examples("agent", "eval", 1, level=1, length=4096)[0]
    if options.pd:
        return on_pair(options, server_args, model, task)
    gpu = gpu_name()
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", CACHE / f"demo-{port}.log"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--quantization", "mixquant"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-cache-report", "--enable-metrics"]
    command += [] if gpu else CPU_ARGS
    if options.recipe:
        recipe = Path(options.recipe)
        command += ["--mixquant-recipe", str(recipe.resolve()) if recipe.is_file() else options.recipe]
    command += server_args
    print(" ".join(["python", *command[1:]]) + f"\n  server log: {log}", flush=True)
    try:
        with server(command, url, log):
            total, wrong = converse(url, [url], options.turns, task)
            result = result_of(total, wrong, options.turns, gpu, state(url)["recipe"])
    except (RuntimeError, openai.OpenAIError) as error:
        wrong, result = [str(error)], {"ok": False, "error": str(error)}
    except KeyboardInterrupt:
        return 130
    return tell(wrong, result)


def on_pair(options: argparse.Namespace, server_args: list[str], model: str, task: Example | None) -> int:
    recipe = options.recipe or ""
    on_gpus = gpu_count() > 1
    plan = Plan(
        model,
        free_port(),
        recipe=str(Path(recipe).resolve()) if recipe and Path(recipe).is_file() else recipe,
        prefill_gpu=gpus_of(0, 1) if on_gpus else "",
        decode_gpu=gpus_of(1, 1) if on_gpus else "",
        transfer="nixl" if on_gpus else "mooncake_tcp",
        both=tuple(server_args),
    )
    try:
        with Pair(plan, CACHE, partial(print, flush=True)) as pair:
            servers = [plan.url(name) for name in ("prefill", "decode")]
            total, wrong = converse(pair.url, servers, options.turns, task)
            prefill, decode = (counters([url]) for url in servers)
            if prefill["decode_low"] + prefill["decode_high"]:
                wrong.append("the prefill server decoded")
            if decode["prefill_low"] + decode["prefill_high"]:
                wrong.append("the decode server prefilled")
            result = result_of(
                total, wrong, options.turns, gpu_name() if on_gpus else None, state(servers[0])["recipe"]
            )
    except (RuntimeError, openai.OpenAIError) as error:
        wrong, result = [str(error)], {"ok": False, "error": str(error)}
    except KeyboardInterrupt:
        return 130
    return tell(wrong, result | {"topology": "pd"})


def result_of(total: dict[str, int], wrong: list[str], turns: int, gpu: str | None, recipe: str) -> dict[str, Any]:
    return {
        "ok": not wrong,
        "sglang": version("sglang"),
        "device": gpu or "cpu",
        "recipe": recipe,
        "turns": turns,
        **{n: total[n] for n in ("prefill_low", "prefill_high", "decode_low", "decode_high")},
        "cached_tokens": total["cached"],
    }


def tell(wrong: list[str], result: dict[str, Any]) -> int:
    for line in wrong:
        print(f"NOT OK: {line}")
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def command() -> None:
    sys.exit(main())
