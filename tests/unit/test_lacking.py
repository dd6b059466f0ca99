"""What a checkpoint lacks, by its names: what is said to be missing, and what may be there under another name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import load
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.plan.models import find_quantised
from mixquant_sglang.weights.decoder_config import read_decoder
from mixquant_sglang.weights.footprint import by_name
from mixquant_sglang.weights.lacking import Contents
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from tests.support import quantised_checkpoints

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen3"
CPU = Device("this CPU", None)
BLOCKS = [
    f"model.layers.{i}.{name}.weight"
    for i in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up", "norm", "attn.wo")
]


def contents(*gone: str, **config: Any) -> Contents:
    tensors = [name for name in [*BLOCKS, "model.embed_tokens.weight", "model.norm.weight"] if name not in gone]
    return Contents.of(tensors, ["model.layers.0.attn.codes"], config)


def qkv(i: int) -> list[str]:
    return [f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]


def test_what_is_missing() -> None:
    q, k, v = qkv(1)
    assert contents().lacks([q, k, v]) is None
    assert contents(v).lacks([q, k, v]) == v
    assert contents(q, k, v).lacks([q, k, v]) == q
    assert contents(*qkv(0), *qkv(1)).lacks([q, k, v]) == q  # of no block, and nobody renames these
    assert contents("model.layers.1.norm.weight").lacks(["model.layers.1.norm.weight"]) == "model.layers.1.norm.weight"
    assert (
        contents().lacks(["model.layers.1.attn.codes.weight"]) == "model.layers.1.attn.codes.weight"
    )  # quantised in 0
    assert contents().lacks(["model.layers.0.attn.codes.weight"]) is None


def test_names_that_nobody_knows_may_be_there() -> None:
    assert contents().lacks(["model.layers.1.linear_attn.in_proj_qkvz.weight"]) is None
    assert contents().lacks(["visual.blocks.0.attn.qkv_proj.weight"]) is None
    assert contents().lacks(["mtp.layers.0.mlp.down_proj.weight"]) is None


def test_blocks_that_read_what_others_have() -> None:
    q, k, v = qkv(1)
    assert contents(v, attention_k_eq_v=True).lacks([q, k, v]) is None
    assert contents(k, v, text_config={"num_kv_shared_layers": 1}).lacks([q, k, v]) is None
    assert contents(q, k, v, attention_k_eq_v=True).lacks([q, k, v]) == q
    assert contents(v, attention_k_eq_v=False).lacks([q, k, v]) == v


def test_tables_and_the_last_norm() -> None:
    table = "model.embed_tokens.weight"
    assert contents().lacks_outside_blocks(table) is None
    assert contents(table).lacks_outside_blocks(table) == table
    assert contents("model.norm.weight").lacks_outside_blocks("model.norm.weight") == "model.norm.weight"
    assert contents(table).lacks_outside_blocks("backbone.embed_tokens.weight") is None
    assert contents().lacks_outside_blocks("lm_head.weight") is None
    assert contents(tie_word_embeddings=False).lacks_outside_blocks("lm_head.weight") == "lm_head.weight"


def test_experts() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in range(2)]
    assert Contents.of(names, [], {}).lacks_below("model.layers.1.mlp.experts") is None
    assert Contents.of(names[:-1], [], {}).lacks_below("model.layers.1.mlp.experts") == names[-1]
    assert Contents.of(names[:-1], [], {}).lacks_below("model.layers.0.mlp.experts") is None


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gone = "model.layers.3.mlp.down_proj"
    return quantised_checkpoints.without(TINY, tmp_path_factory.mktemp("broken"), "fp8 rows", gone)


def test_a_linear_of_which_nothing_is_there_is_not_bf16_in_the_checkpoint(broken: Path) -> None:
    checkpoint, down = QuantisedCheckpoint.open(broken), "model.layers.3.mlp.down_proj"
    with pytest.raises(MixQuantError, match=r"3.mlp.down_proj.weight is missing, in FP8 and in BF16"):
        checkpoint.of_linear(down, ())
    with pytest.raises(MixQuantError, match=r"3.mlp.down_proj.weight is missing"):
        checkpoint.keep(down, (), "by rule")
    assert checkpoint.of_linear(quantised_checkpoints.LEFT, ()) == ()
    checkpoint.check_parameters({"model.layers.0.input_layernorm.weight": (), "model.layers.9.unknown": ()})
    with pytest.raises(MixQuantError, match=r"layers.9.input_layernorm.weight is missing"):
        checkpoint.check_parameters({"model.layers.9.input_layernorm.weight": ()})


def test_the_planner_says_so(broken: Path) -> None:
    found = find_quantised(str(broken))
    assert found is not None
    asked = load("fp8-compact")
    config = {**QuantisedCheckpoint.open(broken).source.config, "quantization_config": None}
    decoder = read_decoder({k: v for k, v in config.items() if v is not None}, "tiny", "tiny")
    with pytest.raises(MixQuantError, match=r"3.mlp.down_proj.weight is missing"):
        list(by_name(replace(decoder, in_bf16=found[1]), asked, select(asked, CPU)))


def test_parts_of_a_fused_linear_and_a_rule_that_keeps_it(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn."
    folder = quantised_checkpoints.without(TINY, tmp_path, "fp8 rows", f"{name}v_proj")
    checkpoint = QuantisedCheckpoint.open(folder)
    shards = [f"{name}{part}_proj" for part in "qkv"]
    for ask in (checkpoint.of_linear, lambda *of: checkpoint.keep(*of, "by rule")):
        with pytest.raises(MixQuantError, match=r"v_proj.weight is missing, in FP8 and in BF16"):
            ask(f"{name}qkv_proj", shards)
    assert torch.is_tensor(checkpoint.source.read(f"{name}q_proj.weight"))
