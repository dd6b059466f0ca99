"""Which modules of a model no recipe makes low, by their names, and what SGLang fuses: facts that the server, the
planner, ``mixquant quantize``, weight updates and ready-made weights share.

A name says enough where every model that uses it means the same.  What names cannot say is found at load: by the tree
of modules (``host/report.py``) and by running the model (``host/probe.py``).
"""

from __future__ import annotations

import re

# What SGLang fuses in its dense models; a model's own packed_modules_mapping is added to it.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Linears that some engine has in one GEMM, which so share a tensor scale in a checkpoint; beside SGLang's dense models
# those of Mixtral's experts and of DeepSeek's latent attention.
SCALE_GROUPS = (*FUSED.values(), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))

NEVER = "never quantised"
TIED = "never quantised: logits come from the table of tokens"
A_GATE = "never quantised: a gate, whose errors add up or change what is picked"
OUTSIDE = "never quantised: outside the language model"

# Routers, with all that is below one, and MLA's kv_b_proj, whose weight is also read outside of apply.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "kv_b_proj"})

# Few numbers a token that steer the others: decay and beta of GDN (in_proj_*) and KDA (f_*, b_*, g_*), the step of
# Mamba (x_proj, dt_proj), the per-layer inputs of Gemma (per_layer_*), how Gemma 3n mixes its streams (altup), the
# scores of sparse attention's indexer.
_GATES = frozenset(
    {
        *("in_proj_ba", "in_proj_a", "in_proj_b"),
        *("f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj", "fused_qkvbfg_a_proj", "fused_fg_b_proj"),
        *("x_proj", "dt_proj"),
        *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
        *("modality_router", "prediction_coefs", "correction_coefs"),
        *("weights_proj", "wk_weights_proj"),
    }
)
# Everything below a module of this name; its wq_b and wk are the main projections of other attentions.
_INDEXER = "indexer"

# Towers for other modalities and what leads from them into the language model: their rows are not those of the pass.
_TOWERS = frozenset(
    {
        *("visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_adapter", "vision_projection"),
        *("audio_tower", "audio_encoder", "audio_projector", "embed_vision", "embed_audio"),
        *("multi_modal_projector", "mm_projector", "vit_large_projector", "patch_merge_mlp", "patch_embedder"),
        *("vpm", "apm", "resampler"),
    }
)

# What speculation adds behind the blocks of the model, and the tables of tokens.
_DRAFT = frozenset({"mtp", "mtp_layers"})
_TABLES = frozenset({"lm_head", "embed_tokens"})

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")

# One linear of one routed expert in a checkpoint; ``experts`` is the MoE layer, as SGLang has it in one module.
_EXPERT = re.compile(r"(?P<layer>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)")
# What the linears of an expert are called: gate, up, down; the first two are one GEMM.
EXPERT_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def why_bf16(name: str) -> str | None:
    """Why the module ``name`` is BF16 whatever the recipe says; None if its name does not say so."""
    *path, leaf = name.split(".")
    if is_outside(name) or leaf in _TOWERS:
        return OUTSIDE
    if leaf in _GATES or _INDEXER in path:
        return A_GATE
    return None if _ROUTERS.isdisjoint((*path, leaf)) else NEVER


def is_outside(name: str) -> bool:
    """Whether ``name`` lies below a tower or a projector."""
    return tower_of(name) is not None


def tower_of(name: str) -> str | None:
    """What the tower or projector is called below which ``name`` lies."""
    return next((part for part in name.split(".")[:-1] if part in _TOWERS), None)


def is_draft(name: str) -> bool:
    """Whether ``name`` lies below the draft layers that a checkpoint brings for speculation."""
    return not _DRAFT.isdisjoint(name.split(".")[:-1])


def block_of(name: str) -> int | None:
    """The number of the block that ``name`` lies in; those from ``num_hidden_layers`` on are draft layers."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(MoE layer, number of the expert, name of the linear in it) of ``model.layers.0.mlp.experts.3.up_proj``; None for
    what is no linear of one routed expert."""
    found = _EXPERT.fullmatch(name)
    return (found["layer"], int(found["expert"]), found["leaf"]) if found else None


def is_experts(name: str) -> bool:
    """Whether ``name`` is that of a MoE layer's routed experts: one module of SGLang."""
    return name.rpartition(".")[2] == "experts"


def is_never_low(name: str) -> bool:
    """Whether nothing of SGLang that a recipe makes low can be the checkpoint's module ``name``: tables of tokens,
    draft layers, and what lies outside of the language model."""
    return name.rpartition(".")[2] in _TABLES or is_draft(name) or is_outside(name)
