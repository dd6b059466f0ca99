"""Scales of quantised checkpoints: what they make of the largest codes has to be finite in BF16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixquant_sglang.weights.incoming import Known
from mixquant_sglang.weights.pieces import piece
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from tests.support.quantised_checkpoints import CONFIGS
from tests.unit.test_quantised import Q, quantised, save, weights

LARGEST = torch.finfo(torch.bfloat16).max
CPU = torch.device("cpu")
# kind -> (leaf that scales, largest number beside it, whether it is a reciprocal)
SCALES = {
    "fp8 rows": ("weight_scale", 448.0, False),
    "fp8 tensor": ("weight_scale", 448.0, False),
    "fp8 blocks": ("weight_scale_inv", 448.0, False),
    "nvfp4 modelopt": ("weight_scale_2", 6 * 448.0, False),
    "nvfp4 parts": ("weight_global_scale", 6 * 448.0, True),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("factor", "taken"), [(0.99, True), (1.01, False), (1e2, False)])
def test_weights_that_bf16_does_not_hold(kind: str, factor: float, taken: bool, tmp_path: Path) -> None:
    """At load as in an update; 1e36 as a scale of FP8 made infinite logits."""
    leaf, largest, inverse = SCALES[kind]
    made, _ = quantised(kind, {Q: weights()[Q]})
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", kind, made))
    name, kinds = f"{Q}.{leaf}", checkpoint.modules[Q]
    scale = LARGEST / largest * factor
    scales = made[name].float().clone()
    scales.view(-1)[-1] = 1 / scale if inverse else scale
    made[name] = scales
    codes = made[f"{Q}.{kinds.codes}"]
    codes.view(torch.uint8)[-1].fill_(0x77 if kinds.layout else 0x7E)
    if kinds.block_scales:
        made[f"{Q}.{kinds.block_scales}"].view(torch.uint8)[-1].fill_(0x7E)
    known = Known({n: (tuple(t.shape), t.dtype) for n, t in made.items()}, quantised=checkpoint)
    parts = {leaf: made[f"{Q}.{leaf}"] for leaf in kinds.leaves}
    assert (known.problem(name, made[name], CPU) is None) is taken
    if taken:
        assert piece(Q, kinds, parts).dequantize(torch.bfloat16).isfinite().all()
    else:
        assert "more than BF16 holds" in str(known.problem(name, made[name], CPU))
        with pytest.raises(ValueError, match="more than BF16 holds"):
            piece(Q, kinds, parts)
