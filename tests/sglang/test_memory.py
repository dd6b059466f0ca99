"""A server that runs out of memory at load says what its recipe takes and what would fit."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import runtime, shortage
from mixquant_sglang.host.assignment import Assignment
from mixquant_sglang.host.hooks import memory
from mixquant_sglang.host.lifecycle import LoadSteps
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions import machine
from mixquant_sglang.weights.refresh import Weights

H100 = Device("NVIDIA H100", (9, 0))
A3B = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)
SAID = (
    r"recipe fp8 takes 9\d\.\d GB of each NVIDIA H100, SM90 \(\d+\.\d of it packed beside 6\d\.\d GB of BF16 weights\)"
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> tuple[Runtime, Any]:
    made = recipe.load("fp8")
    run = Runtime(made, select(made, H100))
    monkeypatch.setattr(runtime, "_runtime", run)
    monkeypatch.setattr(machine, "device", lambda: H100)
    monkeypatch.setattr(shortage, "_memory", lambda device: 80e9)
    args = SimpleNamespace(tp_size=1, ep_size=1)
    monkeypatch.setattr(shortage, "dialect", lambda: SimpleNamespace(resolved=lambda _: args))
    return run, SimpleNamespace(server_args=args, model_config=SimpleNamespace(hf_config=A3B), device="cuda")


def test_bytes_and_recipes_that_fit(server: tuple[Runtime, Any]) -> None:
    run, runner = server
    said = shortage.explain(run, runner)
    assert re.match(SAID, said), said
    assert "it fits on --tp 2; on --tp 1 fit: " in said and "bf16" in said.partition("on --tp 1 fit: ")[2]


def test_a_model_that_cannot_be_counted_says_so(server: tuple[Runtime, Any]) -> None:
    run, runner = server
    runner.model_config.hf_config = SimpleNamespace(to_dict=lambda: {"architectures": ["Mamba2ForCausalLM"]})
    assert "what would fit is not known" in shortage.explain(run, runner)


def test_loading_that_runs_out(server: tuple[Runtime, Any]) -> None:
    run, runner = server

    def load(_runner: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.\nmore")

    with pytest.raises(SystemExit, match=f"out of memory while loading: CUDA out of memory. Tried .* GiB.; {SAID}"):
        memory.load_within_memory(load, runner)
    run.selection = select(recipe.load("bf16"), H100)
    with pytest.raises(torch.OutOfMemoryError):  # SGLang's own affair
        memory.load_within_memory(load, runner)


def test_packing_that_runs_out(server: tuple[Runtime, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, runner = server

    class Layer:
        name, stale = "model.layers.0.mlp.experts", True

        def pack(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    weights = Weights()
    weights.layers.append(Layer())  # type: ignore[arg-type]
    run.weights = weights
    monkeypatch.setattr(weights, "keep", lambda methods: None)
    run.shortage = lambda: shortage.explain(run, runner)
    steps = LoadSteps(run, Assignment(run.recipe, run.selection, None))
    with pytest.raises(MixQuantError, match=f"cannot pack model.layers.0.mlp.experts: CUDA out of memory.; {SAID}"):
        steps._finish_weights(torch.nn.Module())


def test_a_pool_without_tokens(server: tuple[Runtime, Any]) -> None:
    run, runner = server
    seen: list[Any] = []
    pool = SimpleNamespace(max_total_num_tokens=0)
    memory.size_pool(seen.append, pool)  # nothing was loaded: SGLang's own error
    run.shortage = lambda: shortage.explain(run, runner)
    with pytest.raises(SystemExit, match=f"no memory is left for the KV cache: {SAID}"):
        memory.size_pool(seen.append, pool)
    pool.max_total_num_tokens = 100
    memory.size_pool(seen.append, pool)
    assert seen == [pool, pool]
