"""One model on two GPUs: tensor and experts parallel, replicas, DP attention, pipeline stages; three servers of each.

With the same flags recipe bf16 answers as stock SGLang does, token for token and logprob for logprob.  With the default
recipe each rank, not the one that answers alone, counts what it ran: prompt rows low but the protected ones, decode
BF16.  All servers of a wave start at once, of models of a few MB; the whole takes about seven minutes.  A table at the
end says what was seen.  By hand: ``PARALLEL=dp-attention`` runs the kinds that contain it.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.support import plugins
from tests.support.server import Server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

KINDS: dict[str, list[str]] = {
    "--tp 2": ["--tp-size", "2"],
    "--pp-size 2": ["--pp-size", "2"],
    "--dp-size 2": ["--dp-size", "2"],
    "--tp 2 --ep-size 2": ["--tp-size", "2", "--ep-size", "2"],
    "--dp-size 2 --enable-dp-attention": ["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"],
}
KINDS = {kind: flags for kind, flags in KINDS.items() if os.environ.get("PARALLEL", "") in kind}
WAVES = (("--tp 2", "--pp-size 2"), ("--dp-size 2", "--tp 2 --ep-size 2"), ("--dp-size 2 --enable-dp-attention",))
RECIPES = ("stock", "bf16", "auto")
PROMPTS = (300, 7, 129, 640)
NEW = 24
FLAGS = [
    *("--skip-tokenizer-init", "--random-seed", "1", "--chunked-prefill-size", "256", "--mem-fraction-static", "0.5"),
    *("--max-running-requests", "8", "--cuda-graph-max-bs-decode", "8", "--disable-radix-cache"),
]


def make_moe(folder: Path) -> Path:
    """A Qwen3-MoE of random weights: 8 experts, of which 2 take a token."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "tie_word_embeddings": False},
        **{"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2},
    )
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "moe")
    return folder / "moe"


class Ranks:
    """What the processes of a server that ran passes say of themselves."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> dict[str, dict[str, Any]]:
        time.sleep(1)  # a pass that overlaps with the answer of the last one
        return {file.stem: json.loads(file.read_text()) for file in self._folder.glob("*.json")}

    @staticmethod
    def counted(one: dict[str, Any], low: str) -> dict[str, int]:
        prefill, decode = one["tokens"]["prefill"], one["tokens"]["decode"]
        return {
            "extend rows": one["rows"].get("EXTEND", 0),
            "low prefill": prefill.get(low, 0),
            "bf16 prefill": prefill.get("bf16", 0),
            "protected": one["protected"],
            "decode rows": one["rows"].get("DECODE", 0),
            "bf16 decode": decode.get("bf16", 0),
            "low decode": sum(n for precision, n in decode.items() if precision != "bf16"),
        }


def start(kind: str, wanted: str, model: Path, logs: Path) -> tuple[Server, Ranks]:
    name = f"{kind}-{wanted}".replace(" ", "").replace("--", "-").strip("-")
    folder = logs / f"{name}-ranks"
    folder.mkdir()
    spy = plugins.write(folder, "ranks", plugins.RANKS)
    env = {"RANKS_FOLDER": str(folder), "NCCL_NVLS_ENABLE": "0"}
    flags = [*FLAGS, *KINDS[kind]]
    if wanted == "stock":
        return Server(model, logs, name, *flags, env={**env, "SGLANG_PLUGINS": "none"}), Ranks(folder)
    flags += ["--quantization", "mixquant", "--mixquant-recipe", wanted]
    return Server(model, logs, name, *flags, env=env, pythonpath=[spy]), Ranks(folder)


def answers(server: Server, *, replicas: bool) -> list[tuple[list[int], list[float]]]:
    """Of each prompt by itself; of replicas from each of them."""
    out = []
    for rank in (0, 1) if replicas else (None,):
        for seed, length in enumerate(PROMPTS):
            rng = random.Random(seed)
            prompt = [rng.randrange(10, 2000) for _ in range(length)]
            routed = {} if rank is None else {"routed_dp_rank": rank}
            one = server.generate(prompt, NEW, return_logprob=True, **routed)
            out.append((one["output_ids"], [entry[0] for entry in one["meta_info"]["output_token_logprobs"]]))
    return out


def tokens_per_second(server: Server) -> float:
    """Generated, of 8 requests at once."""
    prompts = [[random.Random(i).randrange(10, 2000) for _ in range(200)] for i in range(8)]
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda prompt: server.generate(prompt, 64), prompts))
    return 8 * 64 / (time.perf_counter() - began)


def ask(kind: str, wanted: str, server: Server, ranks: Ranks) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if wanted != "stock":
        states = requests.get(server.url + "/server_info", timeout=60).json()["internal_states"]
        out["states"] = [state["mixquant"] for state in states]
    low = out["states"][0]["precision"]["prefill"] if "states" in out else "bf16"
    before = ranks.read()
    out["answers"] = answers(server, replicas="--dp-size" in kind)
    after = ranks.read()
    out["ranks"] = {
        pid: {
            what: n - (Ranks.counted(before[pid], low)[what] if pid in before else 0)
            for what, n in Ranks.counted(one, low).items()
        }
        for pid, one in after.items()
    }
    out["tokens/s"] = tokens_per_second(server)
    return out


@pytest.fixture(scope="module")
def ran(tiny_model: Path, logs: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    moe = make_moe(logs)
    out: dict[str, dict[str, Any]] = {}
    for wave in WAVES:
        with ExitStack() as running:
            started = {}
            for kind in (kind for kind in wave if kind in KINDS):
                for wanted in RECIPES:
                    model = moe if "--ep-size" in kind else tiny_model
                    started[kind, wanted] = start(kind, wanted, model, logs)
                    running.callback(started[kind, wanted][0].__exit__)
            for (kind, wanted), (server, ranks) in started.items():
                try:
                    server.wait()
                    out.setdefault(kind, {})[wanted] = ask(kind, wanted, server, ranks)
                except (AssertionError, requests.RequestException) as error:
                    out.setdefault(kind, {})[wanted] = {"error": str(error)}
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{_table(out)}")
    yield out


def _table(ran: dict[str, dict[str, Any]]) -> str:
    rows = [
        ("flags", "recipe", "equals stock", "each rank: low + BF16 prefill rows, protected, BF16 decode", "tokens/s")
    ]
    for kind, results in ran.items():
        stock = results["stock"].get("answers")
        for wanted, result in results.items():
            if "error" in result:
                rows.append((kind, wanted, "-", " ".join(result["error"].split())[-200:], "-"))
                continue
            each = "; ".join(
                f"{r['low prefill']} + {r['bf16 prefill']}, {r['protected']}, {r['bf16 decode']}"
                for r in result["ranks"].values()
            )
            same = "-" if wanted == "stock" else str(result["answers"] == stock)
            rows.append((kind, wanted, same, each or "-", f"{result['tokens/s']:.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_bf16_is_stock(kind: str, ran: dict[str, dict[str, Any]]) -> None:
    stock, control = ran[kind]["stock"], ran[kind]["bf16"]
    assert "error" not in stock and "error" not in control, (stock, control)
    assert control["answers"] == stock["answers"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_counts_what_it_ran(kind: str, ran: dict[str, dict[str, Any]]) -> None:
    auto = ran[kind]["auto"]
    assert "error" not in auto, auto
    rows, prompts = sum(PROMPTS), len(PROMPTS)
    assert len(auto["ranks"]) == 2  # each of them ran all prompts: its replica's, its stage's, its part's
    for rank in auto["ranks"].values():
        assert rank["low prefill"] == rows - prompts and rank["bf16 prefill"] == rank["protected"] == prompts
        assert rank["extend rows"] == rows
        assert rank["low decode"] == 0 and rank["bf16 decode"] == rank["decode rows"] >= prompts * (NEW - 1)
    assert auto["answers"] != ran[kind]["stock"]["answers"]  # another computation


@pytest.mark.skipif("--dp-size 2 --enable-dp-attention" not in KINDS, reason="PARALLEL leaves it out")
def test_with_dp_attention_low_are_the_linears_of_attention(ran: dict[str, dict[str, Any]]) -> None:
    for state in ran["--dp-size 2 --enable-dp-attention"]["auto"]["states"]:
        assert state["layers"]["bf16"] >= sum(n for precision, n in state["layers"].items() if precision != "bf16") > 0
        (reason,) = (why for why in state["stays_bf16"] if why.startswith("DP attention: "))
        assert "mlp." in state["stays_bf16"][reason] and "self_attn" not in state["stays_bf16"][reason]


@pytest.mark.skipif(len(KINDS) < 5, reason="PARALLEL leaves some out")
def test_replicas_and_stages_say_what_they_hold(ran: dict[str, dict[str, Any]]) -> None:
    assert len(ran["--dp-size 2"]["auto"]["states"]) == 2
    (state,) = ran["--pp-size 2"]["auto"]["states"]
    stages = state["stages"]
    assert len(stages) == 2 and all(stage["extra_weight_bytes"] > 0 for stage in stages)
    for precision, n in state["layers"].items():
        assert n == sum(stage["layers"].get(precision, 0) for stage in stages)
    (moe,) = ran["--tp 2 --ep-size 2"]["auto"]["states"]
    assert sum(n for precision, n in moe["experts"].items() if precision != "bf16") == 4
