"""Which of SGLang's linears multiplies FP8 weights in blocks."""

from __future__ import annotations

import pytest

from mixquant_sglang.recipe.select import Device
from mixquant_sglang.versions.fp8_blocks import block_linear


@pytest.mark.parametrize(
    ("capability", "theirs"),
    [
        (None, "triton_w8a8_block_fp8_linear"),
        ((8, 9), "triton_w8a8_block_fp8_linear"),
        ((9, 0), "triton_w8a8_block_fp8_linear"),
        ((10, 0), "triton_w8a8_block_fp8_linear"),
        ((12, 0), "cutlass_w8a8_block_fp8_linear_with_fallback"),
    ],
)
def test_cutlass_is_for_the_gpus_that_sglang_has_it_for(capability: tuple[int, int] | None, theirs: str) -> None:
    """On others it raises at the first prefill."""
    from sglang.srt.layers.quantization import fp8_utils

    assert block_linear(Device("a GPU", capability))._linear is getattr(fp8_utils, theirs)
