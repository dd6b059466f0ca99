from __future__ import annotations

import pytest

from mixquant_sglang.recipe.modules import A_GATE, NEVER, OUTSIDE, is_outside, why_bf16
from mixquant_sglang.tools.quantize.targets import is_target


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.mlp.gate", NEVER),
        ("model.layers.0.self_attn.kv_b_proj", NEVER),
        ("model.layers.0.linear_attn.in_proj_ba", A_GATE),
        ("model.layers.0.self_attn.f_a_proj", A_GATE),
        ("model.layers.0.self_attn.indexer.wq_b", A_GATE),
        ("model.layers.0.self_attn.indexer.wk", A_GATE),
        ("model.layers.0.mixer.dt_proj", A_GATE),
        ("model.language_model.per_layer_model_projection", A_GATE),
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
