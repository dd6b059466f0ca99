"""Recipes: what a file may say, what it means, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import LayerRule, Recipe

FULL = r"""# a comment
version: 1
description: everything said
prefill: {precision: nvfp4, min_tokens: 32, fuse: false, weights: org/name-NVFP4, rounding: any}
decode:
  precision: fp8
protect: {last_prompt_token: false}
kernel: emulated
verify: false
weights: {scales: absmax}
layers:
  - {match: 're:.*\.down_proj$', prefill: bf16}
  - match: model.layers.0.self_attn.o_proj
    prefill: fp8
    decode: bf16
    optional: true
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def refusal(value: str | Path) -> str:
    with pytest.raises(MixQuantError) as caught:
        recipe.load(str(value))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# What a file means


def test_every_key(tmp_path: Path) -> None:
    file = write(tmp_path, FULL)
    assert recipe.load(str(file)) == Recipe(
        name=str(file),
        source=str(file),
        prefill="nvfp4",
        min_tokens=32,
        fuse=False,
        decode="fp8",
        protect_last_prompt_token=False,
        kernel="emulated",
        scales="absmax",
        layers=(
            LayerRule(r"re:.*\.down_proj$", "bf16", None, f"{file}:12"),
            LayerRule("model.layers.0.self_attn.o_proj", "fp8", "bf16", f"{file}:13", optional=True),
        ),
        description="everything said",
        verify=False,
        prefill_weights="org/name-NVFP4",
        prefill_weights_at=f"{file}:4 prefill.weights",
        prefill_rounding="any",
    )


@pytest.mark.parametrize(
    "rest", ["", "prefill: {}\ndecode: {}\nprotect: {}\nweights: {}\nlayers: []\n"], ids=["absent", "empty"]
)
def test_defaults(tmp_path: Path, rest: str) -> None:
    file = write(tmp_path, "version: 1\n" + rest)
    assert recipe.load(str(file)) == Recipe(
        name=str(file),
        source=str(file),
        prefill="auto",
        min_tokens=None,
        fuse=True,
        decode="bf16",
        protect_last_prompt_token=True,
        kernel="auto",
        scales="search",
        layers=(),
    )


@pytest.mark.parametrize("precision", ["auto", "bf16", "nvfp4", "fp8"])
def test_prefill_precisions(tmp_path: Path, precision: str) -> None:
    assert recipe.load(str(write(tmp_path, f"version: 1\nprefill: {{precision: {precision}}}"))).prefill == precision


@pytest.mark.parametrize("precision", ["bf16", "nvfp4", "fp8"])
def test_decode_precisions(tmp_path: Path, precision: str) -> None:
    assert recipe.load(str(write(tmp_path, f"version: 1\ndecode: {{precision: {precision}}}"))).decode == precision


def test_a_protected_tail(tmp_path: Path) -> None:
    loaded = recipe.load(str(write(tmp_path, "version: 1\nprotect: {last_prompt_tokens: 16}")))
    assert (loaded.protect_last_prompt_token, loaded.protected_tail) == (True, 16)


def test_a_decode_only_rule_keeps_the_prefill_default(tmp_path: Path) -> None:
    (rule,) = recipe.load(str(write(tmp_path, "version: 1\nlayers: [{match: a.b, decode: fp8}]"))).layers
    assert (rule.prefill, rule.decode, rule.optional) == (None, "fp8", False)


def test_ready_made_weights_for_one_layer(tmp_path: Path) -> None:
    text = "version: 1\nprefill: {precision: bf16, weights: a/b}\nlayers: [{match: a.b, prefill: nvfp4}]"
    assert recipe.load(str(write(tmp_path, text))).prefill_weights == "a/b"


def test_anchors_work(tmp_path: Path) -> None:
    file = write(tmp_path, "version: 1\nlayers:\n- {match: a, prefill: &low fp8}\n- {match: b, prefill: *low}\n")
    assert [rule.prefill for rule in recipe.load(str(file)).layers] == ["fp8", "fp8"]


@pytest.mark.parametrize("text", [FULL.replace("\n", "\r\n"), "\ufeff" + FULL], ids=["crlf", "bom"])
def test_files_from_other_editors(tmp_path: Path, text: str) -> None:
    assert recipe.load(str(write(tmp_path, text))).layers[0].where.endswith(":12")


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.load("bf16").prefill = "nvfp4"  # type: ignore[misc]


# Which file


SHIPPED = {
    "auto": ("auto", "bf16", True, "auto"),
    "bf16": ("bf16", "bf16", True, "auto"),
    "fp8": ("fp8", "bf16", True, "auto"),
    "fp8-attention": ("fp8", "bf16", True, "auto"),
    "nvfp4": ("nvfp4", "bf16", True, "auto"),
    "nvfp4-emulated": ("nvfp4", "bf16", True, "emulated"),
    "nvfp4-fp8": ("nvfp4", "bf16", True, "auto"),
    "nvfp4-fp8-down": ("nvfp4", "bf16", True, "auto"),
    "nvfp4-everywhere": ("nvfp4", "nvfp4", False, "auto"),
    "fp8-compact": ("fp8", "w8a16", True, "auto"),
    "nvfp4-compact": ("nvfp4", "w4a16", True, "auto"),
    "w8a16": ("w8a16", "w8a16", False, "auto"),
    "w4a16": ("w4a16", "w4a16", False, "auto"),
}


def test_shipped_names() -> None:
    assert list(recipe.shipped()) == sorted(recipe.shipped())
    assert set(SHIPPED) == set(recipe.shipped())


def test_every_shipped_recipe_loads_and_says_what_it_is_for() -> None:
    for name, file in recipe.shipped().items():
        loaded = recipe.load(name)
        assert (loaded.name, loaded.source) == (name, str(file))
        assert loaded.description
        assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(("name", "expected"), SHIPPED.items())
def test_shipped_contents(name: str, expected: tuple[str, str, bool, str]) -> None:
    loaded = recipe.load(name)
    assert (loaded.prefill, loaded.decode, loaded.protect_last_prompt_token, loaded.kernel) == expected
    assert (loaded.min_tokens, loaded.scales) == (None, "search")
    assert bool(loaded.layers) == (name in ("auto", "nvfp4-fp8", "nvfp4-fp8-down"))


MIXED = {"auto": ("auto", True), "nvfp4-fp8": ("nvfp4", False), "nvfp4-fp8-down": ("nvfp4", False)}


@pytest.mark.parametrize(("name", "like"), MIXED.items())
def test_the_mlp_in_nvfp4_and_attention_in_fp8(name: str, like: tuple[str, bool]) -> None:
    loaded, (prefill, optional) = recipe.load(name), like
    (rule,) = loaded.layers
    assert dataclasses.replace(loaded, name="", source="", layers=(), description="") == dataclasses.replace(
        recipe.load("nvfp4"), name="", source="", description="", prefill=prefill
    )
    assert (rule.prefill, rule.decode, rule.optional) == ("fp8", None, optional)


# Names as SGLang 0.5.17 and 0.5.23 give them (srt/models), of attention and of what is beside it.
ATTENTION = [
    "model.layers.3.self_attn.qkv_proj",
    "model.layers.3.self_attn.o_proj",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa",
    "model.layers.0.self_attn.0.o_proj",
    "model.layers.0.linear_attn.in_proj_qkvz",
    "language_model.model.layers.3.cross_attn.q_proj",
    "transformer.h.0.attn.c_attn",
    "transformer.blocks.0.norm_attn_norm.attn.Wqkv",
    "model.layers.0.attention.wqkv",
    "model.layers.0.attention.query_key_value",
    "transformer.encoder.layers.0.self_attention.dense",
    "encoder.layer.0.attention.output.dense",
    "model.layers.5.mixer.qkv_proj",
    "model.layers.5.mixer.o_proj",
]
BESIDE = [
    "model.layers.3.mlp.gate_up_proj",
    "model.layers.3.mlp.experts",
    "model.layers.0.mixer.in_proj",
    "model.layers.0.mixer.up_proj",
    "model.layers.0.mixer.out_proj",
    "model.layers.0.conv.in_proj",
    "transformer.h.0.mlp.c_proj",
    "encoder.layer.0.intermediate.dense",
]
DOWN = [
    "model.layers.3.mlp.down_proj",
    "model.layers.0.mlp.shared_experts.down_proj",
    "model.layers.0.feed_forward.w2",
    "model.layers.0.mlp.fc2",
    "transformer.encoder.layers.0.mlp.dense_4h_to_h",
]


@pytest.mark.parametrize(("name", "named"), [("auto", DOWN), ("nvfp4-fp8-down", DOWN), ("nvfp4-fp8", [])])
def test_which_layers_are_attention(name: str, named: list[str]) -> None:
    (rule,) = recipe.load(name).layers
    found = [one for one in ATTENTION + BESIDE + DOWN if re.match(rule.match.removeprefix("re:"), one)]
    assert found == ATTENTION + named


@pytest.mark.parametrize(
    ("environment", "expected"), [(None, "auto"), ("", "auto"), ("fp8", "fp8"), ("./x.yaml", "./x.yaml")]
)
def test_requested(monkeypatch: pytest.MonkeyPatch, environment: str | None, expected: str) -> None:
    monkeypatch.delenv("MIXQUANT_RECIPE", raising=False)
    if environment is not None:
        monkeypatch.setenv("MIXQUANT_RECIPE", environment)
    assert recipe.requested() == expected


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "MINE.YAML", "./mine", "sub/mine"])
def test_what_counts_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path(name).write_text("version: 1\nkernel: native\n", encoding="utf-8")
    assert recipe.load(name).kernel == "native"


def test_a_file_beside_does_not_shadow_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fp8").write_text("version: 1\nprefill: {precision: nvfp4}\n", encoding="utf-8")
    assert recipe.load("fp8").prefill == "fp8"


@pytest.mark.parametrize(
    ("name", "near"), [("nvpf4", "nvfp4"), ("NVFP4", "nvfp4"), ("nvfp4-emulate", "nvfp4-emulated"), ("fp16", "bf16")]
)
def test_unknown_name(name: str, near: str) -> None:
    message = refusal(name)
    assert message.startswith(f"unknown recipe '{name}'; allowed: {', '.join(recipe.shipped())}, or the path to a YAML")
    assert message.endswith(f"; did you mean '{near}'?")


@pytest.mark.parametrize("name", ["", "zzzzzz", "two\nlines"])
def test_unknown_name_with_nothing_near(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"unknown recipe {name!r}; allowed: auto, ")
    assert "did you mean" not in message


def test_missing_file(tmp_path: Path) -> None:
    near = write(tmp_path, FULL)
    missing = tmp_path / "mein.yaml"
    assert refusal(missing) == (f"{missing}: no such file (relative to {Path.cwd()}); did you mean '{near}'?")
    assert "no such file" in refusal(tmp_path / "no" / "dir" / "x.yaml")


def test_missing_file_that_is_a_shipped_name() -> None:
    assert refusal("nvfp4-emulated.yaml").endswith("; did you mean 'nvfp4-emulated'?")


def test_unreadable_file(tmp_path: Path) -> None:
    directory = tmp_path / "dir.yaml"
    directory.mkdir()
    assert refusal(directory) == f"{directory}: cannot be read: Is a directory"
    assert "cannot be read: Not a directory" in refusal(write(tmp_path, FULL) / "x.yaml")


# What a file may not say. Each row: the text, the line, the key, what the message must hold.

RULE_KEYS = "match, prefill, decode, optional"
MISTAKES = {
    # keys
    "unknown key": (
        "version: 1\nprefil: {}",
        2,
        "prefil",
        ["unknown key; allowed: version, description, prefill, ", "did you mean 'prefill'?"],
    ),
    "unknown nested key": (
        "version: 1\nprefill:\n  precision: fp8\n  min_token: 4",
        4,
        "prefill.min_token",
        [
            "allowed: precision, min_tokens, fuse, weights, rounding, attention, attention_from",
            "did you mean 'min_tokens'?",
        ],
    ),
    "low attention of a BF16 prefill": (
        "version: 1\nprefill:\n  precision: bf16\n  attention: fp8",
        4,
        "prefill.attention",
        ["is fp8 where precision is bf16; allowed with: auto, fp8, nvfp4"],
    ),
    "a precision that attention has not": (
        "version: 1\nprefill: {attention: nvfp4}",
        2,
        "prefill.attention",
        ["'nvfp4' is not one of them; allowed: bf16, fp8"],
    ),
    "from where on attention is not low": (
        "version: 1\nprefill: {attention_from: 4096}",
        2,
        "prefill.attention_from",
        ["says from where on attention is low, and attention is bf16"],
    ),
    "attention of too few tokens": (
        "version: 1\nprefill: {attention: fp8, attention_from: 4}",
        2,
        "prefill.attention_from",
        ["4 is too small; allowed: an integer of at least 16"],
    ),
    "unknown key in a flow mapping over lines": (
        "version: 1\nprotect: {\n  last_token: true}",
        3,
        "protect.last_token",
        ["allowed: last_prompt_token", "did you mean 'last_prompt_token'?"],
    ),
    "unknown rule key": (
        "version: 1\nlayers:\n- {match: a, prefill: fp8}\n- {match: b, decod: fp8}",
        4,
        "layers[1].decod",
        [f"unknown key; allowed: {RULE_KEYS}; did you mean 'decode'?"],
    ),
    "key that is not text": ("version: 1\n? [a]\n: 1", 2, "", ["a key must be text, is a list; allowed: version, "]),
    "key that is a number": ("version: 1\n8: fp8", 2, "8", ["unknown key; allowed: version, "]),
    "merge key": ("version: 1\n<<: {kernel: native}", 2, "<<", ["unknown key; allowed: version, "]),
    "unprintable key": ('version: 1\n"a\\nb": 1', 2, r"'a\nb'", ["unknown key"]),
    "duplicate key": ("version: 1\nkernel: auto\nkernel: auto", 3, "kernel", ["is given twice"]),
    "duplicate nested key": (
        "version: 1\ndecode: {precision: fp8,\n precision: fp8}",
        3,
        "decode.precision",
        ["twice"],
    ),
    # version
    "no version": ("kernel: auto", 1, "version", ["is missing; allowed: 1"]),
    "other version": ("kernel: auto\nversion: 2", 2, "version", ["2 is not a version", "allowed: 1"]),
    "version as text": ("version: '1'", 1, "version", ["must be an integer, is text ('1'); allowed: an integer"]),
    "version as a fraction": ("version: 1.0", 1, "version", ["must be an integer, is a decimal number ('1.0')"]),
    "version as a boolean": ("version: true", 1, "version", ["must be an integer, is a boolean ('true')"]),
    # shape
    "empty file": ("", 1, "", ["is empty; a recipe needs at least 'version: 1'"]),
    "only comments": ("# nothing\n", 1, "", ["is empty"]),
    "list at the top": ("# here\n- version: 1", 2, "", ["must be a mapping, is a list; allowed: version, "]),
    "text at the top": ("nvfp4", 1, "", ["must be a mapping, is text ('nvfp4'); allowed: version, "]),
    "section as text": (
        "version: 1\nprefill: nvfp4",
        2,
        "prefill",
        ["must be a mapping, is text ('nvfp4'); allowed: precision, min_tokens, fuse, weights"],
    ),
    "empty section": ("version: 1\ndecode:\nkernel: auto", 2, "decode", ["must be a mapping, is empty; allowed: prec"]),
    "layers as a mapping": (
        "version: 1\nlayers: {match: a, prefill: fp8}",
        2,
        "layers",
        [f"must be a list, is a mapping; allowed: a list of {{{RULE_KEYS}}}"],
    ),
    "empty layers": ("version: 1\nlayers:", 2, "layers", ["must be a list, is empty"]),
    "rule as text": (
        "version: 1\nlayers:\n- lm_head",
        3,
        "layers[0]",
        [f"must be a mapping, is text ('lm_head'); allowed: {RULE_KEYS}"],
    ),
    "rule inside itself": ("version: 1\nlayers: &a [*a]", 2, "layers[0]", ["must be a mapping, is a list"]),
    # values
    "unknown precision": (
        "version: 1\nprefill:\n  precision: nvfp",
        3,
        "prefill.precision",
        ["'nvfp' is not one of them; allowed: auto, bf16, nvfp4, fp8, w8a16, w4a16; did you mean 'nvfp4'?"],
    ),
    "precision in capitals": ("version: 1\nprefill: {precision: FP8}", 2, "prefill.precision", ["did you mean 'fp8'?"]),
    "auto decode": (
        "version: 1\ndecode: {precision: auto}",
        2,
        "decode.precision",
        ["'auto' is not one of them; allowed: bf16, nvfp4, fp8"],
    ),
    "precision as a number": (
        "version: 1\nprefill: {precision: 8}",
        2,
        "prefill.precision",
        ["must be text, is an integer ('8'); allowed: auto, bf16, nvfp4, fp8"],
    ),
    "precision that YAML takes for a boolean": (
        "version: 1\nprefill: {precision: off}",
        2,
        "prefill.precision",
        ["must be text, is a boolean ('off'); allowed: auto, bf16, nvfp4, fp8"],
    ),
    "precision as a list": ("version: 1\nprefill: {precision: [fp8]}", 2, "prefill.precision", ["is a list"]),
    "precision left out": ("version: 1\nprefill: {precision: }", 2, "prefill.precision", ["must be text, is empty"]),
    "ready-made weights as a list": (
        "version: 1\nprefill: {weights: [a]}",
        2,
        "prefill.weights",
        ["must be text, is a list; allowed: the folder of an NVFP4 checkpoint, or its name on the hub"],
    ),
    "empty ready-made weights": (
        "version: 1\nprefill:\n  weights: ''",
        3,
        "prefill.weights",
        ["is empty; allowed: the"],
    ),
    "ready-made weights and FP8": (
        "version: 1\nprefill:\n  precision: fp8\n  weights: a/b",
        4,
        "prefill.weights",
        ["holds NVFP4 weights, but prefill is fp8; allowed with: auto, nvfp4"],
    ),
    "a rounding of no weights": (
        "version: 1\nprefill: {rounding: any}",
        2,
        "prefill.rounding",
        ["is that of ready-made weights; allowed with: weights"],
    ),
    "another rounding": (
        "version: 1\nprefill: {weights: a/b, rounding: gptq}",
        2,
        "prefill.rounding",
        ["gptq", "nearest, any"],
    ),
    "verify in words": ("version: 1\nverify: yes", 2, "verify", ["'yes' is not one of them; allowed: true, false"]),
    "python object": ("version: 1\nkernel: !!python/name:os.system x", 2, "kernel", ["tagged", "os.system"]),
    "min_tokens of zero": (
        "version: 1\nprefill: {min_tokens: 0}",
        2,
        "prefill.min_tokens",
        ["0 is too small; allowed: an integer of at least 1"],
    ),
    "min_tokens below zero": ("version: 1\nprefill: {min_tokens: -3}", 2, "prefill.min_tokens", ["-3 is too small"]),
    "min_tokens as a boolean": (
        "version: 1\nprefill: {min_tokens: true}",
        2,
        "prefill.min_tokens",
        ["must be an integer, is a boolean ('true'); allowed: an integer of at least 1"],
    ),
    "min_tokens as text": ("version: 1\nprefill: {min_tokens: many}", 2, "prefill.min_tokens", ["is text ('many')"]),
    "min_tokens as a fraction": ("version: 1\nprefill: {min_tokens: 1.5}", 2, "prefill.min_tokens", ["is a decimal"]),
    "min_tokens in octal": (
        "version: 1\nprefill: {min_tokens: 012}",
        2,
        "prefill.min_tokens",
        ["'012' is not written"],
    ),
    "min_tokens in base 60": ("version: 1\nprefill: {min_tokens: 1:30}", 2, "prefill.min_tokens", ["plain decimal"]),
    "protect as an integer": (
        "version: 1\nprotect: {last_prompt_token: 0}",
        2,
        "protect.last_prompt_token",
        ["must be a boolean, is an integer ('0'); allowed: true, false"],
    ),
    "protect as yes": (
        "version: 1\nprotect: {last_prompt_token: yes}",
        2,
        "protect.last_prompt_token",
        ["'yes' is not one of them; allowed: true, false"],
    ),
    "a tail of none": (
        "version: 1\nprotect: {last_prompt_tokens: 0}",
        2,
        "protect.last_prompt_tokens",
        ["0 is too small; allowed: an integer of at least 1"],
    ),
    "a tail without the last token": (
        "version: 1\nprotect:\n  last_prompt_token: false\n  last_prompt_tokens: 4",
        4,
        "protect.last_prompt_tokens",
        ["gives up"],
    ),
    "unknown kernel": (
        "version: 1\nkernel: emulate",
        2,
        "kernel",
        ["'emulate' is not one of them; allowed: auto, native, emulated; did you mean 'emulated'?"],
    ),
    "unknown scales": (
        "version: 1\nweights: {scales: absmx}",
        2,
        "weights.scales",
        ["allowed: absmax, search; did you mean 'absmax'?"],
    ),
    "description as a number": ("version: 1\ndescription: 7", 2, "description", ["must be text, is an integer ('7')"]),
    # rules
    "rule without match": (
        "version: 1\nlayers:\n- prefill: fp8",
        3,
        "layers[0].match",
        ["is missing; allowed: an exact module name, or re: and a regular expression"],
    ),
    "rule without a phase": (
        "version: 1\nlayers:\n- {match: a}",
        3,
        "layers[0]",
        ["names no precision; allowed: prefill, decode, or both"],
    ),
    "match as a number": (
        "version: 1\nlayers: [{match: 1, prefill: fp8}]",
        2,
        "layers[0].match",
        ["exact module name"],
    ),
    "empty match": ("version: 1\nlayers: [{match: '', prefill: fp8}]", 2, "layers[0].match", ["'' matches nothing"]),
    "empty regex": ("version: 1\nlayers: [{match: 're:', prefill: fp8}]", 2, "layers[0].match", ["'re:' matches"]),
    "bad regex": (
        "version: 1\nlayers:\n- prefill: fp8\n  match: 're:.*(down_proj'",
        4,
        "layers[0].match",
        ["'re:.*(down_proj' is not a regular expression: missing ), unterminated subpattern at position 2"],
    ),
    "regex that repeats too much": (
        "version: 1\nlayers: [{match: 're:a{99999999999}', prefill: fp8}]",
        2,
        "layers[0].match",
        ["is not a regular expression: the repetition number is too large"],
    ),
    "auto in a rule": (
        "version: 1\nlayers: [{match: a, prefill: auto}]",
        2,
        "layers[0].prefill",
        ["'auto' is not one of them; allowed: bf16, nvfp4, fp8"],
    ),
    "optional as text": (
        "version: 1\nlayers: [{match: a, prefill: fp8, optional: maybe}]",
        2,
        "layers[0].optional",
        ["must be a boolean, is text ('maybe'); allowed: true, false"],
    ),
    "optional by another word": (
        "version: 1\nlayers: [{match: a, prefill: fp8, optional: yes}]",
        2,
        "layers[0].optional",
        ["'yes' is not one of them; allowed: true, false"],
    ),
    "optional misspelt": (
        "version: 1\nlayers:\n- match: a\n  prefill: fp8\n  optinal: true",
        5,
        "layers[0].optinal",
        ["unknown key; allowed: match, prefill, decode, optional; did you mean 'optional'?"],
    ),
    "a rule that is only optional": (
        "version: 1\nlayers:\n- {match: a, optional: true}",
        3,
        "layers[0]",
        ["names no precision; allowed: prefill, decode, or both"],
    ),
    "null phase in a rule": (
        "version: 1\nlayers: [{match: a, prefill: fp8, decode: }]",
        2,
        "layers[0].decode",
        ["must be text, is empty; allowed: bf16, nvfp4, fp8"],
    ),
}


@pytest.mark.parametrize(("text", "line", "key", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path: Path, text: str, line: int, key: str, parts: list[str]) -> None:
    file = write(tmp_path, text)
    message = refusal(file)
    where, separator, what = message.removeprefix(f"{file}:{line}").partition(": ")
    assert message.startswith(f"{file}:{line}")
    assert (where.strip(), separator) == (key, ": ")
    for part in parts:
        assert part in what


@pytest.mark.parametrize(
    ("text", "at", "part"),
    [
        ("version: 1\nprefill: {precision: fp8", ":2:25", "expected ',' or '}'"),
        ("version: 1\nkernel: a: b", ":2:10", "mapping values are not allowed here"),
        ("version: 1\n\tkernel: auto", ":2:1", "'\\t' that cannot start any token"),
        ("version: 1\nkernel: *auto", ":2:9", "undefined alias 'auto'"),
        ("version: 1\n---\nversion: 1", ":2:1", "expected a single document"),
        ("version: 1\nkernel: a\x00b", ":2:10", "character '\\x00'"),
        ('version: 1\nkernel: "\\UFFFFFFFF"', "", "not valid YAML"),
        ("[" * 5000, "", "not valid YAML"),
        ('layers:\n- {match: "re:.*\\.o_proj"}', ":2:18", "'.'; write a regular expression in single quotes"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, at: str, part: str) -> None:
    file = write(tmp_path, text)
    message = refusal(file)
    assert message.startswith(f"{file}{at}: not valid YAML: ")
    assert part in message


def test_not_utf8(tmp_path: Path) -> None:
    file = write(tmp_path, b"version: 1\ndescription: caf\xe9\n")
    assert refusal(file) == f"{file}:2: byte 0xe9 is not UTF-8 text"


def test_a_long_value_stays_short(tmp_path: Path) -> None:
    assert len(refusal(write(tmp_path, f"version: 1\nkernel: {'x' * 5000}"))) < 300 + len(str(tmp_path))


def test_any_damage_is_one_line_or_a_recipe(tmp_path: Path) -> None:
    """500 broken copies of a good file: each loads or is refused in one line, and nothing else ever escapes."""
    rng = random.Random(0)
    pieces = [
        "\n",
        "\t",
        ":",
        "-",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "&a",
        "*a",
        "!!",
        "!x%0A ",
        "?",
        "|",
        "#",
        "\\",
        "1",
        "%",
        "  ",
    ]
    refused = 0
    for _ in range(500):
        text = FULL
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice([*pieces, ""]) + text[at + rng.randint(0, 3) :]
        file = write(tmp_path, text)
        try:
            recipe.load(str(file))
        except MixQuantError as error:
            refused += 1
            assert str(error).startswith(str(file))
            assert len(str(error).splitlines()) == 1
    assert refused > 250


def test_imports_neither_torch_nor_sglang() -> None:
    code = "import mixquant_sglang.recipe.matching, sys; print({'torch', 'sglang'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


WORDS = (
    "",
    "yes",
    "012",
    "null",
    "a: b # c",
    "'quoted' \"twice\"",
    "Größe 東京",
    "- x",
    "tab\there",
    " around ",
    "{a: 1}",
    "!!x",
)


def drawn(field: dataclasses.Field[Any], draw: random.Random) -> Any:
    """Any value that the field can have; a field that this does not know fails, so that nobody forgets it here."""
    choices: dict[str, Any] = {
        "name": ["a name"],
        "source": ["a file"],
        "prefill": recipe.PREFILL_PRECISIONS,
        "min_tokens": (None, *range(1, 5000)),
        "fuse": (False, True),
        "decode": recipe.PRECISIONS,
        "protect_last_prompt_token": (False, True),
        "kernel": recipe.KERNELS,
        "scales": recipe.SCALES,
        "description": WORDS,
        "protected_tail": range(1, 300),
        "verify": (False, True),
        "prefill_weights": ["", "a/folder with spaces", "RedHatAI/Qwen3-8B-NVFP4", "no", "1"],
        "prefill_weights_at": [""],
        "min_tokens_by": [""],
        "prefill_rounding": recipe.ROUNDINGS,
        "attention": ("bf16", "fp8"),
        "attention_from": range(16, 100000),
        "layers": [tuple(drawn_rule(draw) for _ in range(draw.randrange(4)))],
    }
    return draw.choice(choices[field.name])


def drawn_rule(draw: random.Random) -> LayerRule:
    choices: dict[str, Any] = {
        "match": [r"re:.*\.(qkv|o)_proj$", r"re:a\d+ 'b' \"c\" #", "model.layers.0.mlp.down_proj", "true", "~", "re:ü"],
        "prefill": [None, *recipe.PRECISIONS],
        "decode": [None, *recipe.PRECISIONS],
        "where": ["nowhere:1"],
        "optional": (False, True),
    }
    values = {field.name: draw.choice(choices[field.name]) for field in dataclasses.fields(LayerRule)}
    return LayerRule(**values) if values["prefill"] or values["decode"] else drawn_rule(draw)


def told_apart(made: Recipe) -> Recipe:
    """Without what only says where a recipe stands."""
    rules = tuple(dataclasses.replace(rule, where="") for rule in made.layers)
    return dataclasses.replace(made, name="", source="", prefill_weights_at="", layers=rules)


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    draw, file = random.Random(20261127), tmp_path / "written.yaml"
    seen: dict[str, set[Any]] = {field.name: set() for field in dataclasses.fields(Recipe)}
    done = 0
    while done < 300:
        made = Recipe(**{field.name: drawn(field, draw) for field in dataclasses.fields(Recipe)})
        if made.prefill_weights and not recipe.takes_ready_made(made.prefill, made.layers):
            continue
        if made.attention == "bf16":  # the file cannot say from where on then
            made = dataclasses.replace(made, attention_from=8192)
        elif made.prefill == "bf16":
            continue
        if not made.prefill_weights:  # nor of what a rounding is
            made = dataclasses.replace(made, prefill_rounding="nearest")
        if not made.protect_last_prompt_token:  # the file cannot ask for a tail then
            made = dataclasses.replace(made, protected_tail=1)
        file.write_text(made.to_yaml(), encoding="utf-8")
        assert told_apart(recipe.load(str(file))) == told_apart(made)
        for field in seen:
            seen[field].add(getattr(made, field))
        done += 1
    fixed = {"name", "source", "prefill_weights_at", "min_tokens_by"}
    assert {name for name, values in seen.items() if len(values) < 2} == fixed  # every other field was put to the test


def test_shipped_recipes_survive_being_written_and_read(tmp_path: Path) -> None:
    for name in recipe.shipped():
        (tmp_path / "written.yaml").write_text(recipe.load(name).to_yaml(), encoding="utf-8")
        assert told_apart(recipe.load(str(tmp_path / "written.yaml"))) == told_apart(recipe.load(name))


def test_a_long_key_does_not_make_a_long_message(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"version: 1\nprefill: {{{'a' * 900}: 1}}\n")
    with pytest.raises(MixQuantError, match=r"aaa\.\.\.'?: unknown key") as error:
        recipe.load(str(file))
    assert len(str(error.value)) < 600
