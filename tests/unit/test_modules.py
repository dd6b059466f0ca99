from __future__ import annotations

import pytest

from mixquant_sglang.recipe.modules import (
    A_GATE,
    NEVER,
    OUTSIDE,
    block_of,
    expert_of,
    is_draft,
    is_never_low,
    is_outside,
    why_bf16,
)
from mixquant_sglang.tools.quantize.targets import is_target


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.mlp.gate", NEVER),
        ("model.layers.0.zaya_block.router.down_proj", NEVER),  # a router of several linears
        ("model.layers.0.router.proj", NEVER),
        ("model.layers.0.self_attn.kv_b_proj", NEVER),
        ("model.layers.0.linear_attn.in_proj_ba", A_GATE),
        ("model.layers.0.self_attn.f_a_proj", A_GATE),
        ("model.layers.0.self_attn.indexer.wq_b", A_GATE),
        ("model.layers.0.self_attn.indexer.wk", A_GATE),
        ("model.layers.0.mixer.dt_proj", A_GATE),
        ("model.language_model.per_layer_model_projection", A_GATE),
        ("model.language_model.layers.0.altup.modality_router", A_GATE),
        ("model.embed_vision.embedding_projection", OUTSIDE),
        ("vpm.encoder.layers.0.self_attn.qkv_proj", OUTSIDE),
        ("multi_modal_projector", OUTSIDE),
        ("model.layers.0.attn.wq_b", None),  # DeepSeek-V4's own q projection
        ("model.layers.0.linear_attn.in_proj_qkvz", None),
        ("model.layers.0.mlp.gate_up_proj", None),
        ("model.layers.0.self_attn.qkv_proj", None),
        ("", None),
    ],
)
def test_what_a_name_says(name: str, reason: str | None) -> None:
    assert why_bf16(name) == reason


def test_what_is_below_a_tower_is_outside() -> None:
    assert is_outside("model.visual.blocks.0.mlp.fc1") and not is_outside("model.visual") and not is_outside("lm_head")


def test_quantize_leaves_the_same_modules() -> None:
    assert is_target("model.layers.0.self_attn.q_proj", 2)
    for name in ("vpm.layers.0.self_attn.q_proj", "model.mtp.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"):
        assert not is_target(name, 2)


def test_draft_layers_and_blocks() -> None:
    assert is_draft("mtp.layers.0.mlp.up_proj") and is_draft("model.mtp_layers.0.self_attn.q_proj.weight")
    assert not is_draft("model.layers.0.self_attn.q_proj") and not is_draft("model.mtp_norm.weight")
    assert block_of("model.layers.12.mlp.up_proj") == 12 and block_of("layers.3.weight") == 3
    assert block_of("model.norm.weight") is None and block_of("model.mtp_layers.0.weight") is None


def test_what_no_linear_takes() -> None:
    for name in (
        "lm_head",
        "model.embed_tokens",
        "mtp.fc",
        "mtp.layers.0.mlp.experts.7.up_proj",
        "visual.blocks.0.fc",
    ):
        assert is_never_low(name), name
    for name in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.0.mlp.experts.7.up_proj",
        "model.experts",
    ):
        assert not is_never_low(name), name


def test_linears_of_experts() -> None:
    assert expert_of("model.layers.0.mlp.experts.12.up_proj") == ("model.layers.0.mlp.experts", 12, "up_proj")
    assert expert_of("a.block_sparse_moe.experts.3.w2") == ("a.block_sparse_moe.experts", 3, "w2")
    for name in (
        "a.experts",
        "a.shared_experts.0.up_proj",
        "a.experts.up_proj",
        "a.experts.3",
        "a.experts.3.up_proj.x",
    ):
        assert expert_of(name) is None, name
