"""The tiny model in plain PyTorch: Qwen3's forward pass over packed documents, greedy generation, checkpoint files.

Tokens of several documents lie one after the other; ``starts`` (their offsets, the end included) keeps attention within
a document. Weights are a dict by the names of a Qwen3 checkpoint, with q/k/v and gate/up of a layer each fused into one
matrix. Every linear goes through a function ``linear(x, weight)``, so that an evaluation can put a low-precision one
in its place. The embedding is the output head too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Linear = Callable[[Tensor, Tensor], Tensor]
SHARD_BYTES = 15_000_000


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
        for part in y.split([shape.q_size, shape.kv_size, shape.kv_size], dim=-1)
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
    for qd, kd, vd in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
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
                for row, document in zip(group, packed.split(sizes), strict=True):
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


# -- files -------------------------------------------------------------------------------------------------------------

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def split_weights(shape: Shape, weights: Weights) -> Weights:
    """Fused to the checkpoint's names."""
    out: Weights = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            parts = weight.split([shape.q_size, shape.kv_size, shape.kv_size])
            out |= {name.replace("qkv", kind): part for kind, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            gate, up = weight.chunk(2)
            out |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            out[name] = weight
    return out


def fuse_weights(shape: Shape, tensors: Weights) -> Weights:
    """The checkpoint's names to fused ones."""
    out = {}
    for name in weight_shapes(shape):
        kinds = ("q", "k", "v") if "qkv_proj" in name else ("gate", "up") if "gate_up_proj" in name else ()
        fused = "qkv" if len(kinds) == 3 else "gate_up"
        out[name] = torch.cat([tensors[name.replace(fused, kind)] for kind in kinds]) if kinds else tensors[name]
    return out


def write_safetensors(path: Path, tensors: Weights) -> None:
    """The format by hand: 8 bytes of header length, JSON, the bytes. BF16 on the CPU only."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def read_safetensors(path: Path) -> Weights:
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        low, high = (start + offset for offset in entry["data_offsets"])
        data = torch.frombuffer(bytearray(raw[low:high]), dtype=_DTYPES[entry["dtype"]])
        tensors[name] = data.view(entry["shape"])
    return tensors


def config_json(shape: Shape, pad: int, stop: int) -> dict[str, Any]:
    """What transformers and SGLang read; rope_theta in both of its places, for old and new readers."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **asdict(shape),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.num_hidden_layers,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "torch_dtype": "bfloat16",
    }


def write_checkpoint(out: Path, shape: Shape, weights: Weights, pad: int, stop: int) -> None:
    """config.json, generation_config.json, shards of at most SHARD_BYTES and their index."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.bfloat16) for name, t in split_weights(shape, weights).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[Weights] = [{}]
    each = total / -(-total // SHARD_BYTES) * 1.02
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > each:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(out / name, shard)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    generation = {"eos_token_id": [stop, pad], "pad_token_id": pad}
    files = {"config": config_json(shape, pad, stop), "generation_config": generation}
    for name, content in (files | {"model.safetensors.index": index}).items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read_checkpoint(path: Path) -> tuple[Shape, Weights]:
    """The shape and fused BF16 weights of a checkpoint that write_checkpoint wrote."""
    config = json.loads((path / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in asdict(Shape())})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors: Weights = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= read_safetensors(path / name)
    return shape, fuse_weights(shape, tensors)
