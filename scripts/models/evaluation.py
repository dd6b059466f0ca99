"""What a trained tiny model can do, in plain PyTorch: held-out text and tasks, in BF16, in NVFP4 and mixed."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scripts.models.tiny_model import (
    Linear,
    Model,
    Shape,
    Weights,
    generate,
    plain,
)
from scripts.models.tiny_tasks import correct, examples, segments
from scripts.models.tiny_text import IM_END
from scripts.models.training import choose_attention
from scripts.models.training_data import Data

ROOT = Path(__file__).resolve().parents[2]


def nvfp4_linear(weights: Weights) -> Linear:
    """The package's NVFP4 numbers (formats/nvfp4.py) for weights and activations, for the linears of the layers."""
    from mixquant_sglang.formats import nvfp4

    low = {
        weight.data_ptr(): nvfp4.quantize(weight.cpu(), scales="search").dequantize().to(weight.device)
        for name, weight in weights.items()
        if "proj" in name
    }

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        rounded = nvfp4.quantize_activations(x.contiguous()).dequantize()
        return functional.linear(rounded, low[weight.data_ptr()])

    return linear


def arms(weights: Weights, names: list[str]) -> dict[str, dict[str, Any]]:
    """bf16; nvfp4: everything but the head; mixed: NVFP4 for the prompt without its last token, BF16 for the rest.
    An agent's own earlier turns are prompt here, whereas a server keeps the KV cache that decode made."""
    low = nvfp4_linear(weights) if set(names) != {"bf16"} else plain
    every: dict[str, dict[str, Any]] = {
        "bf16": {"prefill": plain, "decode": plain},
        "nvfp4": {"prefill": low, "decode": low},
        "mixed": {"prefill": low, "decode": plain, "protect": True},
    }
    return {name: every[name] for name in names}


def accuracy(model: Model, data: Data, task: str, level: int, length: int, n: int, arm: dict[str, Any]) -> float:
    """The share of held-out problems solved greedily; an agent's tool calls are answered as they come."""
    problems = examples(task, "eval", n, level=level, length=length, lines=data.lines)
    encode = data.tokenizer.encode
    prompts = [encode("".join(text for text, _ in segments(problem, turns=False))) for problem in problems]
    room = max(len(encode(problem.longest)) for problem in problems) + 8
    right = 0
    calls = 0
    while problems:
        outputs = [data.tokenizer.decode(ids) for ids in generate(model, prompts, room, IM_END, **arm)]
        on = []
        for problem, prompt, output in zip(problems, prompts, outputs, strict=True):
            page = problem.reply(output, calls) if calls < problem.max_calls else None
            if page is None:
                right += correct(task, output, problem.answer)
                continue
            text = f"{output}<|im_end|>\n<|im_start|>user\n<tool_response>\n{page}\n</tool_response><|im_end|>\n"
            on.append((problem, prompt + encode(text + "<|im_start|>assistant\n")))
        problems, prompts = [problem for problem, _ in on], [prompt for _, prompt in on]
        calls += 1
    return right / n


@torch.no_grad()
def text_loss(model: Model, data: Data, linear: Linear, windows: int) -> float:
    """Nats per token of held-out text, windows of 2048 tokens."""
    size = min(2048, len(data.corpus) - 1)
    total = 0.0
    for i in range(windows):
        start = i * max(1, (len(data.corpus) - size - 1) // windows)
        tokens = torch.from_numpy(data.corpus[start : start + size + 1].astype(np.int64)).to(model.embedding.device)
        logits = model.logits(model.packed(tokens[:-1], [size], linear)).float()
        total += float(functional.cross_entropy(logits, tokens[1:]))
    return total / windows


def evaluate(args: argparse.Namespace, shape: Shape, weights: Weights, device: torch.device) -> list[dict[str, Any]]:
    """Prints a row as soon as it is measured; what it printed."""
    data = Data(args.data, "eval")
    weights = {name: weight.to(device, torch.bfloat16) for name, weight in weights.items()}
    model = Model(shape, weights)
    choose_attention(model)
    chosen = arms(weights, args.arms)
    windows = min(32, args.n)
    loss = {name: text_loss(model, data, arm["prefill"], windows) for name, arm in chosen.items() if name != "mixed"}
    print("held-out text, nats per token: " + ", ".join(f"{n} {v:.4f}" for n, v in loss.items()), flush=True)
    rows: list[dict[str, Any]] = [{"task": "text", **loss}]
    print(f"{'task':8}{'level':>6}{'length':>8}{'n':>6}" + "".join(f"{name:>9}" for name in chosen) + "  seconds")
    for level, length, task in itertools.product(args.levels, args.lengths, args.tasks):
        began = time.monotonic()
        found = {name: accuracy(model, data, task, level, length, args.n, arm) for name, arm in chosen.items()}
        rows.append({"task": task, "level": level, "length": length, "n": args.n, **found})
        values = "".join(f"{value:9.3f}" for value in found.values())
        print(f"{task:8}{level:6}{length:8}{args.n:6}{values}{time.monotonic() - began:9.1f}", flush=True)
    return rows
