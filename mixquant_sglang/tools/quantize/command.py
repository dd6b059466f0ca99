"""``mixquant quantize MODEL OUT``: a BF16 checkpoint becomes an NVFP4 one, as compressed-tensors writes it (W4A4).

Each linear of a transformer block, those of experts too (``experts.py``), gets ``weight_packed`` uint8 [N, K/2] and
``weight_scale`` float8_e4m3fn [N, K/16] of ``formats.nvfp4``, ``weight_global_scale`` and ``input_global_scale``
float32 [1]; everything else is copied byte by byte, shard by shard, under the same names. The values are those of
``NVFP4Tensor(weight_packed, weight_scale, 1/g)`` with g = ``weight_global_scale``: compressed-tensors 0.20 decompresses
to the same BF16 numbers, all of them.

``--layout modelopt`` writes the same numbers as ModelOpt does: ``weight`` uint8, ``weight_scale``, ``weight_scale_2`` =
1/g and ``input_scale``, without a dimension, and ``hf_quant_config.json``.

g is 448*6/max|w| in FP32, compressed-tensors' ``generate_gparam``; layers that an engine fuses into one GEMM (q, k, v;
gate and up, those of one expert too) share the maximum. compressed-tensors computes ``e2m1 * (scale / g)`` and we
``(e2m1 * scale) * (1/g)``; for one g in forty some number differs in BF16, and then g goes down by an ulp until none
does.

``input_global_scale`` is 448*6/max|input| with ``--calibration``, for all experts of a layer alike. Without, it is 1.0:
block scales then reach inputs up to 2688, are exact to E4M3 for blocks whose maximum is at least 0.094, and zero under
0.006. It is for other engines: mixquant scales each token by itself and does not read it.

``--scales weighted`` searches block scales (``formats.nvfp4``) with each column's errors weighted by the mean square of
that column's inputs in the calibration run: the squared error of the output, if inputs are uncorrelated. It exists here
alone: a server that packs at load has seen no input.

Kept as they are: embeddings, lm_head, norms, routers, kv_b_proj, vision and audio towers, draft layers, what
``--ignore`` names, linears whose K is no multiple of 16, and every name that ``targets.py`` does not know. Refused
(MixQuantError): quantised or integer checkpoints, NaN or infinity, ``--ignore`` that matches nothing or splits a group
or a layer's experts, and experts that cannot be written one by one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.quantize.checkpoint import SCALES, quantize_checkpoint
from mixquant_sglang.tools.quantize.progress import PROGRESS
from mixquant_sglang.tools.quantize.scales import WINDOW
from mixquant_sglang.weights.checkpoint import INDEX
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT

LAYOUTS = {"compressed-tensors": COMPRESSED_TENSORS, "modelopt": MODELOPT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mixquant quantize``."""
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
        "--layout",
        choices=LAYOUTS,
        default="compressed-tensors",
        help="whose names and config to write (default: compressed-tensors); the numbers are the same",
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
    """Writes the checkpoint and says what was kept as it is; returns 0, or 130 when interrupted."""
    again = "the same command goes on where it stopped"
    try:
        targets = quantize_checkpoint(
            args.model,
            args.out,
            scales=args.scales,
            ignore=args.ignore,
            device=args.device,
            calibration=args.calibration,
            layout=LAYOUTS[args.layout],
        )
    except KeyboardInterrupt:
        print(f"\nmixquant: interrupted; {again}", file=sys.stderr)
        return 130
    except OSError as error:
        begun = (args.out / PROGRESS).exists()
        raise MixQuantError(f"{error}; {again if begun else 'nothing was written yet'}") from error
    reasons: dict[str, list[str]] = {}
    for module, reason in targets.kept.items():
        reasons.setdefault(reason, []).append(module)
    for reason, modules in reasons.items():
        more = f" and {len(modules) - 4} more" if len(modules) > 4 else ""
        print(f"kept as it is ({reason}): {', '.join(modules[:4])}{more}")
    if targets.left_out:
        print(f"left out (not in {INDEX}): {', '.join(targets.left_out)}")
    experts = f" ({targets.experts} of experts)" if targets.experts else ""
    print(f"{args.out}: {len(targets.quantised)} linears{experts} in NVFP4, {args.scales} scales")
    return 0
