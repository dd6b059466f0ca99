"""Retraction: generated tokens that are prefilled again stay BF16 (``SGLANG_TEST_RETRACT`` makes SGLang retract).

One server has ready-made prefill weights, so that it shows these serving too: compressed-tensors' with SGLang 0.5.17,
ModelOpt's with later ones.  On a GPU there is one of FP8 as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from tests.e2e.test_servers import Counted, ids, together
from tests.support import plugins
from tests.support.nvfp4_checkpoints import save_modelopt
from tests.support.server import Server
from tests.support.servers import FLAGS, Servers

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]


WRITER = "compressed-tensors" if version("sglang").startswith("0.5.17") else "ModelOpt"


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest, tiny_model: Path, logs: Path) -> Iterator[Servers]:
    """``request.param``: "ready", or the name of a recipe."""
    folder = logs / f"retraction-{request.param}"
    folder.mkdir()
    spy_file = folder / "spy.jsonl"
    env = {"SPY_FILE": str(spy_file), "SGLANG_TEST_RETRACT": "1"}
    spy_plugin = plugins.write(folder, "spy", plugins.SPY)
    recipe = request.param
    if recipe == "ready":
        if WRITER == "compressed-tensors":
            quantize_checkpoint(tiny_model, folder / "ready", ignore=["re:.*layers.0.mlp.down_proj"])
        else:
            save_modelopt(tiny_model, folder / "ready", "model.layers.0.mlp.down_proj")
        recipe = str(folder / "ready.yaml")
        text = f"version: 1\nprefill: {{precision: nvfp4, weights: {folder / 'ready'}}}\nkernel: emulated\n"
        Path(recipe).write_text(text)
    flags = [*FLAGS, "--quantization", "mixquant", "--mixquant-recipe", recipe]
    with Server(tiny_model, folder, "retract", *flags, env=env, pythonpath=[spy_plugin]) as low:
        yield Servers(low, low, low, spy_file)


@pytest.mark.parametrize("servers", ["ready", pytest.param("fp8", marks=pytest.mark.gpu)], indirect=True)
def test_split_of_retracted_requests(servers: Servers) -> None:
    rng = random.Random(20)
    with Counted(servers) as counted:
        calls = [partial(servers.low.generate, ids(rng, n), 40) for n in (50, 61, 45, 150)]
        answers = together(calls)
    counted.check()
    again = [
        request
        for batch in counted.batches
        for request in batch["requests"]
        if not request["decoding"] and request["prefix"] + request["new"] > request["prompt"]
    ]
    assert sum(a["meta_info"]["num_retractions"] for a in answers) > 0
    assert again, "nothing that was generated was prefilled again"
    assert all(a["meta_info"]["completion_tokens"] == 40 for a in answers)


@pytest.mark.parametrize("servers", ["ready"], indirect=True)
def test_ready_made_weights(servers: Servers) -> None:
    text = servers.low.log.read_text()
    ready = servers.low.log.parent / "ready"
    assert f"mixquant: NVFP4 weights come from {ready} ({WRITER})" in text
    assert "mixquant: stays BF16 (not in the ready-made weights): model.layers.0.mlp.down_proj" in text
    state = servers.low.state()
    assert state["layers"] == {"nvfp4": 31, "bf16": 1} and state["kernel"] == {"nvfp4": "emulated"}
    ids_of_prompt = list(range(20, 90))
    low = servers.low.generate(ids_of_prompt, 2, return_logprob=True, logprob_start_len=0)
    servers.low.flush()
    bf16 = servers.low.generate(
        ids_of_prompt,
        2,
        sampling={"custom_params": {"mixquant": {"prefill": "bf16"}}},
        return_logprob=True,
        logprob_start_len=0,
    )
    logprobs = [[t[0] for t in a["meta_info"]["input_token_logprobs"][1:]] for a in (low, bf16)]
    apart = [abs(a - b) for a, b in zip(*logprobs, strict=True)]
    assert 1e-3 < sum(apart) / len(apart) < 2
