"""The last layer behind its attention: only of the rows that somebody reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.layers.blocks import fusable_method, is_decoder, is_mlp, is_model
from mixquant_sglang.layers.fused import plain_method
from mixquant_sglang.layers.outputs import ReadRows
from mixquant_sglang.layers.read_rows import ReadRowsProduct
from mixquant_sglang.passes.running import current
from mixquant_sglang.versions.dialect import dialect

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows


class ReadRowsNorm:
    """Takes the place of the forward method of the last layer's second norm: only of the rows that are read."""

    def __init__(self, norm: Any) -> None:
        self._forward = dialect().forward_method(norm)
        self._plain = plain_method(norm)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        extra = () if post_residual_addition is None else (post_residual_addition,)
        read = current().read
        if read is None:
            return self._forward(x, residual, *extra)
        if residual is None or extra:
            return self._plain(x, residual, *extra)
        y, added = _add_norm(self._plain, x, residual, read)
        read.scatter(residual, added)
        return ReadRows(y, len(x)), residual


class ReadRowsFinalNorm(ReadRowsNorm):
    """The same for the model's last norm.  Zeros in the other rows keep the discarded logits of middle chunks finite:
    what they hold before is anything."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        read = current().read
        if read is None or residual is None or post_residual_addition is not None:
            return super().__call__(x, residual, post_residual_addition)
        y, _ = _add_norm(self._plain, x, residual, read)
        out = torch.zeros_like(x)
        read.scatter(out, y)
        return out, residual


class ReadRowsSiluAndMul:
    """Takes the place of the last layer's SiluAndMul's forward method."""

    def __init__(self, act: Any) -> None:
        self._forward = dialect().forward_method(act)
        self._plain = plain_method(act)

    def __call__(self, gate_up: torch.Tensor | ReadRows) -> torch.Tensor | QuantizedActivations | ReadRows:
        read = current().read
        if read is None:
            return self._forward(gate_up)  # type: ignore[no-any-return]
        part = gate_up.part if isinstance(gate_up, ReadRows) else read.gather(gate_up)
        y = self._plain(part) if len(part) else part[:, : part.shape[1] // 2]
        return ReadRows(y, gate_up.shape[0])


def _add_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor, read: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = read.gather(x), read.gather(residual)
    return norm(x, residual) if len(x) else (x, residual)


def prune_last_layer(model: Any) -> bool:
    """Lets the last layer leave out rows whose results nobody reads; call it after ``fuse``.

    Of the last layer's result, SGLang reads the row of each request that it samples from; the other rows have done
    their work once their keys and values are written.  So all that is behind attention there computes the rows
    ``Pass.read`` alone, and the other rows' queries are zeros: attention gives some average of values for them, if it
    computes them at all (``attention.py``), and nobody looks.
    """
    if not is_model(model):
        return False
    layer = model.model.layers[-1]
    if not is_decoder(layer) or not is_mlp(layer.mlp) or getattr(model, "capture_aux_hidden_states", False):
        return False
    o, gate_up, down = (
        fusable_method(linear) for linear in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    )
    methods = [method for method in (o, gate_up, down) if method]
    if not methods:
        return False
    for method in methods:
        method.read_rows = ReadRowsProduct()
    if gate_up:
        layer.post_attention_layernorm._forward_method = ReadRowsNorm(layer.post_attention_layernorm)
        gate_up.read_rows = ReadRowsProduct(hands_over=down is not None)
    if down:
        layer.mlp.act_fn._forward_method = ReadRowsSiluAndMul(layer.mlp.act_fn)
    model.model.norm._forward_method = ReadRowsFinalNorm(model.model.norm)
    qkv = fusable_method(layer.self_attn.qkv_proj)
    if qkv and qkv.split_product:
        qkv.split_product.reads_only = True
    return True
