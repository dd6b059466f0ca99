#!/usr/bin/env python3
"""Prefill time and decode step of several servers, side by side on one GPU.

Every arm is a real SGLang server; all of them are up at once (with a bounded KV pool) and the rounds alternate between
them, so that a slow moment of the machine hits every arm.  Prompts are random token ids, new for every request, so that
nothing is cached.  Times are those of the client, HTTP included: medians over the rounds.

    prefill  seconds until the first token of a prompt of L tokens, batch 1
    decode   (time of 136 tokens - time of 8 tokens) / 128 after the same prompt, batch B

Arms: stock-bf16 and stock-fp8 (SGLang without the plugin), or the name of a recipe.
Prints a table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


class Arm:
    def __init__(self, name: str, model: Path, args: argparse.Namespace) -> None:
        self.name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(self.port)]
        command += ["--skip-tokenizer-init", "--grammar-backend", "none", "--max-total-tokens", str(args.kv_tokens)]
        command += ["--load-format", "dummy"] if args.model is None or args.dummy else []
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        env.pop("MIXQUANT_RECIPE", None)
        if name.startswith("stock-"):
            env["SGLANG_PLUGINS"] = "none"
            command += [] if name == "stock-bf16" else ["--quantization", name.removeprefix("stock-")]
        else:
            command += ["--quantization", "mixquant", "--mixquant-recipe", name]
        self.log = args.logs / f"{Path(name).stem}.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *args.flags], stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = response.read()
        return json.loads(text) if text else None

    def wait(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.call("/health")
                return
            except OSError:
                time.sleep(1)
        tail = self.log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{self.name} did not start; end of {self.log}:\n{tail}")

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        body = {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        began = time.perf_counter()
        self.call("/generate", body)
        return time.perf_counter() - began

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure(arms: list[Arm], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians in milliseconds: ``{arm: {"prefill_8192": ..., "decode_b1_8192": ...}}``."""
    rng = random.Random(args.seed)
    times: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in arms}

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, args.vocab) for _ in range(length)]

    for round_number in range(args.rounds + 1):  # the first round warms up
        order = arms if round_number % 2 else arms[::-1]
        for length in args.lengths:
            for arm in order:
                spent = arm.seconds([prompt(length)], 1)
                if round_number:
                    times[arm.name].setdefault(f"prefill_{length}", []).append(spent)
        for batch in args.batches:
            prompts = [prompt(args.decode_context) for _ in range(batch)]
            for arm in order:
                arm.seconds(prompts, 1)
                few, many = arm.seconds(prompts, 8), arm.seconds(prompts, 136)
                if round_number:
                    key = f"decode_b{batch}_{args.decode_context}"
                    times[arm.name].setdefault(key, []).append((many - few) / 128)
    return {name: {key: 1e3 * statistics.median(v) for key, v in found.items()} for name, found in times.items()}


def machine() -> dict[str, str]:
    gpu = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"gpu": gpu or "none", "sglang": version("sglang"), "torch": version("torch"), "commit": commit or "unknown"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint; default: Qwen3-8B's dimensions, dummy weights")
    parser.add_argument("--dummy", action="store_true", help="dummy weights for --model too")
    parser.add_argument("--arms", nargs="+", default=["stock-bf16", "stock-fp8", "fp8"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--decode-context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kv-tokens", type=int, default=70000)
    parser.add_argument("--vocab", type=int, default=150000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=None)
    parser.add_argument("--start-limit", type=float, default=400)
    parser.add_argument("flags", nargs="*", help="after --: more flags for every server")
    args = parser.parse_args()
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="bench_prefill_"))
    args.logs.mkdir(parents=True, exist_ok=True)
    model = args.model
    if model is None:
        model = args.logs / "qwen3-8b"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(QWEN3_8B))
    arms: list[Arm] = []
    try:
        arms = [Arm(name, model.resolve(), args) for name in args.arms]
        for arm in arms:
            arm.wait(args.start_limit)
        results = measure(arms, args)
    finally:
        for arm in arms:
            arm.stop()
    columns = [*next(iter(results.values()))]
    print(f"{'arm (ms)':<18}" + "".join(f"{column:>18}" for column in columns))
    first = results[args.arms[0]]
    for name, found in results.items():
        cells = (f"{found[c]:9.2f} ({first[c] / found[c]:.3f}x)" for c in columns)
        print(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells))
    print(json.dumps({**machine(), "rounds": args.rounds, "baseline": args.arms[0], "ms": results}))


if __name__ == "__main__":
    main()
