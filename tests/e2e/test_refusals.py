"""What mixquant refuses: each ends before serving, with one clear message and a non-zero exit, on the real launcher."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support import plugins
from tests.support.server import CPU_FLAGS, ON_GPU, ends

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

# name -> (what the message must say, flags, recipe text, edits of config.json, symbol to take out of SGLang)
CASES: dict[str, dict[str, Any]] = {
    "unknown recipe": {
        "says": ["unknown recipe 'nvpf4'", "allowed: auto, bf16, fp8", "did you mean 'nvfp4'"],
        "flags": ["--mixquant-recipe", "nvpf4"],
    },
    "bad YAML": {"says": ["recipe.yaml:", "not valid YAML"], "recipe": "version: 1\nprefill: [\n"},
    "unknown key": {
        "says": ["recipe.yaml:2 prefil: unknown key", "did you mean 'prefill'"],
        "recipe": "version: 1\nprefil: {precision: fp8}\n",
    },
    "unmatched rule": {
        "says": ["recipe.yaml:3 layers.match: 're:.*down_prj' matches no layer", "down_proj"],
        "recipe": "version: 1\nlayers:\n  - {match: 're:.*down_prj', prefill: bf16}\n",
    },
    "shards that disagree": {
        "says": ["the shards of the fused layer 'model.layers.0.self_attn.qkv_proj' disagree"],
        "recipe": "version: 1\nlayers:\n  - {match: 're:.*q_proj$', prefill: bf16}\n",
    },
    "flag without the plugin": {
        "says": ["--mixquant-recipe needs --quantization mixquant"],
        "flags": ["--mixquant-recipe", "auto"],
        "quantization": None,
    },
    "NaN in the checkpoint": {
        "says": [
            "mixquant: cannot pack model.layers.2.mlp.down_proj: ",
            "contains NaN or infinity: check the checkpoint",
        ],
        "nan": "model.layers.2.mlp.down_proj.weight",
    },
    "float32 checkpoint": {"says": ["is a float32 checkpoint", "--dtype bfloat16"], "config": {"dtype": "float32"}},
    "quantised checkpoint": {
        "says": ["is already quantised (fp8)", "plain BF16 checkpoint"],
        "config": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    },
    "DP attention": {
        "says": ["does not go with --speculative-algorithm with DP attention"],
        "flags": ["--enable-dp-attention", "--dp-size", "2", "--tp-size", "2", "--speculative-algorithm", "NGRAM"],
    },
    "a launcher hook target is gone": {
        "says": ["has no", "ServerArgs.add_cli_args", "Tested with SGLang"],
        "sabotage": "sglang.srt.server_args.ServerArgs.add_cli_args",
    },
    "a scheduler hook target is gone": {
        "says": ["has no", "ForwardBatch.init_new", "Tested with SGLang"],
        "sabotage": "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    },
    "the plugin is left out of SGLANG_PLUGINS": {
        "says": ["invalid choice: 'mixquant'"],
        "env": {"SGLANG_PLUGINS": "cpu_shim"},
    },
}


def run(name: str, case: dict[str, Any], model: Path, folder: Path) -> tuple[int, str]:
    home = folder / name.replace(" ", "_")
    home.mkdir(parents=True)
    flags, env, pythonpath = [*case.get("flags", [])], dict(case.get("env", {})), []
    if "recipe" in case:
        (home / "recipe.yaml").write_text(case["recipe"])
        flags += ["--mixquant-recipe", "recipe.yaml"]
    if "config" in case:
        model = Path(shutil.copytree(model, home / "model"))
        config = json.loads((model / "config.json").read_text())
        dtypes = dict.fromkeys(("dtype", "torch_dtype"), config["torch_dtype"])
        (model / "config.json").write_text(json.dumps({**config, **dtypes, **case["config"]}))
    if "nan" in case:
        model = Path(shutil.copytree(model, home / "model"))
        for file in model.glob("*.safetensors"):
            tensors = load_file(file)
            if case["nan"] in tensors:
                tensors[case["nan"]][5, 7] = float("nan")
                save_file(tensors, file, metadata={"format": "pt"})
    if "sabotage" in case:
        pythonpath.append(plugins.write(home, "a_saboteur", plugins.SABOTEUR))
        env["SABOTAGE"] = case["sabotage"]
    if case.get("quantization", "mixquant"):
        flags += ["--quantization", case.get("quantization", "mixquant")]
    device = [] if ON_GPU else CPU_FLAGS
    args = ["--model-path", str(model), "--port", "1", *device, *flags]
    return ends(args, home / "server.log", env=env, pythonpath=pythonpath)


@pytest.fixture(scope="module")
def endings(tiny_model: Path, logs: Path) -> dict[str, tuple[int, str]]:
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run, name, case, tiny_model, logs / "refusals") for name, case in CASES.items()}
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("name", CASES)
def test_refused(endings: dict[str, tuple[int, str]], name: str) -> None:
    status, text = endings[name]
    lines = [line for line in text.splitlines() if all(part in line for part in CASES[name]["says"])]
    assert status != 0
    assert len(lines) == 1, text[-4000:]
    assert "Uvicorn running" not in text and "fired up" not in text
