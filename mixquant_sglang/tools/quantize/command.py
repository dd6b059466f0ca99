"""``mixquant quantize MODEL OUT``: a BF16 checkpoint becomes an NVFP4 one, as compressed-tensors writes it (W4A4).

Each linear of a transformer block gets ``weight_packed`` uint8 [N, K/2] and ``weight_scale`` float8_e4m3fn [N, K/16]
of ``formats.nvfp4``, ``weight_global_scale`` and ``input_global_scale`` float32 [1]; everything else is copied byte by
byte, shard by shard, under the same names. The values are those of ``NVFP4Tensor(weight_packed, weight_scale, 1/g)``
with g = ``weight_global_scale``: compressed-tensors 0.20 decompresses to the same BF16 numbers, all of them.

g is 448*6/max|w| in FP32, compressed-tensors' ``generate_gparam``; layers that an engine fuses into one GEMM (q, k, v;
gate, up) share the maximum. compressed-tensors computes ``e2m1 * (scale / g)`` and we ``(e2m1 * scale) * (1/g)``; for
one g in forty some number differs in BF16, and then g goes down by an ulp until none does.

``input_global_scale`` is 448*6/max|input| with ``--calibration``. Without, it is 1.0: block scales then reach inputs up
to 2688, are exact to E4M3 for blocks whose maximum is at least 0.094, and zero under 0.006. It is for other engines:
mixquant scales each token by itself and does not read it.

``--scales weighted`` searches block scales (``formats.nvfp4``) with each column's errors weighted by the mean square of
that column's inputs in the calibration run: the squared error of the output, if inputs are uncorrelated. It exists here
alone: a server that packs at load has seen no input.

Kept as they are: embeddings, lm_head, norms, routers, kv_b_proj, vision and audio towers, draft layers, what
``--ignore`` names, linears whose K is no multiple of 16, and every name that is not in ``LINEARS``. Refused
(MixQuantError): quantised or integer checkpoints, NaN or infinity, ``--ignore`` that matches nothing or splits a group.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tqdm import tqdm  # type: ignore[import-untyped]

from mixquant_sglang import __version__
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK, nvfp4
from mixquant_sglang.formats.blocks import E2M1_MAX, E4M3_MAX
from mixquant_sglang.kernels.packing import quantize_nvfp4
from mixquant_sglang.recipe import REGEX, did_you_mean, nearest, show
from mixquant_sglang.recipe.modules import why_bf16
from mixquant_sglang.tools.quantize.calibration import Inputs, measure_inputs, read_samples
from mixquant_sglang.weights import checkpoint
from mixquant_sglang.weights.checkpoint import DTYPES, Bytes, Progress, Source

LINEARS = re.compile(r"(?:[qkvo]|qkv|q_[ab]|out|gate|up|gate_up|down)_proj|kv_a_proj_with_mqa|w[123]")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
WINDOW = 1.0
WEIGHTED = "weighted"
SCALES = (*nvfp4.SCALE_MODES, WEIGHTED)

_WEIGHT = ".weight"
_QUANTISED = re.compile(
    r".*\.(weight_(packed|scale|scale_inv|scale_2|global_scale)|input_(global_)?scale|qweight|qzeros|weight\.absmax)$"
)


@dataclass(frozen=True)
class Plan:
    """What becomes of each linear. ``quantised``: module -> the modules with which it shares its scales, itself among
    them; ``kept``: other modules with a matrix for a weight -> why they stay as they are."""

    quantised: dict[str, tuple[str, ...]]
    kept: dict[str, str]
    left_out: tuple[str, ...] = ()  # safetensors of the folder that are not the checkpoint's

    @classmethod
    def of(cls, source: Source, ignore: Sequence[str]) -> Plan:
        config = _language_config(source)
        # null and {} say that nothing is quantised
        if any(each.get("quantization_config") or each.get("compression_config") for each in (source.config, config)):
            raise MixQuantError(f"{source.folder}: is quantised already (quantization_config); give its BF16 original")
        if (source.folder / "hf_quant_config.json").exists():
            raise MixQuantError(f"{source.folder}: is quantised already (hf_quant_config.json); give its BF16 original")
        if scale := next((name for name in source.tensors if _QUANTISED.match(name)), None):
            raise MixQuantError(f"{source.folder}: is quantised already ({scale}); give its BF16 original")
        shapes = {
            name.removesuffix(_WEIGHT): stored.shape
            for name, stored in source.tensors.items()
            if name.endswith(_WEIGHT) and len(stored.shape) == 2
        }
        # experts in one tensor: no linear for us, but an engine has to hear that they are not quantised
        packed = {name.rpartition(".")[0] for name, stored in source.tensors.items() if len(stored.shape) == 3}
        ignored = _ignored([*shapes, "lm_head"], ignore)
        layers = config.get("num_hidden_layers", 1 << 30)
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            at = f"{source.folder / 'config.json'}: num_hidden_layers"
            raise MixQuantError(f"{at} is {show(json.dumps(layers))}; allowed: an integer of at least 1")
        quantised, kept = [], dict.fromkeys(sorted(p for p in packed if p.endswith("experts")), "experts in one tensor")
        for module, (_, k) in shapes.items():
            if not _is_linear(module, layers):
                kept[module] = "never quantised"
            elif module in ignored:
                kept[module] = f"--ignore {ignored[module]}"
            elif k % BLOCK or not k:
                kept[module] = f"K = {k} is not a multiple of {BLOCK}"
            else:
                quantised.append(module)
        if not quantised:
            raise MixQuantError(f"{source.folder}: has no linear to quantise among {len(shapes)} matrices")
        for module in quantised:
            if (dtype := source.tensors[module + _WEIGHT].dtype) not in DTYPES:
                raise MixQuantError(f"{source.folder}: {module}{_WEIGHT} is {dtype}; allowed: {', '.join(DTYPES)}")
        groups = {module: _group(module, shapes, kept) for module in quantised}
        return cls(groups, kept, source.others)


def _language_config(source: Source) -> dict[str, Any]:
    """That of the language model in a model of several modalities; a null one counts as none."""
    config = source.config.get("text_config")
    if config is None:
        return source.config
    if not isinstance(config, dict):
        raise MixQuantError(f"{source.folder / 'config.json'}: text_config has to be a JSON object")
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder with a BF16 checkpoint in safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; an interrupted one is finished")
    parser.add_argument(
        "--scales",
        choices=SCALES,
        default="absmax",
        help="block scales: from the largest weight (absmax, the default), by least squared error (search), or by "
        "least squared error with columns weighted by their inputs' mean square (weighted; needs --calibration)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"text": ...} or {"messages": [...]}: runs the whole model over them (transformers) for its '
        f"input scales (without: {WINDOW}; mixquant itself does not need them) and for --scales weighted",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="modules to leave as they are: names, or re:REGEX",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")


def run(args: argparse.Namespace) -> int:
    again = "the same command goes on where it stopped"
    try:
        plan = quantize_checkpoint(
            args.model,
            args.out,
            scales=args.scales,
            ignore=args.ignore,
            device=args.device,
            calibration=args.calibration,
        )
    except KeyboardInterrupt:
        print(f"\nmixquant: interrupted; {again}", file=sys.stderr)
        return 130
    except OSError as error:
        raise MixQuantError(f"{error}; {again}") from error
    reasons: dict[str, list[str]] = {}
    for module, reason in plan.kept.items():
        reasons.setdefault(reason, []).append(module)
    for reason, modules in reasons.items():
        more = f" and {len(modules) - 4} more" if len(modules) > 4 else ""
        print(f"kept as it is ({reason}): {', '.join(modules[:4])}{more}")
    if plan.left_out:
        print(f"left out (not in {checkpoint.INDEX}): {', '.join(plan.left_out)}")
    print(f"{args.out}: {len(plan.quantised)} linears in NVFP4, {args.scales} scales")
    return 0


def quantize_checkpoint(
    model: Path,
    out: Path,
    *,
    scales: str = "absmax",
    ignore: Sequence[str] = (),
    device: str = "cpu",
    calibration: Path | None = None,
) -> Plan:
    """Writes ``out``, or finishes it; returns what was done. Holds one linear, or two of a fused group, and the
    temporaries of ``nvfp4.quantize`` in memory; the whole model only while it calibrates."""
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
    plan = Plan.of(source, ignore)
    samples = read_samples(calibration) if calibration else None
    weighted = scales == WEIGHTED
    settings = {
        "mixquant": __version__,
        "scales": scales,
        "ignore": list(ignore),
        "calibration": hashlib.sha256(json.dumps(samples).encode()).hexdigest() if samples else None,
    }
    with checkpoint.locked(out):
        progress = Progress.of(out, settings, source)
        measured = progress.input_amax and (not weighted or (out / checkpoint.COLUMNS).exists())
        if samples and not measured:
            inputs = measure_inputs(source.folder, samples, plan.quantised, device)
            if weighted:
                checkpoint.publish(out / checkpoint.COLUMNS, [save(inputs.energy)])
            progress.input_amax = inputs.amax
            progress.save()
        inputs = Inputs(progress.input_amax, load_file(out / checkpoint.COLUMNS) if weighted else {})
        _write(source, plan, progress, inputs, scales, device)
    return plan


def encode_scale(amax: float) -> torch.Tensor:
    """``weight_global_scale`` float32 [1] for a weight, or a fused group, of largest magnitude ``amax``; see the
    top."""
    g = _full_range(amax) if amax else torch.ones(1)
    while not _reads_alike(g):
        g = torch.nextafter(g, torch.zeros(1))
    return g


def _reads_alike(g: torch.Tensor) -> bool:
    """Whether every product of an element and a block scale decompresses to the same BF16 number in either order."""
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    ours = nvfp4.NVFP4Tensor(packed.expand(127, 8), scales, g.reciprocal()[0]).dequantize()
    one = torch.ones((1, 1)).to(torch.float8_e4m3fn)
    elements = nvfp4.NVFP4Tensor(packed, one, torch.ones(())).unscaled(torch.float32)
    return torch.equal(ours, (elements * (scales.float() / g)).bfloat16())


def _is_linear(module: str, layers: int) -> bool:
    block = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
    leaf = module.rpartition(".")[2]
    draft = "mtp" in module.split(".")
    own = block and int(block[1]) < layers and not draft and why_bf16(module) is None
    return bool(own and LINEARS.fullmatch(leaf))


def _ignored(modules: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    """Module -> the first pattern that matches it; ``re:`` matches from the start, as in compressed-tensors."""
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            regex = re.compile(pattern.removeprefix(REGEX)) if pattern.startswith(REGEX) else None
        except re.error as error:
            raise MixQuantError(f"--ignore {show(pattern)}: is no regular expression: {error}") from None
        matching = [module for module in modules if (regex.match(module) if regex else module == pattern)]
        if not matching:
            hint = did_you_mean(nearest(pattern.removeprefix(REGEX), modules))
            raise MixQuantError(f"--ignore {show(pattern)}: matches no module with a matrix{hint}")
        found = dict.fromkeys(matching, pattern) | found
    return found


def _group(module: str, shapes: Collection[str], kept: dict[str, str]) -> tuple[str, ...]:
    """The members that exist of the fused layer to which ``module`` belongs; MixQuantError if some are kept."""
    parent, dot, leaf = module.rpartition(".")
    leaves = next((group for group in FUSED if leaf in group), (leaf,))
    members = tuple(name for name in (f"{parent}{dot}{other}" for other in leaves) if name in shapes)
    for member in members:
        if member in kept:
            raise MixQuantError(
                f"{module} and {member} are one fused layer in an engine, but only {member} would stay BF16 "
                f"({kept[member]}); ignore all of {', '.join(members)}, or none"
            )
    return members


def _write(source: Source, plan: Plan, progress: Progress, inputs: Inputs, scales: str, device: str) -> None:
    out = progress.out
    shapes = {shard: dict(_shapes(source, plan, shard)) for shard in source.shards}
    weights: dict[tuple[str, ...], torch.Tensor] = {}
    total = sum(stored.nbytes for stored in source.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for shard in source.shards:
            if shard in progress.finished:
                bar.update(sum(stored.nbytes for stored in source.tensors.values() if stored.shard == shard))
                continue
            pieces = _pieces(source, plan, shard, weights, inputs, scales, device, bar.update)
            bar.set_description(shard)
            checkpoint.write_shard(out / shard, shapes[shard], pieces)
            progress.finish(shard)
    for relative in source.small_files():
        checkpoint.publish(out / relative, [(source.folder / relative).read_bytes()])
    if source.sharded:
        size = sum((out / shard).stat().st_size for shard in source.shards)
        where = {name: shard for shard in source.shards for name in sorted(shapes[shard])}
        checkpoint.publish(out / checkpoint.INDEX, [_pretty({"metadata": {"total_size": size}, "weight_map": where})])
    config = {**source.config, "quantization_config": _quantization_config(plan)}
    checkpoint.publish(out / "config.json", [_pretty(config)])
    (out / checkpoint.COLUMNS).unlink(missing_ok=True)
    (out / checkpoint.PROGRESS).unlink()


def _shapes(source: Source, plan: Plan, shard: str) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, stored in source.tensors.items():
        module = name.removesuffix(_WEIGHT)
        if stored.shard == shard and module in plan.quantised and name.endswith(_WEIGHT):
            n, k = stored.shape
            yield f"{module}.weight_packed", ("U8", (n, k // 2))
            yield f"{module}.weight_scale", ("F8_E4M3", (n, k // BLOCK))
            yield f"{module}.weight_global_scale", ("F32", (1,))
            yield f"{module}.input_global_scale", ("F32", (1,))
        elif stored.shard == shard:
            yield name, (stored.dtype, stored.shape)


def _pieces(
    source: Source,
    plan: Plan,
    shard: str,
    weights: dict[tuple[str, ...], torch.Tensor],
    inputs: Inputs,
    scales: str,
    device: str,
    tick: Callable[[int], object],
) -> Iterator[tuple[str, Bytes]]:
    """The bytes of one shard of the result; ``weights`` remembers the global scales of groups across shards."""
    for name, stored in source.tensors.items():
        if stored.shard != shard:
            continue
        module = name.removesuffix(_WEIGHT)
        if module in plan.quantised and name.endswith(_WEIGHT):
            group = plan.quantised[module]
            weight = source.read(name).to(device)
            if group not in weights:
                others = (member + _WEIGHT for member in group if member != module)
                amax = max((_amax(source, other, source.read(other).to(device)) for other in others), default=0.0)
                weights[group] = encode_scale(max(amax, _amax(source, name, weight)))
            quantised = quantize_nvfp4(
                weight,
                scales="absmax" if scales == "absmax" else "search",
                tensor_scale=weights[group].reciprocal()[0],
                column_weights=inputs.energy.get(module),
            )
            yield f"{module}.weight_packed", checkpoint.bytes_of(quantised.packed)
            yield f"{module}.weight_scale", checkpoint.bytes_of(quantised.block_scales)
            yield f"{module}.weight_global_scale", checkpoint.bytes_of(weights[group])
            yield f"{module}.input_global_scale", checkpoint.bytes_of(_input_scale(inputs.amax.get(module)))
            del weight, quantised
        else:
            for chunk in source.chunks(name):
                if stored.dtype in DTYPES:
                    _amax(source, name, torch.frombuffer(chunk, dtype=DTYPES[stored.dtype]))
                yield name, chunk
        tick(stored.nbytes)


def _amax(source: Source, name: str, x: torch.Tensor) -> float:
    if not x.numel():
        return 0.0
    low, high = (float(bound) for bound in torch.aminmax(x))  # they propagate NaN
    if not max(abs(low), abs(high)) < float("inf"):
        file = source.folder / source.tensors[name].shard
        raise MixQuantError(f"{file}: {name} contains NaN or infinity; check the checkpoint, or download it again")
    return max(abs(low), abs(high))


def _input_scale(amax: float | None) -> torch.Tensor:
    return _full_range(amax) if amax else torch.full((1,), WINDOW)


def _full_range(amax: float) -> torch.Tensor:
    return (E4M3_MAX * E2M1_MAX / torch.tensor([amax], dtype=torch.float32)).clamp_(max=2.0**126)


def _quantization_config(plan: Plan) -> dict[str, Any]:
    """As llm-compressor's scheme NVFP4, in the keys that each compressed-tensors since 0.10 reads."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK,
        "symmetric": True,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {**weights, "dynamic": "local"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        # a tied lm_head is a Linear without a tensor of its own; embeddings are none
        "ignore": list(dict.fromkeys(["lm_head", *(name for name in plan.kept if "embed" not in name)])),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
