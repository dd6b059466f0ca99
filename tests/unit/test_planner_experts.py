"""The planner's mixtures of experts, hybrids, windows and latent attention: against measurements, and exact parts.

Measured: stock SGLang 0.5.17 on an H200, Qwen3-30B-A3B's dimensions with dummy weights, passes as timed on the GPU. The
rates of experts come from these very passes, so this test says that the model of a pass is right from 512 to 32768
tokens, not that it foresees another kernel. Ours, hybrids and wide heads: ``test_planner_measured.py``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mixquant_sglang.tools.plan.advice import PROMPTS, break_even
from mixquant_sglang.tools.plan.command import add_arguments
from mixquant_sglang.tools.plan.command import run as run_command
from mixquant_sglang.tools.plan.gpus import Gpu, find_gpu
from mixquant_sglang.tools.plan.models import MODELS, find_model
from mixquant_sglang.tools.plan.predict import Prediction
from mixquant_sglang.tools.plan.predict import predict as predict_plan
from mixquant_sglang.tools.plan.recipes import STOCK_BF16, STOCK_FP8, make_plan
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder, Experts

pytestmark = pytest.mark.once

H200 = find_gpu("H200")
QWEN = find_model("Qwen3-30B-A3B")
OTHERS = [model for model in MODELS if not model.is_plain]
BF16 = {512: 21.6, 2048: 35.9, 8192: 145.3, 32768: 1132.0}
FP8 = {512: 1.35, 2048: 1.33, 8192: 1.25, 32768: 1.13}  # --quantization fp8, times as fast


def predict(
    recipe: str, length: int, model: Decoder = QWEN, gpu: Gpu = H200, protect: bool | None = None, **work: int
) -> Prediction:
    made = Workload(length, **work)
    return predict_plan(make_plan(recipe, model, gpu, made.tp, protect, made.ep), model, gpu, made)


def passes(prediction: Prediction) -> float:
    return prediction.prefill_ms - prediction.prefill_parts["host"]


@pytest.mark.parametrize("length", BF16)
def test_passes_of_stock_servers(length: int) -> None:
    assert passes(predict(STOCK_BF16, length)) == pytest.approx(BF16[length], rel=0.02)
    assert passes(predict(STOCK_FP8, length)) == pytest.approx(BF16[length] / FP8[length], rel=0.02)


def test_decode_of_stock_servers() -> None:
    """Measured: 1.00x at batch 1 and 1.46x at batch 32."""
    for batch, times in ((1, 1.00), (32, 1.46)):
        bf16, fp8 = (predict(recipe, 512, batch=batch).decode_ms for recipe in ("bf16", STOCK_FP8))
        assert bf16 / fp8 == pytest.approx(times, rel=0.05)


def test_our_fp8_is_measured_and_others_say_that_they_are_not() -> None:
    ours, stock = predict("fp8", 8192, protect=False), predict(STOCK_FP8, 8192)
    assert ours.sources["fp8"].startswith("measured on an H200 (SGLang 0.5.17, this project's")
    assert stock.sources["fp8"].startswith("measured on an H200 (SGLang 0.5.17, Triton")
    assert ours.sources["bf16"] == stock.sources["fp8"]
    assert 0.9 < ours.prefill_parts["experts"] / stock.prefill_parts["experts"] < 1
    assert passes(ours) < passes(stock)  # the activation within the first GEMM, faster quantisers
    moved = (768 + 2048) / (3 * 768 + 2048)
    assert ours.prefill_parts["move"] == pytest.approx(moved * stock.prefill_parts["move"])
    b200 = predict("nvfp4", 8192, gpu=find_gpu("B200"))
    assert {source.partition(":")[0] for source in b200.sources.values()} == {"predicted"}
    assert predict("fp8", 8192, find_model("Qwen3-8B")).sources == {}


def test_experts_that_some_token_reaches() -> None:
    experts = Experts("mlp.experts", 128, 8, 768)
    assert experts.distinct(0) == 0
    assert experts.distinct(1) == pytest.approx(8)
    assert experts.distinct(64) == pytest.approx(128 * (1 - (15 / 16) ** 64)) == pytest.approx(125.9, abs=0.1)
    assert experts.distinct(1e6) == pytest.approx(128)


def test_protected_rows_read_experts_of_their_own() -> None:
    """A study of SGLang: 3.6, 13.2, 23.4, 37.3, 57.0 GB for 1, 4, 8, 16, 64 rows, 4.2 TB/s; here at the rate measured
    for 512 tokens, and with the launches."""
    gigabytes = {1: 3.6, 4: 13.2, 8: 23.4, 16: 37.3, 64: 57.0}
    launches = 48 * H200.rates.experts.block_us / 1e3
    for prompts, size in gigabytes.items():
        assert predict("fp8", 8192 // prompts, protect=False, batch=prompts).prefill_parts["protected"] == 0
        read = predict("fp8", 8192 // prompts, batch=prompts).prefill_parts["protected"] - launches
        few, fractions = H200.rates.protected
        dense = 48 * 2 * 2048 * (5120 + 4096) / (4.8e12 * fractions[prompts > few]) * 1e3
        move = 48 * prompts * 8 * (3 * 768 + 2048) * 4 / (4.8e12 * 0.89) * 1e3
        experts = (read - dense - move) / 1e3 * 4.8e12 * H200.rates.experts.read["bf16"] / 1e9
        assert experts == pytest.approx(size, rel=0.02)
    dense = predict("fp8", 8192, find_model("Qwen3-8B")).prefill_parts["protected"]
    assert predict("fp8", 8192).prefill_parts["protected"] < dense  # one row reads 40% of a dense 8B's bytes
    assert predict("fp8", 128, batch=64).prefill_parts["protected"] > 4 * dense


def test_rows_that_are_moved_and_quantised() -> None:
    parts = predict(STOCK_FP8, 8192).prefill_parts
    assert parts["move"] == pytest.approx(48 * 8192 * 8 * (2 * 768 + 768 + 2048) * 4 / (4.8e12 * 0.89) * 1e3)
    assert parts["move"] == predict("bf16", 8192).prefill_parts["move"]
    quantised = 48 * 8192 * (2048 + 8 * 768 + 2048 + 4096) * 3 / (4.8e12 * 0.45) * 1e3
    assert parts["quantise"] == pytest.approx(quantised)
    emulated = predict("nvfp4", 8192).prefill_parts
    assert emulated["dequantise"] > 48 * 128 * 3 * 768 * 2048 * 2.56 / (4.8e12 * 0.78) * 1e3


def test_ranks_share_the_experts() -> None:
    one, tp, ep = (predict("bf16", 8192, tp=tp, ep=ep).prefill_parts for tp, ep in ((1, 1), (4, 1), (4, 4)))
    assert tp["experts"] == ep["experts"] == pytest.approx(one["experts"] / 4)
    assert ep["move"] == pytest.approx(one["move"] / 4)
    assert tp["move"] > 1.5 * ep["move"]  # the rows' hidden states are not split
    assert one["all_reduce"] == 0 < tp["all_reduce"] == ep["all_reduce"]
    assert predict("bf16", 512, tp=2, batch=32).decode_ms < predict("bf16", 512, batch=32).decode_ms


def test_windows_see_no_more_than_their_tokens() -> None:
    work = Workload(8192)
    assert work.pairs(H200, None) == 8192 * (8192 + 128) / 2
    assert work.pairs(H200, 8192) == work.pairs(H200, None)
    assert work.pairs(H200, 1024) == 1024 * (1024 + 128) / 2 + 7168 * (1024 + 64)
    pairs = [work.pairs(H200, window) for window in (64, 128, 1000, 4096, 8191, 8192, 10**6)]
    assert pairs == sorted(pairs)
    later = Workload(32768, cached=24576)
    assert later.pairs(H200, 1024) == 8192 * (1024 + 64)
    assert Workload(3000, batch=7, chunk=1024).pairs(H200, None) == pytest.approx(
        sum(pairs for *_, pairs in Workload(3000, batch=7, chunk=1024).kinds_of_passes(H200))
    )
    gemma = find_model("Gemma-4-26B-A4B")
    peak, ms = 989.4e12 * 0.043 / 1e3, predict("bf16", 8192, gemma).prefill_parts["attention"]
    flops = 4 * 16 * (25 * 256 * work.pairs(H200, 1024) + 5 * 512 * work.pairs(H200, None))
    assert ms == pytest.approx(flops / peak)


def test_a_cache_that_does_not_grow() -> None:
    hybrid = find_model("Qwen3.5-35B-A3B")
    grown = predict("bf16", 65536, hybrid).decode_ms - predict("bf16", 1024, hybrid).decode_ms
    assert grown == pytest.approx(64512 * 20480 / (4.8e12 * 0.79) * 1e3, rel=0.01)
    parts = predict("bf16", 8192, hybrid).prefill_parts
    each = 2 * 32 * (64 * (3 * 128 + 2 * 128) + 3 * 128 * 128)
    assert parts["recurrence"] == pytest.approx(30 * 8192 * each / (989.4e12 * 0.028) * 1e3)
    assert "recurrence" not in predict("bf16", 8192).prefill_parts
    assert predict("bf16", 16384, hybrid).prefill_parts["recurrence"] == pytest.approx(2 * parts["recurrence"])


def test_latent_attention_reads_a_small_cache() -> None:
    flash = find_model("GLM-4.7-Flash")
    steps = [predict("bf16", n, flash).decode_ms for n in (1024, 65536)]
    assert steps[1] - steps[0] == pytest.approx(64512 * 47 * 1152 / (4.8e12 * 0.79) * 1e3, rel=0.01)
    flops = 8192 * (8192 + 128) / 2 * 47 * 2 * 20 * (192 + 64 + 256)
    assert predict("bf16", 8192, flash).prefill_parts["attention"] == pytest.approx(flops / (989.4e12 * 0.59) * 1e3)


@pytest.mark.parametrize("gpu", [find_gpu(name) for name in ("H200", "B200", "RTX 5090")], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("model", OTHERS, ids=lambda model: model.name)
def test_more_work_takes_longer(model: Decoder, gpu: Gpu) -> None:
    for recipe in ("bf16", "fp8", "auto", "nvfp4-emulated", STOCK_FP8):
        lengths = [predict(recipe, n, model, gpu).prefill_ms for n in (1, 64, 500, 513, 2048, 8192, 8193, 20000)]
        assert lengths == sorted(lengths)
        batches = [predict(recipe, 2048, model, gpu, batch=n) for n in (1, 2, 8, 64)]
        assert [one.prefill_ms for one in batches] == sorted(one.prefill_ms for one in batches)
        assert [one.decode_ms for one in batches] == sorted(one.decode_ms for one in batches)
        contexts = [predict(recipe, n, model, gpu).decode_ms for n in (1, 1000, 100000)]
        assert contexts == sorted(contexts)
        assert all(math.isfinite(ms) for ms in lengths)


def test_a_pass_of_many_prompts_gains_later() -> None:
    plan, bf16 = make_plan("fp8", QWEN, H200), make_plan("bf16", QWEN, H200)
    found = break_even(plan, bf16, QWEN, H200, 1)
    assert tuple(found) == PROMPTS
    one, few, many = found.values()
    assert one is not None
    assert few is not None
    assert many is not None
    assert one < 100 < few < many
    for prompts, tokens in ((16, few), (64, many)):
        for rows, gains in ((tokens, True), (tokens // 2, False)):
            fast = predict("fp8", rows // prompts, batch=prompts, chunk=rows)
            assert (fast.prefill_speedup > 1) == gains
    free = break_even(replace(plan, protect=False), bf16, QWEN, H200, 1)
    assert free[64] is not None
    assert free[64] < many
    assert set(break_even(make_plan("nvfp4", QWEN, H200), bf16, QWEN, H200, 1).values()) == {None}


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_command(parser.parse_args(arguments))


def test_json_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    run("Qwen3-30B-A3B", "--gpu", "H100", "--input-len", "8192", "--output-len", "100", "--json")
    made = json.loads(capsys.readouterr().out)
    bf16, fp8 = made["bf16"]["memory"], made["fp8"]["memory"]
    assert (bf16["fits"], fp8["fits"]) == (made["bf16"]["fits"], made["fp8"]["fits"]) == (True, False)
    assert (bf16["smallest_tp"], fp8["smallest_tp"]) == (1, 2)
    assert fp8["scratch"] == bf16["scratch"] == 2**29
    assert fp8["needed"] == fp8["weights"] + fp8["scratch"] + (8192 + 100) * fp8["kv_token"]
    assert fp8["weights"] == sum(fp8["parts"].values())
    assert fp8["weights"] - bf16["weights"] == made["fp8"]["extra_weight_bytes"]
    assert fp8["kv_tokens_left"] < 0 < bf16["kv_tokens_left"]
    assert fp8["would_fit"][0] == "fp8 with {match: 're:.*\\.experts$', prefill: bf16}"
    assert bf16["would_fit"] == []
    assert made["fp8"]["faster_from_tokens"].keys() == {"1", "16", "64"}
    assert "faster_from_tokens" not in made["bf16"]
    run("Qwen3-8B", "--gpu", "H200", "--input-len", "512", "--json")
    dense = json.loads(capsys.readouterr().out)["fp8"]
    assert dense["memory"]["fits"]
    assert dense["faster_from_tokens"].keys() == {"1", "16", "64"}


def test_stock_fp8_has_no_master(capsys: pytest.CaptureFixture[str]) -> None:
    run("Qwen3-30B-A3B", "--gpu", "H100", "--input-len", "512", "--json", "--recipe", "bf16", STOCK_FP8)
    made = json.loads(capsys.readouterr().out)
    weights = {name: one["memory"]["weights"] for name, one in made.items()}
    assert weights[STOCK_FP8] - weights["bf16"] == made[STOCK_FP8]["extra_weight_bytes"] < 0
    assert made[STOCK_FP8]["memory"]["fits"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    run("GLM-4.5-Air", "--gpu", "H200", "--input-len", "8192", "--recipe", "fp8", "bf16", "--tp", "2", "--ep", "2")
    out = capsys.readouterr().out
    assert "GLM-4.5-Air on 2 x H200: 1 x 8192 input tokens" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("fp8 ", "bf16 "))]
    assert [row[4] for row in rows[2:4]] == ["no", "yes"]  # fp8, bf16
    assert [row[-1] for row in rows[2:4]] == ["4", "2"]
    assert "Recipes that fit on as many GPUs: fp8 with {match" in out
    assert "fp8 measured on an H200 (SGLang 0.5.17, this project's" in out
    assert out.splitlines()[-1].startswith("Predictions, not measurements.")
    run("Qwen3.5-9B", "--gpu", "RTX 5090", "--input-len", "512", "--recipe", "auto")
    out = capsys.readouterr().out
    assert "The gated delta rule: at a rate between" in out
    assert "for each request's states" in out
    assert "Tokens of a pass from which on" in out
    run("Qwen3.5-9B", "--gpu", "RTX 5090", "--input-len", "512", "--recipe", "bf16")
    assert "Tokens of a pass from which on" not in capsys.readouterr().out


def test_what_no_kernel_takes_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    odd = {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 20}
    odd |= {"num_attention_heads": 2, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    run(str(tmp_path), "--gpu", "H200", "--input-len", "512", "--recipe", "fp8", "bf16")
    lines = [line for line in capsys.readouterr().out.splitlines() if "stays BF16" in line]
    names = [line.split(" stays BF16: ")[0] for line in lines]
    assert names == [f"fp8: {name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "block_sparse_moe.experts")]


def test_a_model_without_a_cache_that_grows_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Linear attention in all blocks: packed weights take the place of no token."""
    config = {"model_type": "qwen3_next", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16}
    config |= {"num_attention_heads": 4, "intermediate_size": 64, "layer_types": ["linear_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(str(tmp_path), "--gpu", "H200", "--input-len", "512", "--json", "--recipe", "fp8")
    made = json.loads(capsys.readouterr().out)["fp8"]
    assert made["extra_weight_bytes"] > 0 and made["kv_tokens_displaced"] == 0


def test_a_rule_from_would_fit_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("Qwen3-30B-A3B", "--gpu", "H100", "--input-len", "512", "--json", "--recipe", "fp8")
    (first, *_) = json.loads(capsys.readouterr().out)["fp8"]["memory"]["would_fit"]
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\nprefill: {{precision: fp8}}\nlayers:\n- {first.partition(' with ')[2]}\n")
    run("Qwen3-30B-A3B", "--gpu", "H100", "--input-len", "8192", "--json", "--recipe", str(file))
    made = json.loads(capsys.readouterr().out)[str(file)]
    assert made["memory"]["fits"]
    assert "packed_experts" not in made["memory"]["parts"]
    assert made["prefill_speedup"] > 1


@pytest.mark.parametrize(("name", "precision"), [("B200", "nvfp4"), ("RTX 5090", "bf16"), ("H200", "fp8")])
def test_experts_by_gpu(name: str, precision: str) -> None:
    """As a server does: SM120 has no NVFP4 experts with a scale for each token."""
    experts = [one for one in make_plan("auto", QWEN, find_gpu(name), 1).placed if one.experts]
    assert {one.prefill for one in experts} == {precision}
    said = {one.refusal for one in experts}
    expected = "NVFP4 experts with a scale for each token run on SM100 and SM103 alone" if precision == "bf16" else None
    assert said == {expected}
