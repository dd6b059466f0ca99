"""The last layer behind its attention: only of the rows that somebody reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mixquant_sglang.kernels.limits import FEW_ROWS
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.layers.blocks import (
    attention_of,
    backbone,
    fusable_method,
    is_by_rows,
    is_decoder,
    is_mlp,
    model_family,
    norms,
)
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.fused import call_norm, plain_method
from mixquant_sglang.layers.outputs import ReadRows
from mixquant_sglang.layers.read_rows import ReadRowsProduct
from mixquant_sglang.passes.running import current, within
from mixquant_sglang.recipe.roles import Role
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
        read = current().read
        if read is None:
            return call_norm(self._forward, x, residual, post_residual_addition)
        if residual is None or post_residual_addition is not None:
            return call_norm(self._plain, x, residual, post_residual_addition)
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
        if read is None or post_residual_addition is not None:
            return super().__call__(x, residual, post_residual_addition)
        out = torch.zeros_like(x)
        if residual is None:
            part = read.gather(x)
            read.scatter(out, self._plain(part) if len(part) else part)
            return out
        y, _ = _add_norm(self._plain, x, residual, read)
        read.scatter(out, y)
        return out, residual


class WholeNorm(ReadRowsNorm):
    """Takes the place of the forward method of the norm before ``ReadRowsBlock``, which picks rows of BF16."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        forward = self._forward if current().read is None else self._plain
        return call_norm(forward, x, residual, post_residual_addition)


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


class ReadRowsBlock:
    """Takes the place of the ``forward`` of the last layer's MLP or experts: only of the rows that are read, of each
    matrix that it is given by position.

    These rows are protected all, or low save some; in the latter case they run twice, since they are few."""

    def __init__(self, block: Any) -> None:
        self._forward = block.forward

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        running = current()
        read, rows = running.read, running.rows
        if read is None:
            return self._forward(hidden_states, *args, **kwargs)
        out = torch.zeros_like(hidden_states)
        if not len(read.index):
            return out
        tokens = len(hidden_states)

        def picked(given: Any) -> Any:  # experts may write their result over what they are given
            if not isinstance(given, torch.Tensor) or given.shape[:1] != (tokens,):
                return given
            part = read.gather(given)
            if not part.is_cuda:
                return part
            # in blocks, so that SGLang's kernels for few rows, which it compiles by their number, are not asked
            more = -len(part) % FEW_ROWS
            return torch.cat([part, part.new_zeros(more, *part.shape[1:])]) if more else part

        def run(role: Role) -> torch.Tensor:
            one = replace(running, role=role, rows=None, read=None, queries=None)
            with within(one):
                result = self._forward(*map(picked, (hidden_states, *args)), **kwargs)
            assert isinstance(result, torch.Tensor), f"the last layer's block gave {type(result).__name__}"
            return result[: len(read.index)]

        if read is rows:
            result = run(Role.PROTECTED)
        else:
            result = run(running.role)
            if rows is not None:
                protected = rows.slots[read.index] >= 0
                result = torch.where(protected[:, None], run(Role.PROTECTED), result)
        read.scatter(out, result)
        return out


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
    family = model_family(model)
    if family is None or getattr(model, "capture_aux_hidden_states", False):
        return False
    body = backbone(model)
    layer = body.layers[-1]
    if not is_decoder(layer):
        return False
    blocks = [block for name in family.blocks if (block := getattr(layer, name, None)) is not None]
    if all(is_by_rows(block) for block in blocks):
        pruned = _prune_blocks(layer, blocks)
    else:
        pruned = all(is_mlp(block) for block in blocks) and _prune_mlp(layer)
    if not pruned:
        return False
    attention = attention_of(layer)
    o, qkv = fusable_method(attention.o_proj), fusable_method(attention.qkv_proj)
    if o:
        o.read_rows = ReadRowsProduct()
    body.norm._forward_method = ReadRowsFinalNorm(body.norm)
    if qkv and qkv.split_product:
        qkv.split_product.reads_only = True
    return True


def _low_experts(module: torch.nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    return isinstance(method, MixQuantExpertsMethod) and bool(method.low)


def _prune_mlp(layer: Any) -> bool:
    """Of a layer like Llama's: rows are picked out by the norm before the MLP, and put back behind it."""
    gate_up, down = fusable_method(layer.mlp.gate_up_proj), fusable_method(layer.mlp.down_proj)
    if not (gate_up or down or fusable_method(layer.self_attn.o_proj)):
        return False
    if gate_up:
        layer.post_attention_layernorm._forward_method = ReadRowsNorm(layer.post_attention_layernorm)
        gate_up.read_rows = ReadRowsProduct(hands_over=down is not None)
    if down:
        down.read_rows = ReadRowsProduct()
        layer.mlp.act_fn._forward_method = ReadRowsSiluAndMul(layer.mlp.act_fn)
    return True


def _prune_blocks(layer: Any, blocks: Sequence[Any]) -> bool:
    """Of any other layer: rows are picked out and put back around each of ``blocks``; norms and sums see all rows."""
    if not any(fusable_method(linear) or _low_experts(linear) for linear in layer.modules()):
        return False
    for norm, reader in norms(layer):
        if reader is not fusable_method(attention_of(layer).qkv_proj):
            norm._forward_method = WholeNorm(norm)
    for block in blocks:
        block.forward = ReadRowsBlock(block)
    return True
