"""Code of SGLang that multiplies by the BF16 weight of a linear itself, past its linear method.

It goes by the class of the method, ``UnquantizedLinearMethod``, which ours subclasses, or by the dtype of the weight,
and by a number of rows.  In passes that are BF16 for all rows that is what we want: decode stays SGLang's own, to the
bit.  In others it would leave out what the recipe asks for, and be handed activations that no such code takes.

    DualGemm.can_run (0.5.23)                    gate and up of Qwen2, Qwen3, Llama: SM100, up to 16 rows      hook
    linear_with_fused_a_gemm                     MLA's and Nemotron-H's first projections: SM90, up to 16 rows  hook
    Qwen3_5GatedDeltaNet._forward_input_proj     both input projections in one: up to 1024 rows (0.5.23)       here
    UnquantizedLinearMethod.apply_with_addend    Nemotron-H's latent projection (0.5.23)                       linear.py
    MiniMaxM3's fused qkv and index projections  the weights move to another module                            packed.py
"""

from __future__ import annotations

from typing import Any

import torch


def left_to_sglang(linear: Any, x: Any) -> bool:
    """Whether SGLang may multiply ``x`` by the BF16 weight of ``linear`` itself, in the running pass."""
    leaves = getattr(getattr(linear, "quant_method", None), "leaves_product_now", None)
    return isinstance(x, (torch.Tensor, tuple)) and (leaves is None or leaves())


class InputProjections:
    """Takes the place of a ``Qwen3_5GatedDeltaNet._forward_input_proj``: hides the weight of both in one."""

    def __init__(self, block: Any) -> None:
        self._block = block
        self._plain = block._forward_input_proj

    def __call__(self, hidden_states: Any) -> Any:
        block = self._block
        if all(left_to_sglang(linear, hidden_states) for linear in (block.in_proj_qkvz, block.in_proj_ba)):
            return self._plain(hidden_states)
        fused, block._fused_in_proj_weight = block._fused_in_proj_weight, None
        try:
            return self._plain(hidden_states)
        finally:
            block._fused_in_proj_weight = fused


def guard(model: torch.nn.Module) -> int:
    """Puts ``InputProjections`` where they are needed; call it once the weights are loaded.  Returns how many."""
    guarded = 0
    block: Any
    for block in model.modules():
        if getattr(block, "_fused_in_proj_weight", None) is None:
            continue
        methods = block.in_proj_qkvz.quant_method, block.in_proj_ba.quant_method
        if any(hasattr(method, "leaves_product_now") for method in methods):
            block._forward_input_proj = InputProjections(block)
            guarded += 1
    return guarded
