"""The registry of families names classes that SGLang has, each with why it is there."""

from __future__ import annotations

import pkgutil
import warnings
from pathlib import Path

import pytest
import torch

from mixquant_sglang.layers import blocks
from mixquant_sglang.layers.blocks import FAMILIES, Family

ASK = {"decoder": blocks.is_decoder, "mlp": blocks.is_mlp, "attention": blocks.is_attention, "model": blocks.is_model}


def bare(name: str) -> torch.nn.Module:
    """An object of SGLang's class, without its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's own, at import
        kind = pkgutil.resolve_name(name)
    made: torch.nn.Module = kind.__new__(kind)
    return made


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_class_is_sglangs_and_allows_its_own(family: Family) -> None:
    assert len(family.why) > 20
    assert family.decoder or family.mlp or family.attention or family.model
    for what, asked in ASK.items():
        name = getattr(family, what)
        if name is None:
            continue
        assert asked(bare(name))
        assert [other for other, ask in ASK.items() if other != what and ask(bare(name))] == []


def test_a_subclass_is_another_class() -> None:
    for what, asked in ASK.items():
        kind = pkgutil.resolve_name(getattr(FAMILIES[0], what))
        sub = type(kind.__name__, (kind,), {})
        assert not asked(sub.__new__(sub))


def test_what_a_family_leaves_out_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FAMILIES[0]
    monkeypatch.setattr(blocks, "FAMILIES", (Family("Llama", "linears alone", mlp=llama.mlp),))
    assert llama.mlp and llama.decoder and llama.attention and llama.model
    assert blocks.is_mlp(bare(llama.mlp))
    assert not blocks.is_decoder(bare(llama.decoder)) and not blocks.is_attention(bare(llama.attention))
    assert not blocks.is_model(bare(llama.model)) and not blocks.is_model(torch.nn.Linear(1, 1))


def test_each_family_is_in_the_table() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text().partition("## Blocks that are fused")[2]
    for family in FAMILIES:
        for name in family.name.split("'s layers")[0].split(" with ")[0].split(" and "):
            assert name.removesuffix("-MoE") in table, name


def test_q_is_not_apart_where_one_kernel_reads_qkv_whole() -> None:
    attention = bare("sglang.srt.models.qwen3_moe.Qwen3MoeAttention")
    torch.nn.Module.__init__(attention)
    for whole in (False, True):
        attention.use_fused_qk_norm_rope = whole  # type: ignore[assignment]
        assert blocks.takes_q_apart(attention) is not whole
