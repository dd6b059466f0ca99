"""Speculative decoding on a GPU: NGRAM, STANDALONE with the served model as its own draft, EAGLE with a head of one
layer that is trained here for some seconds, EAGLE3 with a random one.

Twelve servers side by side, of stock SGLang, recipe bf16 and recipe auto for each.  They start together and are asked
one after another.  The last test prints a table.  By hand: ``SPECULATION=EAGLE,NGRAM`` runs these alone.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from scripts.models.tiny_tasks import examples
from tests.e2e.test_servers import BF16_POLICY, ids
from tests.support import eagle_head, plugins
from tests.support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.gpu, pytest.mark.timeout(1800)]

DRAFTED = 4
FLAGS = ["--random-seed", "1", "--sleep-on-idle", "--chunked-prefill-size", "4096", "--max-running-requests", "8"]
FLAGS += ["--cuda-graph-bs-prefill", "64", "512", "1024", "2048", "4096", "--enable-metrics"]
CHAIN = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"]
KINDS = ("stock", "bf16", "auto")
ALGORITHMS = tuple(os.environ.get("SPECULATION", "NGRAM,STANDALONE,EAGLE,EAGLE3").split(","))
TOKENS = 64
FAILED: dict[tuple[str, str], str] = {}  # servers that did not start, and why

Asked = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> list[list[int]]:
    """Of tasks that the model was trained on, and one of noise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    made = [
        [*tokenizer.apply_chat_template(one.messages, add_generation_prompt=True, tokenize=True, return_dict=False)]
        for task in ("find", "quote", "hops")
        for one in examples(task, "eval", 2, 3, length=1500)
    ]
    return [*made, ids(random.Random(8), 700)]


@pytest.fixture(scope="module")
def head(tiny_model: Path, logs: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).cuda().eval()
    texts = []
    for task in ("find", "quote", "hops"):
        for one in examples(task, "train", 32, 4, length=400):
            found = tokenizer.apply_chat_template(
                one.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            texts.append([*found][-256:])
    width = min(map(len, texts))
    given = torch.tensor([text[-width:] for text in texts], device="cuda")
    said = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=96, min_new_tokens=96, do_sample=False
    )
    del model
    return eagle_head.make(tiny_model, logs / "eagle", said.tolist(), steps=600, device="cuda")


@pytest.fixture(scope="module")
def servers(tiny_model: Path, head: Path, logs: Path) -> Iterator[dict[tuple[str, str], Server]]:
    folder = logs / "speculation"
    folder.mkdir()
    shim = plugins.write(folder, "cpu_shim", plugins.CPU_SHIM)
    of = {
        "NGRAM": ["--speculative-num-draft-tokens", str(DRAFTED), "--speculative-ngram-max-bfs-breadth", "1"],
        "STANDALONE": ["--speculative-draft-model-path", str(tiny_model), *CHAIN],
        "EAGLE": ["--speculative-draft-model-path", str(head), *CHAIN],
        "EAGLE3": ["--speculative-draft-model-path", str(eagle_head.make_eagle3(tiny_model, folder / "head")), *CHAIN],
    }
    with ExitStack() as running:
        started = {}
        for algorithm in ALGORITHMS:
            flags = [*FLAGS, "--speculative-algorithm", algorithm, *of[algorithm]]
            for kind in KINDS:
                env, path = {}, []
                if kind == "stock":
                    env, path = {"SGLANG_PLUGINS": "cpu_shim"}, [shim]
                own = [] if kind == "stock" else ["--quantization", "mixquant", "--mixquant-recipe", kind]
                server = Server(tiny_model, folder, f"{algorithm}-{kind}", *flags, *own, env=env, pythonpath=path)
                running.callback(server.__exit__)
                started[algorithm, kind] = server
        for which, server in [*started.items()]:
            try:
                server.wait()
            except AssertionError as error:  # the others' tests go on, its own fail with this
                FAILED[which] = str(error)
                del started[which]
        yield started


def ask(server: Server, prompts: list[list[int]], **sampling: Any) -> list[dict[str, Any]]:
    """One after another, from an empty cache."""
    server.flush()
    return [server.generate(prompt, TOKENS, sampling=sampling) for prompt in prompts]


def totals(state: dict[str, Any], before: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {
        phase: {
            p: n - before["tokens"][phase].get(p, 0) for p, n in rows.items() if n - before["tokens"][phase].get(p, 0)
        }
        for phase, rows in state["tokens"].items()
    }


@pytest.fixture(scope="module")
def asked(servers: dict[tuple[str, str], Server], prompts: list[list[int]]) -> dict[tuple[str, str], dict[str, Any]]:
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for which, server in servers.items():
        ask(server, prompts[:1])  # the trie, and what compiles late
        mine = which[1] != "stock"
        before = server.state() if mine else {}
        mark = len(server.log.read_text())
        answers = ask(server, prompts)
        lines = [line for line in server.log.read_text()[mark:].splitlines() if "Prefill batch" in line]
        out[which] = {"answers": answers, "lines": lines}
        if mine:
            out[which]["counted"] = totals(server.state(), before)
    return out


def started(algorithm: str) -> None:
    for kind in KINDS:
        if (algorithm, kind) in FAILED:
            pytest.fail(f"{algorithm} {kind}: {FAILED[algorithm, kind]}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_recipe_bf16_is_stock_token_for_token(algorithm: str, asked: dict[tuple[str, str], dict[str, Any]]) -> None:
    started(algorithm)
    stock, ours = ([a["output_ids"] for a in asked[algorithm, kind]["answers"]] for kind in ("stock", "bf16"))
    if algorithm == "NGRAM":
        # A thread of its own fills the trie, so that rows may be verified beside others; of noise two tokens may be as
        # good as equal.
        stock, ours = stock[:-1], ours[:-1]
    assert ours == stock
    verified = [[a["meta_info"]["spec_verify_ct"] for a in asked[algorithm, kind]["answers"]] for kind in KINDS[:2]]
    if algorithm != "NGRAM":
        assert verified[0] == verified[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_are_counted_exactly(
    algorithm: str, asked: dict[tuple[str, str], dict[str, Any]], prompts: list[list[int]]
) -> None:
    started(algorithm)
    for kind in ("bf16", "auto"):
        found, count = asked[algorithm, kind], len(prompts)
        cached = sum(answer["meta_info"]["cached_tokens"] for answer in found["answers"])
        rows = sum(map(len, prompts)) - cached
        counted = found["counted"]
        low = [p for p in counted["prefill"] if p != "bf16"]
        if kind == "bf16":
            assert counted["prefill"] == {"bf16": rows}
        else:
            assert len(low) == 1 and counted["prefill"] == {low[0]: rows - count, "bf16": count}
        assert counted["decode"] == {}
        assert [*counted["verify"]] == ["bf16"]  # no drafted row is low
        verifications = sum(a["meta_info"]["spec_verify_ct"] for a in found["answers"])
        # one more of each request may have been launched before its end was known
        drafted = counted["verify"]["bf16"] / DRAFTED
        assert verifications <= drafted <= verifications + 2 * count, (kind, drafted, verifications)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_prefill_graphs_are_replayed(algorithm: str, asked: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Where stock SGLang replays them."""
    started(algorithm)
    replayed = {
        kind: [re.search(r"cuda graph: (\w+)", line)[1] for line in asked[algorithm, kind]["lines"]]  # type: ignore[index]
        for kind in KINDS
    }
    assert replayed["auto"] == replayed["stock"] == replayed["bf16"], replayed
    assert "True" in replayed["auto"]
    assert all(re.search(r"#(fp8|nvfp4)-token: [1-9]", line) for line in asked[algorithm, "auto"]["lines"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_left_out_follows_the_algorithm(algorithm: str, servers: dict[tuple[str, str], Server]) -> None:
    started(algorithm)
    log = servers[algorithm, "auto"].log.read_text()
    reads = algorithm.startswith("EAGLE")
    assert ("the draft reads hidden states of all rows" in log) is reads
    assert ("unread rows left out behind the last layer's attention" in log) is not reads
    assert f"speculative decoding ({algorithm}): drafted rows are verified in bf16" in log


def test_metrics_have_the_phase(servers: dict[tuple[str, str], Server]) -> None:
    import requests

    server = servers[ALGORITHMS[-1], "auto"]
    text = requests.get(server.url + "/metrics", timeout=60).text
    found = re.search(r'^mixquant:forward_tokens_total\{[^}]*phase="verify"[^}]*\} ([\d.e+]+)', text, re.MULTILINE)
    assert found and float(found[1]) >= server.state()["tokens"]["verify"]["bf16"] > 0


def accepted(answers: list[dict[str, Any]]) -> float:
    """Tokens for each verification."""
    verified = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    return sum(a["meta_info"]["completion_tokens"] for a in answers) / verified


def timed(server: Server, rng: random.Random) -> tuple[float, float]:
    """Median ms to the first token of 4000, and tokens a second after it, of one request at a time."""
    first, speeds = [], []
    for _ in range(5):
        prompt = ids(rng, 4000)
        began = time.perf_counter()
        server.generate(prompt, 1)
        first.append(time.perf_counter() - began)
        prompt = ids(rng, 300)
        server.generate(prompt, 1)
        began = time.perf_counter()
        server.generate(prompt, 129)  # its prompt is cached
        speeds.append(128 / (time.perf_counter() - began))
    return 1000 * statistics.median(first), statistics.median(speeds)


def test_table(
    servers: dict[tuple[str, str], Server],
    asked: dict[tuple[str, str], dict[str, Any]],
    prompts: list[list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A draft that reads what low-precision prefill left behind must still be worth its rows."""
    lines = [f"{'':26}accepted   TTFT of 4000, ms   tokens/s"]
    lengths: dict[tuple[str, str], float] = {}
    for which, server in servers.items():
        lengths[which] = accepted(asked[which]["answers"])
        ttft, speed = timed(server, random.Random(21))
        lines.append(f"{' '.join(which):26}{lengths[which]:8.3f}{ttft:18.1f}{speed:11.0f}")
    for algorithm in [name for name in ALGORITHMS if (name, "auto") in servers]:
        whole = accepted(ask(servers[algorithm, "auto"], prompts, **BF16_POLICY))
        lines.append(f"{algorithm + ' auto, BF16 prefill':26}{whole:8.3f}")
        assert lengths[algorithm, "auto"] > 0.8 * whole
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    for algorithm in {"STANDALONE", "EAGLE"} & {*ALGORITHMS}:
        assert lengths[algorithm, "auto"] > (2 if algorithm == "STANDALONE" else 1.2), algorithm  # of 4
