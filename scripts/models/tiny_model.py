"""The tiny model in plain PyTorch: Qwen3's forward pass over packed documents and greedy generation.

Tokens of several documents lie one after the other; ``starts`` (their offsets, the end included) keeps attention within
a document. Weights are a dict by the names of a Qwen3 checkpoint, with q/k/v and gate/up of a layer each fused into one
matrix. Every linear goes through a function ``linear(x, weight)``, so that an evaluation can put a low-precision one
in its place. The embedding is the output head too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Qwen3's dimensions; every linear's K is a multiple of 64."""

    vocab_size: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The fused weights; matrices of one kind follow each other, the ones that are no hidden matrix come last."""
    h, layers = shape.hidden_size, range(shape.num_hidden_layers)
    kinds = {
        "self_attn.qkv_proj": (shape.q_size + 2 * shape.kv_size, h),
        "self_attn.o_proj": (h, shape.q_size),
        "mlp.gate_up_proj": (2 * shape.intermediate_size, h),
        "mlp.down_proj": (h, shape.intermediate_size),
    }
    norms = {"input_layernorm": h, "post_attention_layernorm": h}
    norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, size in kinds.items():
        shapes |= {f"model.layers.{i}.{kind}.weight": size for i in layers}
    shapes["model.embed_tokens.weight"] = (shape.vocab_size, h)
    for i in layers:
        shapes |= {f"model.layers.{i}.{norm}.weight": (width,) for norm, width in norms.items()}
    return shapes | {"model.norm.weight": (h,)}


def initial(shape: Shape, seed: int) -> Weights:
    """FP32 on the CPU; matrices that write to the residual start at zero: every layer starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in weight_shapes(shape).items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros(size)
        else:
            std = 0.02 if "embed" in name else size[1] ** -0.5
            weights[name] = torch.randn(size, generator=generator) * std
    return weights


# -- forward -----------------------------------------------------------------------------------------------------------


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, D]; cos and sin [N, D/2] in FP32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def before_attention(
    x: Tensor, norm: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, *, shape: Shape,
    linear: Linear = plain,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [N, heads, D] and k, v [N, KV heads, D], rotated."""
    y = linear(_norm(x, norm, shape.rms_norm_eps), qkv)
    q, k, v = (
        part.reshape(len(x), -1, shape.head_dim)
        for part in torch.split(y, [shape.q_size, shape.kv_size, shape.kv_size], dim=-1)
    )
    q = _rotate(_norm(q, q_norm, shape.rms_norm_eps), cos, sin)
    return q, _rotate(_norm(k, k_norm, shape.rms_norm_eps), cos, sin), v.contiguous()


def after_attention(
    x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, *, shape: Shape,
    linear: Linear = plain,
) -> Tensor:  # fmt: skip
    x = x + linear(attended.flatten(1), out)
    gate, up = linear(_norm(x, norm, shape.rms_norm_eps), gate_up).chunk(2, dim=-1)
    return x + linear(functional.silu(gate) * up, down)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
    """Flash attention over packed documents; GPU only."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


def attend_each(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
    """Document by document: any device, same numbers."""
    outs = []
    for qd, kd, vd in zip(*(torch.split(part, lengths) for part in (q, k, v)), strict=True):
        group = qd.shape[1] // kd.shape[1]
        kd, vd = kd.repeat_interleave(group, dim=1), vd.repeat_interleave(group, dim=1)
        qd, kd, vd = (part.transpose(0, 1)[None] for part in (qd, kd, vd))
        outs.append(functional.scaled_dot_product_attention(qd, kd, vd, is_causal=True)[0].transpose(0, 1))
    return torch.cat(outs)


class Model:
    """Weights and how to run them. ``linear``, ``before``, ``after`` and ``attend`` can be replaced."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.shape, self.weights = shape, weights
        self.embedding = weights["model.embed_tokens.weight"]
        self.before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self.after: Callable[..., Tensor] = after_attention
        self.attend = attend_varlen if self.embedding.is_cuda else attend_each
        half = shape.head_dim // 2
        inverse = shape.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(shape.max_position_embeddings, dtype=torch.float32)[:, None] * inverse
        self.cos, self.sin = (table.to(self.embedding.device) for table in (angles.cos(), angles.sin()))

    def layer(self, i: int, *kinds: str) -> list[Tensor]:
        return [self.weights[f"model.layers.{i}.{kind}.weight"] for kind in kinds]

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        linear: Linear = plain,
    ) -> Tensor:
        """The final normed states [N, hidden] of tokens [N]; ``attend(layer, q, k, v)`` does the mixing."""
        x = functional.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions], self.sin[positions]
        for i in range(self.shape.num_hidden_layers):
            weights = self.layer(
                i, "input_layernorm", "self_attn.qkv_proj", "self_attn.q_norm", "self_attn.k_norm"
            )  # fmt: skip
            q, k, v = self.before(x, *weights, cos, sin, shape=self.shape, linear=linear)
            attended = attend(i, q, k, v)
            weights = self.layer(
                i, "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj"
            )  # fmt: skip
            x = self.after(x, attended, *weights, shape=self.shape, linear=linear)
        return _norm(x, self.weights["model.norm.weight"], self.shape.rms_norm_eps)

    def packed(self, tokens: Tensor, lengths: list[int], linear: Linear = plain) -> Tensor:
        """Hidden states of packed documents of these lengths."""
        starts, positions = offsets(lengths, tokens.device)
        return self.hidden(tokens, positions, lambda _, q, k, v: self.attend(q, k, v, starts, lengths), linear)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.embedding)


def offsets(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where documents start (int32, with the end) and each token's place in its document."""
    sizes = torch.tensor(lengths)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = sizes.cumsum(0)
    positions = torch.arange(int(starts[-1])) - starts[:-1].long().repeat_interleave(sizes)
    return starts.to(device, non_blocking=True), positions.to(device, non_blocking=True)


# -- generation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[list[int]],
    max_new: int,
    stop: int,
    *,
    prefill: Linear = plain,
    decode: Linear = plain,
    protect: bool = False,
    chunk: int = 32768,
) -> list[list[int]]:
    """Greedy continuations up to `stop`, all prompts at once with a KV cache. ``prefill`` runs the prompts' linears and
    ``decode`` those of generated tokens; with `protect` each prompt's last token takes ``decode`` as well."""
    shape, device = model.shape, model.embedding.device
    room = (max(map(len, prompts)) + max_new + 15) // 16 * 16  # a mask's rows are aligned for the fused kernel
    cache = model.embedding.new_zeros(
        2, shape.num_hidden_layers, len(prompts), shape.num_key_value_heads, room, shape.head_dim
    )
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    firsts = []
    for group in _groups([len(prompt) for prompt in prompts], chunk):
        sizes = [len(prompts[i]) for i in group]
        starts, positions = offsets(sizes, device)
        last = starts[1:].long() - 1

        def attend(
            i: int, q: Tensor, k: Tensor, v: Tensor, group: list[int] = group, sizes: list[int] = sizes,
            starts: Tensor = starts,
        ) -> Tensor:  # fmt: skip
            for which, packed in enumerate((k, v)):
                for row, document in zip(group, torch.split(packed, sizes), strict=True):
                    cache[which, i, row, :, : len(document)] = document.transpose(0, 1)
            return model.attend(q, k, v, starts, sizes)

        def linear(x: Tensor, weight: Tensor, last: Tensor = last) -> Tensor:
            y = prefill(x, weight)
            if protect:
                y[last] = decode(x[last], weight)
            return y

        tokens = torch.tensor([token for i in group for token in prompts[i]], device=device)
        firsts.append(model.logits(model.hidden(tokens, positions, attend, linear)[last]).argmax(-1))
    token = torch.cat(firsts)

    rows, slots = torch.arange(len(prompts), device=device), torch.arange(room, device=device)
    made, ended = [token], token == stop
    for step in range(1, max_new):
        if step % 16 == 0 and bool(ended.all()):
            break
        mask = torch.where(slots <= lengths[:, None], 0.0, -torch.inf).to(cache.dtype)[:, None, None]

        def attend_cache(i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask, at: Tensor = lengths) -> Tensor:
            keys, values = cache[0, i], cache[1, i]
            keys[rows, :, at], values[rows, :, at] = k, v
            # the query heads of one KV head as so many places of one query
            q = q.view(len(q), shape.num_key_value_heads, -1, shape.head_dim)
            out = functional.scaled_dot_product_attention(q, keys, values, mask.expand(*q.shape[:3], room))
            return out.reshape(len(q), -1, shape.head_dim)

        token = model.logits(model.hidden(token, lengths, attend_cache, decode)).argmax(-1)
        lengths = lengths + 1
        made.append(token)
        ended = ended | (token == stop)
    texts = torch.stack(made, dim=1).tolist()
    return [text[: text.index(stop)] if stop in text else text for text in texts]


def _groups(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Neighbouring prompts together up to `most` tokens."""
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and sum(sizes[j] for j in group) + size > most:
            yield group
            group = []
        group.append(i)
    yield group
