"""Heads of one layer for a checkpoint like Qwen3's: EAGLE's, random or trained for some seconds on what the model
generates, and EAGLE3's, random.

SGLang's ``LlamaForCausalLMEagle`` takes the next token's embedding beside the served model's last hidden state, through
``fc``, one Llama layer without its first norm, and the served model's head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SEED, BATCH = 11, 8


def make(
    model: Path, folder: Path, texts: Sequence[Sequence[int]] = (), *, steps: int = 0, device: str = "cpu"
) -> Path:
    """``texts``: token ids, all of one length, that the head is trained on for ``steps`` steps."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    # Of a tied head SGLang would take the weight away twice, when it gives the draft the served model's.
    about = _about(model) | {"tie_word_embeddings": False}
    torch.manual_seed(SEED)
    config = LlamaConfig(**about)
    config._attn_implementation = "sdpa"
    layer: Any = LlamaDecoderLayer(config, 0).to(device).float()
    layer.input_layernorm = torch.nn.Identity()
    hidden = config.hidden_size
    fc = torch.nn.Linear(2 * hidden, hidden).to(device)
    if steps:
        target: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
        rotary = LlamaRotaryEmbedding(config).to(device)
        _train(target, layer, fc, rotary, torch.tensor([*map(list, texts)], device=device), steps)
    tensors = {f"layers.0.{name}": tensor for name, tensor in layer.state_dict().items()}
    tensors |= {f"fc.{name}": tensor for name, tensor in fc.state_dict().items()}
    return _write(folder, tensors, about | {"architectures": ["LlamaForCausalLMEagle"]})


def make_eagle3(model: Path, folder: Path) -> Path:
    """A random head of EAGLE3: it takes hidden states of three layers through ``fc``, and beside them the next token's
    embedding into attention; its own head is the served model's."""
    about = _about(model)
    hidden, inner, head = about["hidden_size"], about["intermediate_size"], about["head_dim"]
    queries, keys = head * about["num_attention_heads"], head * about["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (queries, 2 * hidden), "self_attn.o_proj": (hidden, queries)}
    sizes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (keys, 2 * hidden))
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(SEED)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    tensors = {f"midlayer.{name}.weight": random(*size) for name, size in sizes.items()}
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    tensors["fc.weight"] = random(hidden, 3 * hidden)
    served = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = served.get("lm_head.weight", served["model.embed_tokens.weight"])
    about |= {"tie_word_embeddings": False, "draft_vocab_size": about["vocab_size"]}
    return _write(folder, tensors, about | {"architectures": ["LlamaForCausalLMEagle3"]})


def _about(model: Path) -> dict[str, Any]:
    served = json.loads((model / "config.json").read_text())
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("rms_norm_eps", "max_position_embeddings", "hidden_act", "eos_token_id", "pad_token_id", "rope_theta"),
    )
    rope = {**served["rope_parameters"], "rope_theta": served["rope_theta"]}
    more = {"num_hidden_layers": 1, "rope_parameters": rope, "attention_bias": False, "mlp_bias": False}
    return {key: served[key] for key in kept} | more


def _write(folder: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    made = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(about | {"model_type": "llama", "torch_dtype": "bfloat16"}))
    return folder


def _train(target: Any, layer: Any, fc: Any, rotary: Any, texts: torch.Tensor, steps: int) -> None:
    """Towards what the served model says next, given its own last hidden state and the token that followed it."""
    embed, head = target.get_input_embeddings().weight.float(), target.get_output_embeddings().weight.float()
    with torch.no_grad():
        states = torch.cat([target.model(rows).last_hidden_state.float() for rows in texts.split(BATCH)])
    parameters = [*layer.parameters(), *fc.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        rows = torch.randint(len(texts), (BATCH,), generator=generator).to(texts.device)
        ids, state = texts[rows], states[rows]
        x = fc(torch.cat([embed[ids[:, 1:]], state[:, :-1]], dim=-1))
        places = torch.arange(x.shape[1], device=x.device)[None]
        out = layer(x, position_embeddings=rotary(x, places), attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
        wanted = (state[:, 1:] @ head.t()).argmax(-1)
        loss = torch.nn.functional.cross_entropy((out @ head.t()).flatten(0, 1), wanted.flatten())
        loss = loss + torch.nn.functional.smooth_l1_loss(out, state[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
