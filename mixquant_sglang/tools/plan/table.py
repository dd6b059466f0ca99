"""Predictions as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.models import Model
from mixquant_sglang.tools.plan.predict import Prediction
from mixquant_sglang.tools.plan.workload import Workload


def as_json(predictions: Sequence[Prediction]) -> str:
    """One object, keyed by recipe."""
    made = {}
    for one in predictions:
        values = asdict(one)
        del values["recipe"], values["points"]
        values["prefill_parts"] = {name: round(ms, 4) for name, ms in one.prefill_parts.items()}
        made[one.recipe] = {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}
    return json.dumps(made)


def as_table(predictions: Sequence[Prediction], model: Model, gpu: Gpu, work: Workload) -> str:
    """For people; its last line says what the figures are worth."""
    head = (
        f"{model.name} on {'' if work.tp == 1 else f'{work.tp} x '}{gpu.name}: {work.batch} x {work.input_len} input "
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
    return "\n".join([*lines, "", f"Predictions, not measurements. {gpu.name}: {gpu.origin}."])
