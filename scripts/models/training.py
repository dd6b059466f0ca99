"""The training loop of the tiny model: its schedule, its loss by kind of document, what it saves and resumes from."""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scripts.models.checkpoint import read_checkpoint
from scripts.models.optimizer import Trainer
from scripts.models.tiny_model import Model, Shape, initial
from scripts.models.training_data import KINDS, Data, batches, limit_at

LOG_EVERY = 50


def rate_at(step: int, warmup: int, decay_from: int | None, steps: int | None) -> float:
    """Warm-up, constant, then a straight line to zero at `steps`."""
    rate = min(1.0, (step + 1) / warmup)
    if decay_from is not None and steps is not None and step >= decay_from:
        rate *= max(0.0, (steps - step) / (steps - decay_from))
    return rate


def batch_loss(
    hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, kinds: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted loss, and by kind its sum and count of learnt tokens [2, kinds]."""
    losses = functional.cross_entropy(functional.linear(hidden, embedding).float(), targets, reduction="none")
    which = (kinds == torch.arange(len(KINDS), device=kinds.device)[:, None]) & (weights > 0)
    sums = torch.stack((which.float() @ losses.detach(), which.float().sum(1)))
    return (losses * weights).sum(), sums


def compile_pieces(trainer: Trainer) -> Any:
    """Each piece is one graph for all layers, for every batch has the same shape."""
    model, shape = trainer.model, trainer.shape
    before = torch.compile(functools.partial(model.before, shape=shape), dynamic=False)
    after = torch.compile(functools.partial(model.after, shape=shape), dynamic=False)
    model.before = lambda *tensors, shape, linear: before(*tensors)
    model.after = lambda *tensors, shape, linear: after(*tensors)
    return torch.compile(batch_loss, dynamic=False)


def choose_attention(model: Model) -> None:
    """Varlen flash attention if it works here and agrees with attention document by document; it is tried, once."""
    if not model.embedding.is_cuda:
        return
    from scripts.models.tiny_model import attend_each, attend_varlen, offsets

    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [300, 1, 700]
    starts, _ = offsets(lengths, model.embedding.device)
    heads = [model.shape.num_attention_heads, *[model.shape.num_key_value_heads] * 2]
    inputs = [
        torch.randn(1001, n, model.shape.head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for n in heads
    ]
    results: list[list[Any]] = []
    ways: list[Any] = [attend_each, attend_varlen]
    try:
        for attend in ways:
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = attend(*leaves, starts, lengths)
            (out.float() ** 2).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    except (RuntimeError, TypeError, AssertionError, ImportError) as error:
        print(f"attention: document by document, for varlen_attn does not do here: {error}", flush=True)
        model.attend = attend_each
        return
    print("attention: varlen flash", flush=True)


def save_state(path: Path, trainer: Trainer, schedule: dict[str, Any], log: list[Any]) -> None:
    tensors = {"master": trainer.master, "m": trainer.m, "v": trainer.v}
    state = {"step": trainer.step, "schedule": schedule, "log": log, "args": identity(trainer.args), **tensors}
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, part)
    part.replace(path)


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that a resumed run has to share."""
    names = ("seed", "batch_tokens", "ramp", "longest", "optimizer", "adam_rate", "muon_rate", "decay", "warmup")
    return {name: getattr(args, name) for name in names}


def train(args: argparse.Namespace, shape: Shape, data: Data, device: torch.device) -> tuple[Trainer, list[Any], bool]:
    """Trains until the schedule or the time ends; the trainer, the log, and whether the schedule has ended."""
    began = time.monotonic()
    source = batches(data, args, 0 if not args.resume else torch.load(args.state, map_location="cpu")["step"])
    pending = next(source)  # starts the processes, before CUDA
    print(f"first batch after {time.monotonic() - began:.1f} s: {len(pending.lengths)} documents", flush=True)
    torch.use_deterministic_algorithms(args.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    weights = read_checkpoint(args.init)[1] if args.init else initial(shape, args.seed)
    trainer = Trainer(shape, weights, device, args)
    schedule: dict[str, Any] = {"decay_from": None, "steps": args.steps}
    if args.steps:
        schedule["decay_from"] = args.decay_from if args.decay_from is not None else int(0.7 * args.steps)
    log: list[Any] = []
    if args.resume:
        state = torch.load(args.state, map_location=device, weights_only=True)
        if state["args"] != identity(args):
            raise SystemExit(
                f"{args.state} was trained with {state['args']}: give the same flags, not {identity(args)}"
            )
        for name in ("master", "m", "v"):
            getattr(trainer, name).copy_(state[name])
        trainer.flat.copy_(trainer.master)
        trainer.step, log = state["step"], state["log"]
        schedule = schedule if args.steps else state["schedule"]
        if not args.steps and schedule["steps"] and trainer.step >= schedule["steps"]:
            schedule = {"decay_from": None, "steps": None}  # a further stage: full rate again, then its own decay
    choose_attention(trainer.model)
    compute_loss = compile_pieces(trainer) if args.compile else batch_loss
    print(f"{trainer.master.numel() / 1e6:.2f}M parameters, from step {trainer.step}, {device}", flush=True)

    sums = torch.zeros(2, len(KINDS), device=device)
    budget, marks = args.minutes * 60, [(time.monotonic(), trainer.step)]
    last_save = time.monotonic()
    while schedule["steps"] is None or trainer.step < schedule["steps"]:
        batch, step = pending, trainer.step
        tokens, weight, kinds = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (batch.tokens, batch.weights, batch.kinds)
        )
        hidden = trainer.model.packed(tokens, batch.lengths)
        loss, by_kind = compute_loss(hidden, trainer.model.embedding, tokens.roll(-1), weight, kinds)
        loss.backward()
        sums += by_kind
        norm = trainer.update(rate_at(step, args.warmup, schedule["decay_from"], schedule["steps"]))
        pending = next(source)

        now = time.monotonic()
        ended = schedule["steps"] is not None and trainer.step >= schedule["steps"]
        if step in (0, 1, 2, 9) or trainer.step % LOG_EVERY == 0 or ended:
            found = (sums[0] / sums[1].clamp(min=1)).tolist()  # waits for the GPU
            sums.zero_()
            now = time.monotonic()
            marks = [*marks, (now, trainer.step)][-8:]
            speed = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
            row = {name: round(value, 4) for name, value in zip(KINDS, found, strict=True)}
            log.append({"step": trainer.step, "seconds": round(now - began, 1), **row})
            text = " ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(
                f"step {trainer.step:5d}  {now - began:6.1f} s  {speed * args.batch_tokens / 1e3:7.1f}k tok/s  "
                f"{limit_at(step, args.ramp, args.longest):4d}  norm {float(norm):6.2f}  {text}",
                flush=True,
            )
            if not math.isfinite(sum(found)):
                raise SystemExit(f"the loss is not finite at step {trainer.step}: lower the rates")
            spent = now - began
            if schedule["steps"] is None and not args.keep_rate and spent > 0.7 * budget and step > 9:
                left = max(LOG_EVERY, int((0.97 * budget - spent) * speed))
                schedule = {"decay_from": trainer.step, "steps": trainer.step + left}
                print(
                    f"the rate falls from here; to repeat: --steps {trainer.step + left} --decay-from {trainer.step}",
                    flush=True,
                )
        if now - began > budget and not ended:
            print(f"{args.minutes} minutes are over at step {trainer.step}: --resume goes on", flush=True)
            break
        if now - last_save > 120 and args.state:
            save_state(args.state, trainer, schedule, log)
            last_save = time.monotonic()
    source.close()  # type: ignore[attr-defined]
    if args.state:
        save_state(args.state, trainer, schedule, log)
    torch.use_deterministic_algorithms(False)
    done = schedule["steps"] is not None and trainer.step >= schedule["steps"]
    return trainer, [*log, {"schedule": schedule, **identity(args)}], done
