"""What `mixquant quantize` writes of experts is what the installed SGLang loads without the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang.recipe.modules import EXPERT_LEAVES, block_of, expert_of
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.tools.quantize.targets import Targets
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT, Layout
from tests.support import tiny_fused_experts, tiny_models
from tests.support.stock_load import digest
from tests.unit.test_checkpoint import read

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = 4
CASES = [
    ("qwen3_moe", COMPRESSED_TENSORS),
    ("qwen3_moe", MODELOPT),
    ("mixtral", COMPRESSED_TENSORS),  # with ModelOpt's, its experts are linears to SGLang
    ("gemma4", COMPRESSED_TENSORS),
    ("gemma4", MODELOPT),
    ("llama4", COMPRESSED_TENSORS),
    ("qwen3_5_moe", MODELOPT),
    ("qwen3_vl_moe", COMPRESSED_TENSORS),
]


IGNORED = [(family, layout) for family in ("qwen3_moe", "gemma4") for layout in (COMPRESSED_TENSORS, MODELOPT)]


@dataclass(frozen=True)
class Made:
    """``source`` was quantised into ``out``; ``found``: what stock SGLang made of that."""

    source: Path
    out: Path
    targets: Targets
    found: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Made]:
    folder = tmp_path_factory.mktemp("experts")
    wanted = [(*case, False) for case in CASES] + [(*case, True) for case in IGNORED]
    sources: dict[str, Path] = {}
    outs: list[tuple[Path, Targets]] = []
    for family, layout, ignored in wanted:
        if family not in sources:
            maker = tiny_models if family in ("qwen3_moe", "mixtral") else tiny_fused_experts
            sources[family] = maker.make(folder, family)
        out = folder / f"{family}-{layout.name}-{ignored}"
        ignore = [r"re:.*layers\.1\..*experts"] if ignored else []
        outs.append((out, quantize_checkpoint(sources[family], out, scales="search", layout=layout, ignore=ignore)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.stock_load", *(str(out) for out, _ in outs)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("LOADED ", "FAILED "))]
    assert len(lines) == len(outs), done.stderr[-4000:]
    assert not any(line.startswith("FAILED") for line in lines), f"{lines}\n{done.stderr[-6000:]}"
    return {
        (family, layout.name, ignored): Made(sources[family], out, targets, json.loads(line.removeprefix("LOADED ")))
        for (family, layout, ignored), (out, targets), line in zip(wanted, outs, lines, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_stock_sglang_loads_it(made: dict[tuple[str, str, bool], Made], family: str, layout: Layout) -> None:
    one = made[family, layout.name, False]
    targets, loaded = one.targets, read(one.out)
    assert targets.experts == 2 * 3 * EXPERTS
    layers = {expert[0]: block_of(expert[0]) for module in targets.quantised if (expert := expert_of(module))}
    found = {block_of(f"{name}."): parameters for name, (_, parameters) in one.found.items()}
    assert sorted(found) == sorted(block for block in layers.values()) == [0, 1]
    for layer, block in layers.items():
        gate, up, down = next(each for each in EXPERT_LEAVES if f"{layer}.0.{each[0]}" in targets.quantised)

        def stacked(leaf: str, kind: str, layer: str = layer) -> torch.Tensor:
            return torch.stack([loaded[f"{layer}.{expert}.{leaf}.{kind}"] for expert in range(EXPERTS)])

        for kind in (layout.codes, layout.scales):
            shape, there = found[block][f"w2_{kind}"]
            whole = stacked(down, kind).view(torch.uint8)
            assert shape == list(whole.shape) and there == digest(whole)
        orders = [[gate, up], [up, gate]]  # the second for FlashInfer's CUTLASS kernel
        fits = [
            all(
                found[block][f"w13_{kind}"][1]
                == digest(torch.cat([stacked(x, kind).view(torch.uint8) for x in both], 1))
                for kind in (layout.codes, layout.scales)
            )
            for both in orders
        ]
        assert sum(fits) == 1
        for kind in (layout.tensor_scale, layout.input_scale):
            ones = [stacked(leaf, kind).reshape(EXPERTS) for leaf in (gate, up, down)]
            assert found[block][f"w13_{kind}"] == [[EXPERTS, 2], digest(torch.stack(ones[:2], dim=1))]
            assert found[block][f"w2_{kind}"] == [[EXPERTS], digest(ones[2])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"), IGNORED, ids=lambda value: value if isinstance(value, str) else value.name
)
def test_stock_sglang_keeps_what_was_ignored(
    made: dict[tuple[str, str, bool], Made], family: str, layout: Layout
) -> None:
    one = made[family, layout.name, True]
    found = {block_of(f"{name}."): parameters for name, (_, parameters) in one.found.items()}
    assert f"w13_{layout.codes}" in found[0] and found[0][f"w13_{layout.scales}"]
    assert set(found[1]) == {"w13_weight", "w2_weight"}
    tensors = read(one.source)
    if family == "gemma4":
        weight = tensors["model.language_model.layers.1.experts.down_proj"]
    else:
        weight = torch.stack([tensors[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(EXPERTS)])
    assert found[1]["w2_weight"] == [list(weight.shape), digest(weight)]
