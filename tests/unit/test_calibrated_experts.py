"""Inputs of experts over a calibration run: what transformers' own experts get, expert by expert."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, expert_of
from mixquant_sglang.tools.quantize.calibration import measure_inputs
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.tools.quantize.model_experts import ModelExperts
from mixquant_sglang.tools.quantize.targets import Targets
from mixquant_sglang.weights.checkpoint import Source
from tests.support import tiny_fused_experts, tiny_models
from tests.support.words import save_tokenizer
from tests.unit.test_checkpoint import config_of, decompressed, read

TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11 w12 w13"]
LINES = "".join(f'{{"text": "{text}"}}\n' for text in TEXTS)


def made(folder: Path, family: str) -> Path:
    maker = tiny_models if family in ("qwen3_moe", "mixtral") else tiny_fused_experts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = maker.make(folder, family)
    save_tokenizer(model)
    return model


def expected(folder: Path) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, expert) -> rows that it gets, and what its down gets of them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rows: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for i, layer in enumerate(getattr(model.model, "language_model", model.model).layers):
        experts = layer.experts if hasattr(layer, "experts") else layer.mlp.experts

        def note(module: Any, inputs: tuple[Any, ...], i: int = i) -> None:
            x, picked = inputs[0], inputs[1]
            for token in range(len(x)):
                for expert in picked[token].tolist():
                    w13 = module.gate_up_proj[expert]
                    gate, up = (w13 @ x[token]).chunk(2)
                    rows.setdefault((i, expert), []).append((x[token], module.act_fn(gate) * up))

        experts.register_forward_pre_hook(note)
    with torch.inference_mode():
        for text in TEXTS:
            model(torch.tensor([[int(word[1:]) for word in text.split()]]))
    return {key: (torch.stack([a for a, _ in of]), torch.stack([b for _, b in of])) for key, of in rows.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma4"])
def test_each_expert_is_measured(tmp_path: Path, family: str) -> None:
    folder = made(tmp_path, family)
    quantised = Targets.of(Source.open(folder), []).quantised
    found = measure_inputs(folder, [{"text": text} for text in TEXTS], quantised, "cpu")
    seen = expected(folder)
    assert found.amax.keys() == found.energy.keys() == quantised.keys()
    for module in quantised:
        if not (expert := expert_of(module)):
            continue
        layer, number, leaf = expert
        block, which = int(layer.partition("layers.")[2][0]), int(leaf in {each[2] for each in EXPERT_LEAVES})
        everything = torch.cat([x[which] for (other, _), x in seen.items() if other == block]).float()
        assert found.amax[module] == pytest.approx(float(everything.abs().max()), rel=0.02)
        if (block, number) in seen:
            mean = seen[block, number][which].float().square().mean(dim=0)
            assert torch.allclose(found.energy[module], mean, rtol=0.05, atol=0.02 * float(mean.max()))
        else:
            assert not found.energy[module].any()


def test_scales_weighted_by_inputs_of_each_expert(tmp_path: Path) -> None:
    folder, file = made(tmp_path, "qwen3_moe"), tmp_path / "data.jsonl"
    file.write_text(LINES)
    outs = {}
    for scales in ("search", "weighted"):
        quantize_checkpoint(folder, tmp_path / scales, scales=scales, calibration=file)
        outs[scales] = read(tmp_path / scales)
    seen, source, better = expected(folder), read(folder), 0
    config = config_of(tmp_path / "weighted")
    for (block, expert), (x, _) in seen.items():
        name = f"model.layers.{block}.mlp.experts.{expert}.gate_proj"
        energy, weight = x.float().square().mean(dim=0), source[f"{name}.weight"].float()
        errors = [
            float(((decompressed(outs[scales], config, name).float() - weight).square() * energy).sum())
            for scales in ("search", "weighted")
        ]
        assert errors[1] <= errors[0] * (1 + 1e-4)
        better += errors[1] < 0.99 * errors[0]
    assert better > len(seen) // 2
    for leaf in ("gate_proj", "down_proj"):
        scales_ = {float(outs["search"][f"model.layers.0.mlp.experts.{e}.{leaf}.input_global_scale"]) for e in range(4)}
        assert len(scales_) == 1 and scales_ != {1.0}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_experts_that_transformers_runs_otherwise_are_refused(family: str) -> None:
    import transformers

    if family == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        module = GptOssExperts(transformers.GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=2))
    else:
        from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

        module = Llama4TextExperts(
            transformers.Llama4TextConfig(hidden_size=32, intermediate_size=32, num_local_experts=2)
        )
    with pytest.raises(MixQuantError, match=r"a\.experts: transformers runs the experts of \w+Experts in a way that"):
        ModelExperts("a.experts", module)
