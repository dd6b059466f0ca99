"""DP attention on SGLang's own model runner: four processes over gloo, two ranks of attention of two parts each.

Each of the two has requests of its own, of odd lengths, so that SGLang pads their rows; MLPs see the rows of both.  A
minute on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import caches, model_runs
from tests.support.processes import module
from tests.support.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TP, DP, STEPS = 4, 2, 2
PROMPTS = ([151, 62], [35])  # of either rank of attention
ALL = [prompts for prompts in PROMPTS for _ in range(TP // DP)]  # of each process
ARGS = {"tp_size": TP, "dp_size": DP, "enable_dp_attention": True}
OWN = {"fp8": {"model.layers.N.self_attn.qkv_proj": 2, "model.layers.N.self_attn.o_proj": 2}}  # two layers of each


def make(folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 4096},
        **{"tie_word_embeddings": False, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2},
    )
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Of each process: the results of the cases by name."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = caches.cases(str(make(folder)), ARGS)
    cases["unsorted"] = {**cases["auto"], "unsorted": True, "policy": False}
    (folder / "low.yaml").write_text("version: 1\nprefill: {precision: fp8}\ndecode: {precision: fp8}\n")
    cases["decodes low"] = {**cases["auto"], "recipe": str(folder / "low.yaml")}
    env = {**os.environ, **model_runs.CPU, "SGLANG_CPU_OMP_THREADS_BIND": "|".join("0101")}
    port = free_port()
    processes, logs = [], [(folder / f"rank-{rank}.log").open("wb") for rank in range(TP)]
    for rank, log in enumerate(logs):
        own = json.dumps([{**case, "prompts": ALL[rank], "steps": STEPS} for case in cases.values()])
        command = module("tests.support.run_ranks", own, str(rank), str(port))
        processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=log))
    try:
        said = [process.communicate(timeout=800)[0].decode() for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    out = []
    for rank, text in enumerate(said):
        results = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert len(results) == len(cases), (folder / f"rank-{rank}.log").read_text(errors="replace")[-3000:]
        out.append(dict(zip(cases, results, strict=True)))
    return out


def test_each_rank_is_stock_in_bf16(ran: list[dict[str, dict[str, Any]]]) -> None:
    """By recipe bf16, and by requests that ask for it, to the last bit."""
    for rank in ran:
        assert rank["bf16"]["bits"] == rank["stock"]["bits"] == rank["auto"]["policy"]["bits"]
        assert rank["auto"]["bits"][0] != rank["stock"]["bits"][0]  # another computation
    assert ran[0]["stock"]["bits"] == ran[1]["stock"]["bits"] != ran[2]["stock"]["bits"] == ran[3]["stock"]["bits"]


def test_low_is_what_sees_the_rows_of_its_rank(ran: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ran:
        state = rank["auto"]["after"]
        assert rank["auto"]["low"] == OWN and state["layers"] == {"fp8": 4, "bf16": 5}  # with lm_head
        (reason,) = (why for why in state["stays_bf16"] if why.startswith("DP attention: "))
        assert "mlp.gate_up_proj" in state["stays_bf16"][reason] and "self_attn" not in state["stays_bf16"][reason]
        log = "\n".join(rank["auto"]["log"])
        assert "a tiny prompt ran 4 of 4 low linears" in log
        assert "DP attention: low are the linears beside attention" in log and "fused in prefill" not in log


def test_each_rank_counts_its_own_rows(ran: list[dict[str, dict[str, Any]]]) -> None:
    """Not those that SGLang adds so that its two parts share them."""
    for rank, prompts in zip(ran, ALL, strict=True):
        after = rank["auto"]["after"]
        assert after["tokens"]["prefill"] == {"fp8": sum(prompts) - len(prompts), "bf16": len(prompts)}
        assert after["tokens"]["decode"] == {"bf16": STEPS * len(prompts)}
        assert after["protected_rows"] == len(prompts)


def test_what_is_given_other_rows_is_found_by_running(ran: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ran:
        assert rank["unsorted"]["low"] == OWN and rank["unsorted"]["bits"] == rank["auto"]["bits"]
        assert "a tiny prompt ran 4 of 8 low linears" in "\n".join(rank["unsorted"]["log"])


def test_a_low_decode_is_refused(ran: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ran:
        assert "in low precision, which does not go with DP attention" in rank["decodes low"]["refused"]
