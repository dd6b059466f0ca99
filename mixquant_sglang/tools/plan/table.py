"""Predictions as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.memory import Memory
from mixquant_sglang.tools.plan.predict import Prediction
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder

Advice = Mapping[str, Mapping[int, int | None]]  # recipe -> what ``break_even`` answers, where prefill is low


def as_json(predictions: Sequence[Prediction], memories: Sequence[Memory], advice: Advice) -> str:
    """One object, keyed by recipe."""
    made = {}
    for one, memory in zip(predictions, memories, strict=True):
        values = asdict(one)
        del values["recipe"], values["points"]
        values["prefill_parts"] = {name: round(ms, 4) for name, ms in one.prefill_parts.items()}
        values = {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}
        made[one.recipe] = {**values, "memory": asdict(memory)}
        if one.recipe in advice:
            made[one.recipe]["faster_from_tokens"] = advice[one.recipe]
    return json.dumps(made)


def as_table(
    predictions: Sequence[Prediction],
    memories: Sequence[Memory],
    advice: Advice,
    model: Decoder,
    gpu: Gpu,
    work: Workload,
) -> str:
    """For people; its last line says what the figures are worth."""
    gpus = "" if work.tp == 1 else f"{work.tp} x "
    head = (
        f"{model.name} on {gpus}{gpu.name}: {work.batch} x {work.input_len} input "
        f"tokens ({work.cached} cached), {work.output_len} output tokens, "
        f"{work.chunk or gpu.chunk} tokens per prefill pass"
    )
    width = max(len("recipe"), *(len(one.recipe) for one in predictions))
    lines = [
        head,
        "",
        f"{'recipe':<{width}}  prefill ms  speed-up  decode ms/step  end to end  added weights  KV tokens displaced  "
        "runs as",
    ]
    for one in predictions:
        lines.append(
            f"{one.recipe:<{width}}  {one.prefill_ms:10.2f}  {one.prefill_speedup:7.2f}x  {one.decode_ms:14.2f}  "
            f"{one.end_to_end_speedup:9.2f}x  {one.extra_weight_bytes / 2**20:9.1f} MiB  "
            f"{one.kv_tokens_displaced:19d}  {one.describe}{'' if one.fits else '; DOES NOT FIT into the memory'}"
        )
    notes: dict[str, list[str]] = {}
    for one in predictions:
        for note in one.notes:
            notes.setdefault(note, []).append(one.recipe)
    if notes:
        lines += ["", *(f"{', '.join(recipes)}: {note}" for note, recipes in notes.items())]
    lines += [f"{one.recipe}: {name} stays BF16: {why}" for one in predictions for name, why in one.stays_bf16.items()]
    lines += ["", *_memory(predictions, memories, gpu, width)]
    if advice:
        lines += [
            "",
            "Tokens of a pass from which on it is faster than BF16, by prompts that end in it (min_tokens); below "
            "512 by the rates of 512:",
        ]
    for recipe, found in advice.items():
        each = (f"{prompts}: {'never' if tokens is None else tokens}" for prompts, tokens in found.items())
        lines.append(f"{recipe:<{width}}  {'; '.join(each)}")
    return "\n".join([*lines, "", *_worth(model, gpu, predictions)])


def _memory(predictions: Sequence[Prediction], memories: Sequence[Memory], gpu: Gpu, width: int) -> list[str]:
    first = memories[0]
    states = f", {first.request / 1e6:.1f} MB for each request's states" if first.request else ""
    lines = [
        f"Memory of one {gpu.name}: {first.gpu / 1e9:.0f} GB, of which {first.usable / 1e9:.1f} for weights and cache; "
        f"{first.kv_token / 1e3:.1f} kB for each token of context{states}. GB = 1e9 bytes.",
        "",
        f"{'recipe':<{width}}  BF16 GB  packed GB  needed GB  fits  KV tokens left  smallest --tp",
    ]
    for one, memory in zip(predictions, memories, strict=True):
        packed = sum(size for part, size in memory.parts.items() if part.startswith("packed"))
        fewest = "none" if memory.smallest_tp is None else str(memory.smallest_tp)
        lines.append(
            f"{one.recipe:<{width}}  {(memory.weights - packed) / 1e9:7.1f}  {packed / 1e9:9.1f}  "
            f"{memory.needed / 1e9:9.1f}  {'yes' if memory.fits else 'no':>4}  {max(0, memory.kv_tokens_left):14d}  "
            f"{fewest:>13}"
        )
    lacking = next((memory for memory in memories if not memory.fits), None)
    if lacking is not None:
        fit = dict.fromkeys(name for memory in memories for name in memory.would_fit)
        lines += ["", "Recipes that fit on as many GPUs: " + ("; ".join(fit) or "none")]
    return lines


def _worth(model: Decoder, gpu: Gpu, predictions: Sequence[Prediction]) -> list[str]:
    sources = {f"{name} {source}" for one in predictions for name, source in one.sources.items()}
    lines = [f"Grouped GEMMs of experts: {'; '.join(sorted(sources))}."] if sources else []
    if model.has_states:
        lines.append(
            "The gated delta rule: at a rate between those that passes in BF16 and in FP8 leave on an H200; decode "
            "steps of one request took twice what is predicted."
        )
    if model.unread:
        lines.append(f"Not counted: {', '.join(model.unread)}.")
    return [*lines, f"Predictions, not measurements. {gpu.name}: {gpu.origin}."]
