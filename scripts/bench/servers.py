"""The servers that bench_prefill, bench_agent and bench_trace compare: one real SGLang server per arm, all up at once.

An arm is ``stock-bf16`` or ``stock-NAME`` (SGLang without mixquant, ``--quantization NAME``), or a recipe of mixquant,
by name or by file.  Each server has a bounded KV pool, so that they fit on one GPU; each has a log file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import orjson

from scripts.bench import passes, turns
from scripts.serve.processes import free_port

HERE = Path(__file__).resolve().parent
T = TypeVar("T")

# Qwen/Qwen3-8B's config.json, for --load-format dummy.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151936,
}


AGAIN = "stock-again"  # the baseline once more: what two equal servers differ by


def add_arguments(parser: argparse.ArgumentParser, *, rounds: int, kv_tokens: int) -> None:
    parser.add_argument("--model", type=Path, help="checkpoint; default: Qwen3-8B's dimensions, dummy weights")
    parser.add_argument("--dummy", action="store_true", help="dummy weights for --model too")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["stock-bf16", "stock-fp8", "fp8"],
        help="what to compare, the first is the baseline; stock-again: stock-bf16 once more, to see what two equal "
        "servers differ by (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help="figures are medians over these; a multiple of the number of arms is fair to all (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-tokens", type=int, default=kv_tokens, help="KV pool of each server (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random token ids (default: %(default)s)")
    parser.add_argument(
        "--vocab", type=int, help="token ids are below this (default: the model's vocabulary, at most 150000)"
    )
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a new one under /tmp)")
    parser.add_argument(
        "--start-limit", type=float, default=400, help="seconds a server may take (default: %(default)s)"
    )
    turns.add_argument(parser)
    parser.add_argument("flags", nargs="*", help="after --: more flags for every server")


def prepare(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Checks what ``add_arguments`` added; fills in ``args.logs``, ``args.model_path`` and ``args.vocab``."""
    names = [Path(name).stem for name in args.arms]
    if len({*names}) < len(names):
        parser.error(f"argument --arms: {' '.join(names)}: two arms would have the same log; name each once")
    if args.rounds < 1:
        parser.error("argument --rounds: at least 1")
    args.logs = (args.logs or Path(tempfile.mkdtemp(prefix=f"{Path(sys.argv[0]).stem}_"))).resolve()
    args.logs.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        args.model_path = args.logs / "qwen3-8b"
        args.model_path.mkdir(exist_ok=True)
        (args.model_path / "config.json").write_text(json.dumps(QWEN3_8B))
    else:
        args.model_path = args.model.resolve()
        if not (args.model_path / "config.json").is_file():
            parser.error(f"argument --model: {args.model} has no config.json; name the folder of a checkpoint")
    if args.vocab is None:
        config = json.loads((args.model_path / "config.json").read_text())
        args.vocab = min(150000, config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 150000))


def in_turn(arms: list[T], round_number: int) -> list[T]:
    """The order of the arms in a round: rotated by one each time, and the other way round every ``len(arms)`` rounds.

    So each arm comes first, second, ... equally often, which matters: prefill of 2048 tokens on an H200 is up to 5%
    faster where it is the first of a round than right behind another arm's.
    """
    turn, shift = divmod(round_number, len(arms))
    order = arms[shift:] + arms[:shift]
    return order[::-1] if turn % 2 else order


class Arm:
    """One server, starting from the moment that this is made.  ``timed``: it writes down its prefill passes."""

    def __init__(
        self, name: str, args: argparse.Namespace, plugin: Path | None, timed: bool, gpu: str | None = None
    ) -> None:
        self.name = name
        self.gpus = ranks(args.flags)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = args.logs / f"{Path(name).stem}.log"
        self.passes_file = args.logs / f"{Path(name).stem}.passes"
        self.passes_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(args.model_path)]
        command += ["--port", str(self.port), "--skip-tokenizer-init", "--grammar-backend", "none"]
        # Left to itself, 0.5.17 takes a port that another server may get before it listens there.
        command += ["--nccl-port", str(free_port())]
        command += ["--max-total-tokens", str(args.kv_tokens)]
        command += ["--load-format", "dummy"] if args.model is None or args.dummy else []
        plugins = [passes.PLUGIN] if plugin else []
        if name.startswith("stock-"):
            command += [] if name in ("stock-bf16", AGAIN) else ["--quantization", name.removeprefix("stock-")]
        else:
            plugins.append("mixquant")
            recipe = str(Path(name).resolve()) if Path(name).is_file() else name
            command += ["--quantization", "mixquant", "--mixquant-recipe", recipe]
        env = {**os.environ, "PYTHONWARNINGS": "ignore", "SGLANG_PLUGINS": ",".join(plugins) or "none"}
        env.pop("MIXQUANT_RECIPE", None)
        patience, more = turns.patience(args.flags)
        env |= more
        env.pop(passes.FILE_ENV, None)
        if plugin:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")]))
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        if timed:
            env[passes.FILE_ENV] = str(self.passes_file)
        # Not started from the checkout: its package directory would hide the installed one.
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *patience, *args.flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=args.logs,
                start_new_session=True,
                preexec_fn=turns.die_with_us,
            )

    def post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else orjson.dumps(body)  # hundreds of prompts as token ids
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return bytes(response.read())

    def failed(self, what: str) -> SystemExit:
        """To raise: ``what`` went wrong, with the end of the server's log."""
        tail = self.log.read_text(errors="replace")[-3000:]
        return SystemExit(f"{self.name} {what}; end of {self.log}:\n{tail}")

    def wait(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.post("/health")
                return
            except OSError:
                time.sleep(1)
        raise self.failed("did not start")

    def generate(self, prompts: list[list[int]], tokens: int, **more: Any) -> tuple[float, list[dict[str, Any]]]:
        """Seconds until the whole answer to one request, and its answers' ``meta_info``; ``more``: of its body."""
        body = {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
            **more,
        }
        began = time.perf_counter()
        answer = self.post("/generate", body)
        spent = time.perf_counter() - began
        return spent, [one["meta_info"] for one in json.loads(answer)]

    def mark(self) -> int:
        """Where the passes end that were written down so far."""
        return self.passes_file.stat().st_size if self.passes_file.exists() else 0

    def pass_seconds(self, mark: int, rows: int) -> float:
        return sum(self.passes(mark, rows))

    def passes(self, mark: int, rows: int, beside: int = 0) -> list[float]:
        """Seconds of each pass since ``mark``, which must have had ``rows`` prompt rows in all; a mixed one has
        ``beside`` decode rows besides.

        The server writes a line a moment after the pass, so the last one may come after the answer.
        """
        deadline = time.monotonic() + 10
        while True:
            found = parse_passes(self.passes_file.read_text()[mark:]) if self.passes_file.exists() else []
            counted = sum(n - beside * (mode == "MIXED") for mode, n, _ in found)
            if counted == rows:
                return [ms / 1e3 for _, _, ms in found]
            if counted > rows or time.monotonic() > deadline:
                raise self.failed(f"ran {rows} new prompt tokens, but its passes have {counted} rows: {found}")
            time.sleep(0.002)

    def flush(self) -> None:
        """Empties the radix cache; SGLang answers 400 while its last pass is still under way."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self.post("/flush_cache", {})
                return
            except OSError as error:
                if getattr(error, "code", None) != 400 or time.monotonic() > deadline:
                    raise self.failed(f"did not flush its cache ({error})") from None
            time.sleep(0.1)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def ranks(flags: list[str]) -> int:
    """GPUs of a server with these flags."""
    found = 1
    for flag, value in zip(flags, [*flags, ""][1:], strict=True):
        name, _, inline = flag.partition("=")
        if name in ("--tp-size", "--tp", "--tensor-parallel-size"):
            found = int(inline or value)
    return found


def gpu_names(count: int) -> list[str] | list[None]:
    """What CUDA_VISIBLE_DEVICES is for each of ``count`` GPUs; for one, whatever it is already."""
    if count == 1:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    if len(names) < count:
        raise SystemExit(f"--gpus {count}: CUDA_VISIBLE_DEVICES has {len(names)}")
    return names[:count]


def parse_passes(text: str) -> list[tuple[str, int, float]]:
    """(forward mode, rows, milliseconds) of each complete line."""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [(mode, int(rows), float(ms)) for mode, rows, ms in map(str.split, lines)]


def make_plugin(folder: Path) -> Path:
    """A folder that holds passes.py as SGLang finds plugins: a module and the metadata of its entry point."""
    name = passes.PLUGIN
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(HERE / "passes.py", folder / f"{name}.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    return folder


@contextlib.contextmanager
def serving(args: argparse.Namespace, *, timed: bool) -> Iterator[list[Arm]]:
    """The arms of ``args``, all ready; however the block ends, a signal included, they are stopped."""
    for sig in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sig) is not signal.SIG_IGN:  # nohup: it goes on without its terminal
            signal.signal(sig, lambda number, _: sys.exit(128 + number))
    arms: list[Arm] = []
    with tempfile.TemporaryDirectory(prefix="bench_plugin_") as folder:
        # Without a GPU the plugin is also what lets stock SGLang start; with one, a server that nothing times has none.
        plugin = make_plugin(Path(folder) / "plugin") if timed or {"cpu", "--device=cpu"} & {*args.flags} else None
        try:
            gpus = gpu_names(getattr(args, "gpus", 1))
            for name, gpu in zip(args.arms, itertools.cycle(gpus), strict=False):
                arms.append(Arm(name, args, plugin, timed, gpu))
            for arm in arms:
                arm.wait(args.start_limit)
            time.sleep(0.5)  # the passes of SGLang's own warm-up and health check are written down by then
            yield arms
        finally:
            for arm in arms:
                arm.stop()


def machine() -> dict[str, str]:
    """What the figures belong to: GPU, SGLang, torch, commit."""
    gpu = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    describe = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"gpu": gpu or "none", "sglang": version("sglang"), "torch": version("torch"), "commit": commit or "unknown"}
