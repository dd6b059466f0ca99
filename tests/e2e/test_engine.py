"""``sgl.Engine``: the same plugin without a command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ON_GPU

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]

ENGINE = """
import json
import os
import sys
import time

import sglang as sgl
import torch
from safetensors.torch import load_file

CPU = {} if sys.argv[2] == "gpu" else {
    "device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True
}


def engine():
    return sgl.Engine(
        model_path=sys.argv[1], quantization="mixquant", max_total_tokens=20000, log_level="error", **CPU
    )


if __name__ == "__main__":
    os.environ["MIXQUANT_RECIPE"] = "no-such-recipe"
    try:
        engine()
    except ValueError as error:
        refused = f"{type(error).__name__}: {error}"
    os.environ["MIXQUANT_RECIPE"] = "nvfp4-emulated"
    running = engine()
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    answers = running.generate(input_ids=[list(range(20, 90)), list(range(40, 60))], sampling_params=params)
    state = running.get_server_info()["internal_states"][0]["mixquant"]

    def flush():
        # SGLang refuses while its last pass is still under way; an update then ends the scheduler.
        for _ in range(100):
            if running.flush_cache().success:
                return
            time.sleep(0.1)
        raise RuntimeError("the engine did not become idle")

    def update(name, weight):
        flush()
        if hasattr(running, "begin_weight_update"):
            running.begin_weight_update()
        answer = running.update_weights_from_tensor([(name, weight)])
        if hasattr(running, "end_weight_update"):
            running.end_weight_update()
        return [answer.success, answer.message] if hasattr(answer, "success") else list(answer)

    def prompt_logprobs():
        flush()
        ids = list(range(20, 60))
        answer = running.generate(input_ids=ids, sampling_params=params, return_logprob=True, logprob_start_len=0)
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(sys.argv[1] + "/model.safetensors")[name]
    logprobs = [prompt_logprobs()]
    for new in (torch.zeros_like(weight), weight):
        update(name, new)
        logprobs.append(prompt_logprobs())
    nan = weight.clone()
    nan[3, 5] = float("nan")
    broken = []
    for new in (nan, -nan.nan_to_num(float("inf")), weight[:-1].contiguous()):
        broken.append(update(name, new))
        logprobs.append(prompt_logprobs())
    running.shutdown()
    tokens = [len(a["output_ids"]) for a in answers]
    print(json.dumps({"refused": refused, "tokens": tokens, "state": state, "logprobs": logprobs, "broken": broken}))
"""


def test_engine(random_model: Path, tmp_path: Path) -> None:
    import json

    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, random_model, "gpu" if ON_GPU else "cpu"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["refused"].startswith("MixQuantError: unknown recipe 'no-such-recipe'")
    assert said["tokens"] == [6, 6]
    state = said["state"]
    assert state["layers"] == {"nvfp4": 16, "bf16": 1}  # the head stays
    assert state["recipe"] == "nvfp4-emulated" and state["tokens"]["prefill"]["nvfp4"] >= 88
    assert state["tokens"]["prefill"]["bf16"] == state["protected_rows"] >= 2
    assert state["tokens"]["decode"].keys() == {"bf16"}
    # Prompt logprobs come from low-precision rows: stale packed weights would not have moved the first of them.
    before, zeroed, restored, *refused = said["logprobs"]
    assert restored == before and abs(zeroed[0] - before[0]) > 1e-3
    # Broken ones are refused, and the old weights serve on.
    assert refused == [before] * 3 and [done for done, _ in said["broken"]] == [False] * 3
    assert all("model.layers.0.mlp.down_proj.weight h" in message for _, message in said["broken"]), said["broken"]
