"""Shapes read from config.json files: parameters against transformers' own models, layer by layer rules, refusals."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.plan.models import MODELS, find_model
from mixquant_sglang.weights.decoder import Block, Experts
from mixquant_sglang.weights.decoder_config import read_decoder
from mixquant_sglang.weights.mixers import Attention, DeltaRule, Latent, Matrix

# Billions, from the models' cards: all, and in experts (30.5 B and the like count no draft layers).
PUBLISHED = {
    "Qwen3-30B-A3B": (30.5, 29.0),
    "Qwen3-Next-80B-A3B": (80.0, 77.3),
    "Qwen3.5-9B": (9.4, 0),  # 9 B and a tower
    "Qwen3.5-35B-A3B": (35.0, 32.2),
    "Gemma-4-26B-A4B": (25.8, 22.8),  # 25.2 B and a tower
    "GLM-4.5-Air": (106.9, 99.7),
    "GLM-4.7-Flash": (29.9, 27.8),
    "Qwen3-0.6B": (0.596, 0),
    "Qwen3-1.7B": (1.72, 0),
    "Qwen3-4B": (4.02, 0),
    "Qwen3-8B": (8.19, 0),
    "Qwen3-14B": (14.77, 0),
    "Qwen3-32B": (32.76, 0),
    "Llama-3.1-8B": (8.03, 0),
    "Llama-3.1-70B": (70.55, 0),
    "Llama-3.2-1B": (1.236, 0),
    "Llama-3.2-3B": (3.213, 0),
}
# Of one default configuration each: language models, and wrappers with a tower.
TEXT = (
    *("qwen3", "llama", "mistral", "gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3", "cohere2"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "glm4_moe", "glm4_moe_lite"),
    *("phi", "phi3", "starcoder2", "stablelm", "granite", "cohere"),
    *("deepseek_v3", "gpt_oss", "mixtral", "phimoe", "olmoe", "granitemoe", "llama4_text", "minimax_m2"),
)
WRAPPED = ("gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")


def small(kind: str) -> dict[str, Any]:
    """A config.json as transformers would save it, in full."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Any] = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    return made


def counted(kind: str) -> int:
    """Parameters of transformers' own model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind]()
    auto = transformers.AutoModelForImageTextToText if kind in WRAPPED else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in auto.from_config(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_models_have_the_published_sizes(name: str) -> None:
    total, experts = PUBLISHED[name]
    model = find_model(name)
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert model.expert_parameters() / 1e9 == pytest.approx(experts, rel=0.01)


def test_every_built_in_model_is_checked() -> None:
    assert {model.name for model in MODELS} == PUBLISHED.keys()


@pytest.mark.parametrize("kind", TEXT)
def test_parameters_are_those_of_transformers(kind: str) -> None:
    assert read_decoder(small(kind), kind).parameters == pytest.approx(counted(kind), rel=1e-3)


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_counted_with_their_tower(kind: str) -> None:
    made = read_decoder(small(kind), kind)
    assert made.tower > 0
    assert made.parameters == pytest.approx(counted(kind), rel=0.02)


@pytest.mark.parametrize("kind", TEXT)
def test_a_config_that_leaves_out_defaults_means_the_same(kind: str) -> None:
    """transformers saves what differs from its class; sizes are always there, for a model's are its own."""
    full = small(kind)
    sizes = ("hidden_size", "intermediate_size", "num_", "vocab", "moe_intermediate", "head_dim", "n_", "v_head")
    sizes = (*sizes, "kv_lora", "q_lora", "qk_", "model_type", "top_k", "tie_word_embeddings")
    short = {key: value for key, value in full.items() if key.startswith(sizes)}
    assert len(short) < len(full)
    assert read_decoder(short, kind) == read_decoder(full, kind)


def test_a_hybrid_block() -> None:
    model = find_model("Qwen3.5-35B-A3B")
    linear, full = model.blocks[2], model.blocks[3]
    assert [isinstance(block.mixer, DeltaRule) for block in model.blocks] == [(i + 1) % 4 != 0 for i in range(40)]
    assert linear.mixer == DeltaRule(16, 32, 128, 128, 4)
    assert full.mixer == Attention(16, 2, 256, gated=True)
    assert linear.experts == full.experts == Experts("mlp.experts", 256, 8, 512, 512, "mlp.shared_expert")
    assert linear.matrices(2048, 2) == [  # as layers of SGLang's Qwen3_5GatedDeltaNet on one of two ranks
        Matrix("linear_attn.in_proj_qkvz", (2048 + 2048 + 4096 + 4096) // 2, 2048),
        Matrix("linear_attn.in_proj_ba", 32, 2048),
        Matrix("linear_attn.out_proj", 2048, 2048),
        Matrix("mlp.gate", 256, 2048),
        Matrix("mlp.shared_expert.gate_up_proj", 512, 2048),
        Matrix("mlp.shared_expert.down_proj", 2048, 256),
    ]
    assert full.matrices(2048, 1)[0] == Matrix("self_attn.qkv_proj", 2 * 4096 + 2 * 512, 2048, 4096)


def test_latent_attention() -> None:
    model = find_model("GLM-4.7-Flash")
    assert model.blocks[0].experts is None
    assert model.blocks[0].dense == 10240
    latent = model.blocks[1].mixer
    assert latent == Latent(20, 768, 512, 192, 64, 256)
    assert latent.matrices(2048, 4) == [
        Matrix("self_attn.fused_qkv_a_proj_with_mqa", 768 + 512 + 64, 2048),  # the same on every rank
        Matrix("self_attn.q_b_proj", 5 * 256, 768),
        Matrix("self_attn.kv_b_proj", 5 * 448, 512),
        Matrix("self_attn.o_proj", 2048, 5 * 256),
    ]
    assert latent.kv_bytes(4) == latent.kv_bytes(1) == 2 * 576
    direct = read_decoder({**small("deepseek_v3"), "q_lora_rank": None}, "v2").blocks[0].mixer
    assert [matrix.name for matrix in direct.matrices(7168, 1)][:2] == [
        "self_attn.q_proj",
        "self_attn.kv_a_proj_with_mqa",
    ]


def test_windows_and_k_that_is_v() -> None:
    model = find_model("google/gemma-4-26B-A4B-it")
    assert [block.mixer.window for block in model.blocks[:6]] == [1024] * 5 + [None]
    assert model.blocks[0].mixer == Attention(16, 8, 256, 1024)
    assert model.blocks[5].mixer == Attention(16, 2, 512)
    assert model.blocks[5].dense == 2112  # the experts are beside the MLP
    assert model.window_share == 0.8
    oss = read_decoder(small("gpt_oss"), "gpt-oss-120b")
    assert [block.mixer.window for block in oss.blocks[:4]] == [128, None, 128, None]
    assert read_decoder(small("gemma3_text"), "gemma3").window_share == 1.0  # one pool for all layers
    llama4 = read_decoder(small("llama4_text"), "scout")
    assert [block.mixer.window for block in llama4.blocks[:5]] == [4096, 4096, 4096, None, 4096]


def test_families_whose_linears_sglang_names_or_builds_otherwise() -> None:
    phi, stablelm = (read_decoder(small(kind), kind).blocks[0] for kind in ("phi", "stablelm"))
    names = [matrix.name for matrix in phi.matrices(2048, 1)]
    assert names == ["self_attn.qkv_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"]
    for block in (stablelm, read_decoder(small("gpt_oss"), "x").blocks[0]):
        refused = {matrix.name for matrix in block.matrices(2560, 1) if matrix.refusal}
        assert refused == {"self_attn.qkv_proj", "self_attn.o_proj"}
    llama4 = read_decoder({**small("llama4_text"), "moe_layers": [1]}, "x")
    assert [matrix.name for matrix in llama4.blocks[0].matrices(5120, 1)][2:] == [
        "feed_forward.gate_up_proj",
        "feed_forward.down_proj",
    ]
    assert not any(read_decoder(small(kind), kind).is_plain for kind in ("phi", "stablelm", "olmo2"))


MOE = {
    **{"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 8, "vocab_size": 128, "num_experts": 4},
    **{"num_attention_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        ({}, range(8)),
        ({"mlp_only_layers": [0, 3]}, (1, 2, 4, 5, 6, 7)),
        ({"decoder_sparse_step": 2}, (1, 3, 5, 7)),
        ({"first_k_dense_replace": 3}, (3, 4, 5, 6, 7)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 3}, (3, 6)),
        ({"moe_layer_freq": [0, 1, 1, 0, 0, 0, 0, 1]}, (1, 2, 7)),
        ({"mlp_layer_types": ["dense", "sparse"] * 4}, (1, 3, 5, 7)),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 4}, (3, 7)),
        ({"model_type": "llama4_text", "moe_layers": [2]}, (2,)),
        ({"model_type": "gemma4_text", "sliding_window": 8, "enable_moe_block": False}, ()),
    ],
)
def test_which_blocks_have_experts(change: dict[str, Any], sparse: Any) -> None:
    made = read_decoder({**MOE, **change}, "x")
    assert [i for i, block in enumerate(made.blocks) if block.experts] == list(sparse)
    assert all(block.dense == 96 for block in made.blocks if not block.experts)


def test_shared_experts() -> None:
    def experts(**change: Any) -> Experts | None:
        return read_decoder({**MOE, **change}, "x").blocks[-1].experts

    assert experts() == Experts("mlp.experts", 4, 2, 32)
    assert experts(n_shared_experts=2) == Experts("mlp.experts", 4, 2, 32, 64, "mlp.shared_experts")
    ling = Experts("mlp.experts", 4, 2, 32, 64, "mlp.shared_experts")  # EXAONE-MoE too
    assert experts(num_shared_experts=2) == ling
    assert experts(num_shared_experts=2, moe_shared_expert_intermediate_size=32) == ling
    assert experts(num_shared_experts=1, moe_shared_expert_intermediate_size=64) == ling
    assert experts(num_shared_experts=0) == Experts("mlp.experts", 4, 2, 32, 0, "mlp.shared_experts")
    assert experts(moe_num_shared_experts=2) == ling  # ERNIE 4.5
    qwen = experts(shared_expert_intermediate_size=48)
    assert qwen == Experts("mlp.experts", 4, 2, 32, 48, "mlp.shared_expert")
    mixtral = experts(model_type="mixtral", moe_intermediate_size=None, num_experts=None, num_local_experts=8)
    assert mixtral == Experts("block_sparse_moe.experts", 8, 2, 96, 0, "block_sparse_moe.shared_experts")


def test_ranks() -> None:
    model = find_model("GLM-4.5-Air")
    assert model.expert_parameters(4, 1) == model.expert_parameters(4, 4) == model.expert_parameters() // 4
    assert model.blocks[1].experts.share(4, 2) == (64, 704)  # type: ignore[union-attr]
    assert [tp for tp in (1, 2, 3, 4, 8, 16, 32, 64) if model.divides(tp)] == [1, 2, 4, 8, 16, 32]
    assert not model.divides(4, 8)
    assert not model.divides(4, 3)
    with pytest.raises(MixQuantError, match=r"--tp: 3 does not divide GLM-4.5-Air \(96 heads, 8 KV heads"):
        model.check(3)
    with pytest.raises(MixQuantError, match=r"--tp: 4, --ep: 3: does not divide .* and of the experts"):
        model.check(4, 3)


def test_a_plain_decoder_is_one_of_like_blocks() -> None:
    block = Block(Attention(4, 2, 16), 96)
    plain = read_decoder({**MOE, "num_experts": None, "num_key_value_heads": 2}, "x")
    assert plain.is_plain
    assert plain.blocks == (block,) * 8
    assert not find_model("Qwen3.5-9B").is_plain
    assert not read_decoder(MOE, "x").is_plain


def test_what_is_not_counted_is_named() -> None:
    made = read_decoder({"text_config": MOE, "vision_config": {"model_type": "x"}, "audio_config": {"a": 1}}, "x")
    assert made.unread == ("vision_config", "audio_config")
    assert made.tower == 0


def test_nothing_but_a_refusal_comes_of_a_spoilt_config() -> None:
    """Any value in any place: a shape or one line."""
    values = (None, True, -1, 0, 1.5, "many", [], [1], ["full_attention"] * 4, {}, {"hidden_size": 8}, 2**40)
    whole = {**small("qwen3_5_moe"), "quantization_config": None}
    bases = [MOE, small("gemma4_text"), small("llama4_text"), small("glm4_moe_lite"), whole, whole["text_config"]]
    rng = random.Random(0)
    refused = 0
    for i in range(1500):
        config = copy.deepcopy(bases[i % len(bases)])
        for _ in range(rng.choice((1, 2))):
            place = config["text_config"] if "text_config" in config and rng.random() < 0.5 else config
            if isinstance(place, dict) and place:
                place[rng.choice(sorted(place))] = rng.choice(values)
        try:
            assert read_decoder(config, "x").parameters > 0
        except MixQuantError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
            assert str(error).startswith("config.json: ")
    assert 100 < refused < 1400
