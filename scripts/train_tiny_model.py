"""Train the small Qwen3 that quality is measured on: data made by code, torch and numpy alone, one GPU, minutes.

    scripts/train_tiny_model --prepare DATA                          where tokenizers and transformers are installed
    scripts/train_tiny_model DATA OUT --state FILE [--minutes 8]     on the GPU; writes a checkpoint, then measures it
    scripts/train_tiny_model DATA OUT --state FILE --resume          goes on where the state file ends
    scripts/train_tiny_model DATA OUT --init MODEL                   a further stage from a checkpoint, optimizer fresh
    scripts/train_tiny_model DATA MODEL --evaluate [--arms bf16 nvfp4 mixed]

A batch is a fixed number of tokens, packed documents of real text and of tasks (tiny_tasks.py), and a function of the
seed and the step alone. So a run that was cut short and resumed ends as one that was not. --steps fixes the schedule;
without it the learning rate starts to fall after 70 % of --minutes, and the line that says so names the flags that
repeat the run. Matrices inside the layers learn with Muon (Jordan et al. 2024: the momentum, orthogonalised by five
Newton-Schulz steps), the rest with Adam; masters are FP32, the model that is trained and saved is BF16.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch: cuBLAS is deterministic with it

import numpy as np
import torch
from tiny_model import (
    Linear,
    Model,
    Shape,
    Weights,
    generate,
    initial,
    plain,
    read_checkpoint,
    weight_shapes,
    write_checkpoint,
)
from tiny_tasks import LENGTHS, LEVELS, TASKS, correct, examples, segments, training_example
from tiny_text import END_OF_TEXT, IM_END, SPECIAL, Tokenizer, stdlib_files, usable_lines
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
VOCAB = Shape().vocab_size
KINDS = ("text", *TASKS)
SHARES = {"text": 0.3} | dict.fromkeys(TASKS, 0.14)  # of a batch's documents, and of its loss
LIMITS = ((0.1, 512), (0.25, 1024), (0.5, 2048), (1.0, 4096))  # until this part of the ramp: the longest prompt
LONGEST = 8192
LOG_EVERY = 50


# -- data --------------------------------------------------------------------------------------------------------------


def prepare(out: Path, vocab: int = VOCAB, most: int | None = None) -> None:
    """Tokenizer files, the corpus in tokens, and the lines that tasks quote. `most` cuts the text, for tests."""
    from make_tiny_model import CHAT_TEMPLATE
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    texts = {split: list(stdlib_files(split, most).values()) for split in ("train", "eval")}
    lines = usable_lines(texts["train"])
    shown = [training_example(task, random.Random(i), 1024, lines) for task in TASKS for i in range(20)]
    library = Library(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tasks = [text for example in shown for text, _ in segments(example)]
    for special in SPECIAL:
        tasks = [text.replace(special, "") for text in tasks]
    library.train_from_iterator(texts["train"] + tasks, trainer)
    if library.get_vocab_size() != vocab:
        raise SystemExit(f"the tokenizer learnt {library.get_vocab_size()} tokens, not {vocab}: too little text")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=Shape().max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(out / "tokenizer")
    # in tokenizer_config.json, where old and new readers look, and one file less
    template = out / "tokenizer" / "chat_template.jinja"
    template.unlink(missing_ok=True)
    config = out / "tokenizer" / "tokenizer_config.json"
    content = json.loads(config.read_text()) | {"chat_template": CHAT_TEMPLATE}
    config.write_text(json.dumps(content, indent=1) + "\n")

    ours = Tokenizer(out / "tokenizer" / "tokenizer.json")
    for split, files in texts.items():
        ids = [token for text in files for token in (*ours.encode(text), END_OF_TEXT)]
        np.savez_compressed(out / f"{split}.npz", tokens=np.array(ids, dtype=np.uint16))
        text = "\n".join(usable_lines(files)) + "\n"
        (out / f"{split}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{split}: {len(files)} files, {sum(map(len, files)) / 1e6:.1f} MB of text, {len(ids) / 1e6:.2f}M tokens")
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


@dataclass(frozen=True)
class Batch:
    tokens: np.ndarray[Any, Any]  # int64 [N]
    weights: np.ndarray[Any, Any]  # float32 [N]: of the loss at each place, which predicts the next token
    kinds: np.ndarray[Any, Any]  # int64 [N]: index into KINDS
    lengths: list[int]  # of the packed documents


class Data:
    """What --prepare wrote, and the batches made from it."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.tokenizer = Tokenizer(folder / "tokenizer" / "tokenizer.json")
        self.corpus = np.load(folder / f"{split}.npz")["tokens"]
        self.lines = gzip.decompress((folder / f"{split}.txt.gz").read_bytes()).decode().splitlines()

    def document(self, kind: str, rng: random.Random, length: int, most: int) -> tuple[list[int], list[bool]] | None:
        """Tokens of one document and which of them are learnt; None if it would have more than `most` tokens."""
        if kind == "text":
            start = rng.randrange(max(1, len(self.corpus) - length))
            tokens = self.corpus[start : start + length].tolist()
            return tokens, [True] * len(tokens)
        for _ in range(2):
            example = training_example(kind, rng, length, self.lines)
            tokens, learnt = list[int](), list[bool]()
            for text, learns in segments(example):
                ids = self.tokenizer.encode(text)
                tokens += ids
                learnt += [learns] * len(ids)
            if len(tokens) <= most:
                return tokens, learnt
        return None

    def batch(self, seed: int, step: int, size: int, limit: int) -> Batch:
        """`size` tokens of documents with prompts of at most `limit` tokens; text fills the rest."""
        rng = random.Random(f"{seed}/{step}")
        tokens, learnt, kinds, lengths = list[int](), list[bool](), list[int](), list[int]()
        while (room := size - len(tokens)) > 0:
            kind = rng.choices(KINDS, [SHARES[name] for name in KINDS])[0]
            length = max(160, int(limit * 2 ** -rng.uniform(0, 4)))
            made = self.document(kind, rng, length, min(room, limit + limit // 2)) if room > length else None
            if made is None:
                kind, made = "text", self.document("text", rng, min(room, length), room)
            assert made
            tokens += made[0]
            learnt += [*made[1][1:], False]
            kinds += [KINDS.index(kind)] * len(made[0])
            lengths.append(len(made[0]))
        kind_of, learns = np.array(kinds), np.array(learnt)
        counts = np.bincount(kind_of[learns], minlength=len(KINDS))
        share = np.array([SHARES[name] for name in KINDS]) / np.maximum(counts, 1)
        weights = np.where(learns, share[kind_of], 0).astype(np.float32)
        return Batch(np.array(tokens, dtype=np.int64), weights, kind_of, lengths)


def limit_at(step: int, ramp: int, longest: int) -> int:
    """The longest prompt at a step: short contexts first, the look-up is learnt there many times faster."""
    return min(longest, next((size for part, size in LIMITS if step < part * ramp), longest))


_worker_data: Data


def _work(job: tuple[int, int, int, int]) -> Batch:
    return _worker_data.batch(*job)


def batches(data: Data, args: argparse.Namespace, first: int) -> Iterator[Batch]:
    """The batches from step `first` on, made ahead by processes that never touch the GPU."""
    global _worker_data
    jobs = (
        (args.seed, step, args.batch_tokens, limit_at(step, args.ramp, args.longest)) for step in itertools.count(first)
    )
    if args.workers == 0:
        yield from (data.batch(*job) for job in jobs)
        return
    _worker_data = data
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        waiting = [pool.apply_async(_work, (job,)) for job in itertools.islice(jobs, 3 * args.workers)]
        for job in jobs:
            yield waiting.pop(0).get()
            waiting.append(pool.apply_async(_work, (job,)))


# -- optimizer ---------------------------------------------------------------------------------------------------------


def orthogonalised(matrices: Tensor) -> Tensor:
    """[B, rows, columns] to matrices of the same singular directions with singular values near 1 (Muon's quintic)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


class Trainer:
    """Flat FP32 masters and moments, flat weights and gradients of the training dtype, and the step that joins them."""

    def __init__(self, shape: Shape, weights: Weights, device: torch.device, args: argparse.Namespace) -> None:
        self.shape, self.args, self.step = shape, args, 0
        names = weight_shapes(shape)
        self.master = torch.cat([weights[name].float().flatten() for name in names]).to(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.flat = self.master.to(self.dtype)
        self.grad, self.m, self.v = (torch.zeros_like(t) for t in (self.flat, self.master, self.master))
        self.model = Model(shape, self._views(self.flat, leaves=True))
        self.muon: list[tuple[int, int, tuple[int, ...], list[int]]] = []  # from, to, [layers, rows, columns], pieces
        at = 0
        for kind, group in itertools.groupby(names.items(), key=lambda item: item[0].partition("layers.")[2][1:]):
            sizes = [size for _, size in group]
            end = at + sum(math.prod(size) for size in sizes)
            if len(sizes[0]) == 2 and "embed" not in kind and kind:
                pieces = [shape.q_size, shape.kv_size, shape.kv_size] if "qkv" in kind else [sizes[0][0]]
                pieces = [shape.intermediate_size] * 2 if "gate_up" in kind else pieces
                self.muon.append((at, end, (len(sizes), *sizes[0]), pieces))
            at = end
        self.adam_from = 0 if args.optimizer == "adamw" else max(end for _, end, _, _ in self.muon)

    def _views(self, flat: Tensor, leaves: bool = False) -> Weights:
        views, at = {}, 0
        for name, size in weight_shapes(self.shape).items():
            end = at + math.prod(size)
            views[name] = flat[at:end].view(size)
            if leaves:
                views[name] = views[name].detach().requires_grad_()
                views[name].grad = self.grad[at:end].view(size)
            at = end
        return views

    def bf16_weights(self) -> Weights:
        return {name: view.bfloat16() for name, view in self._views(self.master).items()}

    def update(self, rate: float) -> Tensor:
        """One step at `rate` (0 to 1) of the learning rates; the gradient's norm before clipping."""
        args, grad = self.args, self.grad.float()
        norm = torch.linalg.vector_norm(grad)
        grad *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
        if args.optimizer == "muon":
            for low, high, size, pieces in self.muon:
                self.m[low:high].lerp_(grad[low:high], 0.05)
                direction = grad[low:high].lerp(self.m[low:high], 0.95).view(size)  # Nesterov
                parts = [orthogonalised(part) * max(1, part.shape[1] / part.shape[2]) ** 0.5
                         for part in direction.split(pieces, dim=1)]  # fmt: skip
                master = self.master[low:high]
                master.mul_(1 - rate * args.muon_rate * args.decay)
                master.sub_(torch.cat(parts, dim=1).flatten(), alpha=rate * args.muon_rate)
        rest = slice(self.adam_from, None)
        self.m[rest].lerp_(grad[rest], 0.1)
        self.v[rest].lerp_(grad[rest].square(), 0.05)
        first, second = 1 - 0.9 ** (self.step + 1), 1 - 0.95 ** (self.step + 1)
        direction = self.m[rest] / first / ((self.v[rest] / second).sqrt() + 1e-8)
        if args.optimizer == "adamw":
            matrices = self.master[: self.muon[-1][1]]
            matrices.mul_(1 - rate * args.adam_rate * args.decay)
        self.master[rest].sub_(direction, alpha=rate * args.adam_rate)
        self.flat.copy_(self.master)
        self.grad.zero_()
        self.step += 1
        return norm


# -- training ----------------------------------------------------------------------------------------------------------


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
    from tiny_model import attend_each, attend_varlen, offsets

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


# -- evaluation --------------------------------------------------------------------------------------------------------


def nvfp4_linear(weights: Weights) -> Linear:
    """The package's NVFP4 numbers (formats/nvfp4.py) for weights and activations, for the linears of the layers."""
    spec = importlib.util.spec_from_file_location("nvfp4", ROOT / "mixquant_sglang" / "formats" / "nvfp4.py")
    assert spec and spec.loader
    nvfp4 = sys.modules["nvfp4"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nvfp4)
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


# -- command -----------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="what --prepare wrote")
    parser.add_argument("out", type=Path, nargs="?", help="the checkpoint's folder")
    parser.add_argument("--prepare", type=Path, metavar="DATA", help="write the data folder and end")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in OUT and end")
    parser.add_argument("--state", type=Path, help="file for optimizer and step, about 130 MB; saved every 2 minutes")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--init", type=Path, help="start from a checkpoint's weights")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the whole schedule (default: what fits into --minutes)")
    parser.add_argument("--decay-from", type=int, help="step where the rate starts to fall (default: 0.7 of --steps)")
    parser.add_argument("--keep-rate", action="store_true", help="no decay: a later stage follows")
    parser.add_argument("--seed", type=int, default=20260117)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--longest", type=int, default=LONGEST, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--ramp", type=int, default=1500, help="steps until prompts have full length")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay of the matrices")
    parser.add_argument("--workers", type=int, default=max(0, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--compile", action="store_true", help="torch.compile of the parts around attention")
    parser.add_argument("--nondeterministic", dest="deterministic", action="store_false")
    parser.add_argument("--arms", nargs="+", choices=("bf16", "nvfp4", "mixed"), default=["bf16"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--levels", nargs="+", type=int, choices=range(3), default=[1, 0, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[LENGTHS[0], LENGTHS[2]])
    parser.add_argument("--n", type=int, default=128, help="problems of each row")
    parser.add_argument("--shape", default="{}", help="JSON over the model's dimensions, for tests")
    args = parser.parse_args(argv)
    if not args.prepare and not (args.data and args.out):
        parser.error("DATA and OUT are needed, or --prepare DATA")
    if args.resume and not (args.state and args.state.is_file()):
        parser.error(f"--resume needs the file of an earlier run as --state; got {args.state}")
    assert all(len(levels) == 3 for levels in LEVELS.values())
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.prepare:
        prepare(args.prepare)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.evaluate:
        shape, weights = read_checkpoint(args.out)
        rows = evaluate(args, shape, weights, device)
        print(json.dumps(rows))
        return 0
    shape = Shape(**json.loads(args.shape))
    trainer, log, done = train(args, shape, Data(args.data), device)
    weights = trainer.bf16_weights()
    write_checkpoint(args.out, shape, weights, END_OF_TEXT, IM_END)
    for file in (args.data / "tokenizer").iterdir():
        (args.out / file.name).write_bytes(file.read_bytes())
    (args.out / "training.json").write_text(json.dumps(log) + "\n")
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB", flush=True)
    if args.n:
        rows = evaluate(args, shape, weights, device)
        (args.out / "training.json").write_text(json.dumps([*log, *rows]) + "\n")
    return 0 if done or args.keep_rate else 3


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the worker processes too
    sys.exit(main())
