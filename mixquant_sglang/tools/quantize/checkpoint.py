"""A whole checkpoint in NVFP4: begun or gone on with, shard by shard, ``config.json`` last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from mixquant_sglang import __version__
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.tools.progress import Bar
from mixquant_sglang.tools.quantize import writer
from mixquant_sglang.tools.quantize.calibration import Inputs, measure_inputs, read_samples
from mixquant_sglang.tools.quantize.configs import modelopt_file, quantization_config
from mixquant_sglang.tools.quantize.progress import COLUMNS, PROGRESS, Progress, locked
from mixquant_sglang.tools.quantize.quantizer import Quantizer
from mixquant_sglang.tools.quantize.targets import Targets
from mixquant_sglang.tools.quantize.writer import publish
from mixquant_sglang.weights.checkpoint import INDEX, Source
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT, Layout

WEIGHTED = "weighted"
SCALES = (*nvfp4.SCALE_MODES, WEIGHTED)


def quantize_checkpoint(
    model: Path,
    out: Path,
    *,
    scales: str = "absmax",
    ignore: Sequence[str] = (),
    device: str = "cpu",
    calibration: Path | None = None,
    layout: Layout = COMPRESSED_TENSORS,
) -> Targets:
    """Writes ``out``, or finishes it; returns what was done. Holds one linear (of one expert), or two of a fused group,
    and the temporaries of ``nvfp4.quantize`` in memory; the whole model only while it calibrates."""
    if device == "cuda" and not torch.cuda.is_available():
        raise MixQuantError("--device cuda: this machine has no CUDA device that torch can use; use --device cpu")
    if scales == WEIGHTED and calibration is None:
        raise MixQuantError(
            "--scales weighted: columns count by their inputs, so it needs --calibration FILE.jsonl; "
            "or use --scales search"
        )
    if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
        raise MixQuantError(f"{out}: lies in MODEL; name a folder outside of {model}")
    if out.exists() and not out.is_dir():
        raise MixQuantError(f"{out}: is not a folder")
    source = Source.open(model)
    targets = Targets.of(source, ignore)
    samples = read_samples(calibration) if calibration else None
    weighted = scales == WEIGHTED
    settings = {
        "mixquant": __version__,
        "scales": scales,
        "layout": layout.name,
        "ignore": list(ignore),
        "calibration": hashlib.sha256(json.dumps(samples).encode()).hexdigest() if samples else None,
    }
    with locked(out):
        progress = Progress.of(out, settings, source)
        measured = progress.input_amax and (not weighted or (out / COLUMNS).exists())
        if samples and not measured:
            inputs = measure_inputs(source.folder, samples, targets.quantised, device)
            if weighted:
                publish(out / COLUMNS, [save(inputs.energy)])
            progress.input_amax = inputs.amax
            progress.save()
        inputs = Inputs(progress.input_amax, load_file(out / COLUMNS) if weighted else {})
        _write(Quantizer(source, targets, inputs, scales, device, layout), progress)
    return targets


def _write(quantizer: Quantizer, progress: Progress) -> None:
    out, source = progress.out, quantizer.source
    shapes = {shard: quantizer.shapes(shard) for shard in source.shards}
    total = sum(stored.nbytes for stored in source.tensors.values())
    with Bar(total=total, unit="B", unit_scale=True) as bar:
        for shard in source.shards:
            if shard in progress.finished:
                bar.update(sum(stored.nbytes for stored in source.tensors.values() if stored.shard == shard))
                continue
            bar.set_description(shard)
            writer.write_shard(out / shard, shapes[shard], quantizer.pieces(shard, bar.update))
            progress.finish(shard)
    for relative in source.small_files():
        publish(out / relative, [(source.folder / relative).read_bytes()])
    if source.sharded:
        size = sum((out / shard).stat().st_size for shard in source.shards)
        where = {name: shard for shard in source.shards for name in sorted(shapes[shard])}
        publish(out / INDEX, [_pretty({"metadata": {"total_size": size}, "weight_map": where})])
    quantization = quantization_config(quantizer.targets, quantizer.layout)
    if quantizer.layout is MODELOPT:
        publish(out / "hf_quant_config.json", [_pretty(modelopt_file(quantization))])
    publish(out / "config.json", [_pretty({**source.config, "quantization_config": quantization})])
    (out / COLUMNS).unlink(missing_ok=True)
    (out / PROGRESS).unlink()


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
