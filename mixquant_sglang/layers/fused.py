"""What prefill need not write, read or compute in blocks whose source we know.

Quantisation is fused into what comes before a linear: RMSNorm, residual add + RMSNorm, SiLU x up.

In Llama-like blocks the result of these has one reader, the next linear.  If that linear quantises its input anyway,
the BF16 matrix need not be written and read back: the norm or activation hands over ``QuantizedActivations`` instead.
This saves 4 of 11 bytes for each element of a norm with residual, 4 of 9 for each of an activation (FP8).

Only blocks whose source we know are fused (``BLOCKS``, exact types), and only where nothing about the norm is special.
Anything that would read the missing BF16 matrix gets an error, not garbage.  Decode, and passes that run whole in BF16,
call the very method that SGLang had installed.  What is replaced is one attribute of each norm and activation object,
``MultiPlatformOp._forward_method``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.outputs import ReadRows
from mixquant_sglang.passes.running import current
from mixquant_sglang.versions.attention import attends_whole, metadata_of_queries
from mixquant_sglang.versions.dialect import dialect

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows

logger = logging.getLogger(__name__)

# Decoder layers and MLPs whose forward passes were read: the norm's result goes to the linear alone.
BLOCKS = frozenset(
    {
        "sglang.srt.models.llama.LlamaDecoderLayer",
        "sglang.srt.models.qwen2.Qwen2DecoderLayer",
        "sglang.srt.models.qwen3.Qwen3DecoderLayer",
    }
)
MLPS = frozenset({"sglang.srt.models.llama.LlamaMLP", "sglang.srt.models.qwen2.Qwen2MLP"})
# Attentions that take the result of qkv_proj apart with ``split`` and do nothing else with it.
ATTENTIONS = frozenset(
    {
        "sglang.srt.models.llama.LlamaAttention",
        "sglang.srt.models.qwen2.Qwen2Attention",
        "sglang.srt.models.qwen3.Qwen3Attention",
    }
)
# Models whose logits come from ``logits_processor(norm(last layer))`` and nothing else.
MODELS = frozenset(
    {
        "sglang.srt.models.llama.LlamaForCausalLM",
        "sglang.srt.models.qwen2.Qwen2ForCausalLM",
        "sglang.srt.models.qwen3.Qwen3ForCausalLM",
    }
)


class FusedRMSNorm:
    """Takes the place of an RMSNorm's forward method."""

    def __init__(self, norm: Any, linear: MixQuantLinearMethod) -> None:
        self._norm = norm
        self.linear = linear
        self.plain = dialect().forward_method(norm)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        plain = not _rows(x) or post_residual_addition is not None or (residual is not None and not _rows(residual))
        fusable = None if plain else self.linear.fusable(x.shape[0])
        if fusable is None:
            # handed here by position or by name (versions/v0_5_*.py), taken by position in all
            extra = () if post_residual_addition is None else (post_residual_addition,)
            return self.plain(x, residual, *extra)
        fmt, rows = fusable
        if x.is_cuda:
            norm = self._norm
            y = operands.rmsnorm(x, norm.weight.data, norm.variance_epsilon, fmt, residual, rows)
            return y if residual is None else (y, residual)
        plain_y = self.plain(x, residual)
        if residual is None:
            return operands.quantize(plain_y, fmt, rows)
        return operands.quantize(plain_y[0], fmt, rows), plain_y[1]


class FusedSiluAndMul:
    """Takes the place of a SiluAndMul's forward method."""

    def __init__(self, act: Any, linear: MixQuantLinearMethod) -> None:
        self.linear = linear
        self.plain = dialect().forward_method(act)

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor | QuantizedActivations:
        fusable = self.linear.fusable(gate_up.shape[0]) if _rows(gate_up) else None
        if fusable is None:
            return self.plain(gate_up)  # type: ignore[no-any-return]
        fmt, rows = fusable
        if gate_up.is_cuda:
            return operands.silu_mul(gate_up, fmt, rows)
        return operands.quantize(self.plain(gate_up), fmt, rows)


class ReadRowsNorm:
    """Takes the place of the forward method of the last layer's second norm: only of the rows that are read."""

    def __init__(self, norm: Any) -> None:
        self._forward = dialect().forward_method(norm)
        self._plain = _plain_method(norm)

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
        self._plain = _plain_method(act)

    def __call__(self, gate_up: torch.Tensor | ReadRows) -> torch.Tensor | QuantizedActivations | ReadRows:
        read = current().read
        if read is None:
            return self._forward(gate_up)  # type: ignore[no-any-return]
        part = gate_up.part if isinstance(gate_up, ReadRows) else read.gather(gate_up)
        y = self._plain(part) if len(part) else part[:, : part.shape[1] // 2]
        return ReadRows(y, gate_up.shape[0])


class ExtendOfReadRows:
    """Takes the place of an attention back end's ``forward_extend``: in layer ``attention``, ``Pass.queries`` alone.

    Keys and values of all rows are written to the cache as ever.  It runs between the segments of captured graphs, or
    in no graph, with the rows of the pass; the rows of the result that nobody reads may hold anything.
    """

    def __init__(self, backend: Any, attention: Any) -> None:
        self._backend = backend
        self._attention = attention
        self._whole = backend.forward_extend
        self._ran = False

    def __call__(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Any:
        queries = current().queries if layer is self._attention and not more else None
        metadata = None
        if queries is not None and len(q) == queries.tokens:
            metadata = metadata_of_queries(self._backend, queries)
        if queries is None or metadata is None:
            return self._whole(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)
        backend, out = self._backend, forward_batch._attn_output
        whole_metadata = backend.forward_metadata
        # ``_attn_output``: [T, N], which SGLang has the kernel write to
        backend.forward_metadata, forward_batch._attn_output = metadata, None
        try:
            part = self._whole(
                q.index_select(0, queries.index), k, v, layer, forward_batch, save_kv_cache=save_kv_cache
            )
        finally:
            backend.forward_metadata, forward_batch._attn_output = whole_metadata, out
        out = part.new_empty(len(q), part.shape[1]) if out is None else out.view(len(q), part.shape[1])
        out.index_copy_(0, queries.index, part.to(out.dtype))
        if not self._ran:
            self._ran = True
            logger.info("mixquant: the last layer's attention ran for %d of %d rows", len(part), len(q))
        return out


def _add_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor, read: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = read.gather(x), read.gather(residual)
    return norm(x, residual) if len(x) else (x, residual)


def _plain_method(op: Any) -> Any:
    """What SGLang had installed: it takes and gives BF16."""
    method = dialect().forward_method(op)
    return method.plain if isinstance(method, (FusedRMSNorm, FusedSiluAndMul)) else method


def _rows(x: torch.Tensor) -> bool:
    """Whether it is what the fused kernels take: at least one token row, BF16, without gaps."""
    return x.ndim == 2 and x.shape[0] > 0 and x.dtype is torch.bfloat16 and x.is_contiguous()


def fuse(model: torch.nn.Module) -> Counter[str]:
    """Installs the fused forms; call it once, after the weights were packed.  Returns how many of each kind."""
    fused: Counter[str] = Counter()
    for layer in model.modules():
        if _name(layer) in BLOCKS:
            for norm, linear in _norms(layer):
                if _plain_rmsnorm(norm):
                    norm._forward_method = FusedRMSNorm(norm, linear)
                    fused["RMSNorm"] += 1
        elif _name(layer) in MLPS:
            act: Any = layer.act_fn
            method = _fusable_method(layer.down_proj)
            if method and type(act).__name__ == "SiluAndMul" and _is_default(act):
                act._forward_method = FusedSiluAndMul(act, method)
                fused["SiLU"] += 1
        elif _name(layer) in ATTENTIONS:
            method = _fusable_method(layer.qkv_proj)
            if method and method.set_apart(int(layer.q_size)):  # type: ignore[arg-type]
                fused["q projections"] += 1
    return fused


def prune_last_layer(model: Any) -> bool:
    """Lets the last layer leave out rows whose results nobody reads; call it after ``fuse``.

    Of the last layer's result, SGLang reads the row of each request that it samples from; the other rows have done
    their work once their keys and values are written.  So all that is behind attention there computes the rows
    ``Pass.read`` alone, and the other rows' queries are zeros: attention gives some average of values for them, if it
    computes them at all (``prune_last_attention``), and nobody looks.
    """
    if _name(model) not in MODELS:
        return False
    layer = model.model.layers[-1]
    if _name(layer) not in BLOCKS or _name(layer.mlp) not in MLPS or getattr(model, "capture_aux_hidden_states", False):
        return False
    o, gate_up, down = (
        _fusable_method(linear) for linear in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    )
    methods = [method for method in (o, gate_up, down) if method]
    if not methods:
        return False
    for method in methods:
        method.prunes = True
    if gate_up:
        layer.post_attention_layernorm._forward_method = ReadRowsNorm(layer.post_attention_layernorm)
        gate_up.hands_over = down is not None
    if down:
        layer.mlp.act_fn._forward_method = ReadRowsSiluAndMul(layer.mlp.act_fn)
    model.model.norm._forward_method = ReadRowsFinalNorm(model.model.norm)
    qkv = _fusable_method(layer.self_attn.qkv_proj)
    if qkv and qkv.apart:
        qkv.prunes_apart = True
    return True


def prune_last_attention(model: Any, backend: Any) -> str:
    """Lets the attention of a last layer that ``prune_last_layer`` took leave out queries of rows that nobody reads.

    Returns why it cannot, or nothing.
    """
    attention = model.model.layers[-1].self_attn
    o = _fusable_method(attention.o_proj)
    if _name(attention) not in ATTENTIONS or o is None or not o.prunes:
        return "what follows it reads all rows"
    reason = attends_whole(backend, attention.attn)
    if not reason:
        backend.forward_extend = ExtendOfReadRows(backend, attention.attn)
    return reason


def _name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _norms(layer: Any) -> Iterator[tuple[Any, MixQuantLinearMethod]]:
    pairs = [(layer.input_layernorm, layer.self_attn.qkv_proj)]
    if _name(layer.mlp) in MLPS:
        pairs.append((layer.post_attention_layernorm, layer.mlp.gate_up_proj))
    for norm, linear in pairs:
        method = _fusable_method(linear)
        if method:
            yield norm, method


def _fusable_method(linear: Any) -> MixQuantLinearMethod | None:
    method = getattr(linear, "quant_method", None)
    return method if isinstance(method, MixQuantLinearMethod) and method.activation_format else None


def _is_default(op: Any) -> bool:
    """Whether it runs what SGLang runs by default on CUDA and the CPU."""
    return getattr(dialect().forward_method(op), "__name__", "") in ("forward_cuda", "forward_native")


def _plain_rmsnorm(norm: Any) -> bool:
    """Whether SGLang runs it as its default RMSNorm kernel, whose numbers the fused one follows."""
    return (
        type(norm).__name__ == "RMSNorm"
        and _is_default(norm)
        and norm.has_weight
        and norm.weight.dtype is torch.bfloat16
        and not norm.cast_x_before_out_mul
        and not norm.fp32_residual
        and norm.override_orig_dtype is None
        and norm.variance_size_override is None
    )
