"""``mixquant doctor`` with a launch command: whether it starts, or all that ends it, as a server would say it.

One process asks for all commands, as several launches in a row.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.utils.common import cpu_has_amx_support

from mixquant_sglang.host.hooks import launcher
from mixquant_sglang.tools import doctor, launch, starting
from mixquant_sglang.versions import v0_5_17
from mixquant_sglang.versions.dialect import dialect
from tests.sglang.test_deployments import LAUNCHED, differs
from tests.sglang.test_refusals import unresolved
from tests.support import quantised_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CPU = ["--device", "cpu", "--attention-backend", "torch_native"]

# name -> (words, parts of each line that ends it)
COMMANDS: dict[str, tuple[list[str], list[list[str]]]] = {
    "flags that start": ([*CPU, "--mixquant-recipe", "nvfp4"], []),
    "a whole command that starts": (
        [
            "A_NAME=1",
            "python",
            "-m",
            "sglang.launch_server",
            "--model-path",
            "MODEL",
            *CPU,
            "--quantization",
            "mixquant",
        ],
        [],
    ),
    "several": (
        [*CPU, "--enable-two-batch-overlap", "--cpu-offload-gb", "4", "--mixquant-recipe", "nvpf4"],
        [
            ["unknown recipe 'nvpf4'", "did you mean 'nvfp4'"],
            ["does not go with --enable-two-batch-overlap", "leave it out"],
            ["does not go with --cpu-offload-gb"],
            ["SGLang: When enabling two batch overlap without an EP a2a backend"],
        ],
    ),
    "another quantization": ([*CPU, "--quantization", "fp8"], [["--quantization fp8: a server without mixquant"]]),
    "a word that SGLang does not know": ([*CPU, "--kv-cache-dtype", "fp3"], [["invalid choice: 'fp3'"]]),
    "a flag that SGLang does not know": ([*CPU, "--no-such-flag"], [["unrecognized arguments: --no-such-flag"]]),
    "a float32 checkpoint": (["--model-path", "FLOAT32", *CPU], [["is a float32 checkpoint", "--dtype bfloat16"]]),
    "a quantised checkpoint": (["--model-path", "FP8", *CPU, "--mixquant-recipe", "fp8-compact"], []),
    "a quantised checkpoint and another recipe": (
        ["--model-path", "FP8", *CPU, "--mixquant-recipe", "nvfp4-compact"],
        [["is already quantised (compressed-tensors float-quantized)", "recipe nvfp4-compact", "recipe fp8-compact"]],
    ),
    "dummy weights of a quantised checkpoint": (
        ["--model-path", "FP8", *CPU, "--mixquant-recipe", "fp8-compact", "--load-format", "dummy"],
        [["--load-format dummy reads nothing of", "give it a BF16 config"]],
    ),
    "an FP8 cache beside scales that nobody takes": (
        ["--model-path", "TENSOR", *CPU, "--mixquant-recipe", "fp8-compact", "--kv-cache-dtype", "fp8_e4m3"],
        [["--kv-cache-dtype fp8_e4m3", "k_scale", "leave the flag out"]],
    ),
    "blocks that are not whole": (
        ["--model-path", "BLOCKS", *CPU, "--mixquant-recipe", "fp8-compact"],
        [["layers.0.mlp.down_proj cannot be taken as it is: K = 704 is not", "keep it in BF16", "(and so for 7 more)"]],
    ),
    "blocks and a rule": (["--model-path", "BLOCKS", *CPU, "--mixquant-recipe", "RULE"], []),
    "a quantised checkpoint that lacks a weight": (
        ["--model-path", "LACKS", *CPU, "--mixquant-recipe", "fp8-compact"],
        [["model.layers.3.mlp.down_proj.weight is missing, in FP8 and in BF16"]],
    ),
    "ready-made weights that lack one": (
        ["--model-path", "MODEL", *CPU, "--mixquant-recipe", "READY"],
        [["model.layers.3.mlp.down_proj.weight_packed is missing"]],
    ),
    "quantised weights of which no config says so": (
        ["--model-path", "UNSAID", *CPU, "--mixquant-recipe", "nvfp4-compact"],
        [["is part of a quantised weight", "neither quantization_config in config.json nor hf_quant_config.json"]],
    ),
    "a variable": (
        ["SGLANG_RUST_SERVER=1", "python", "-m", "sglang.launch_server", "--model-path", "MODEL", *CPU],
        [["does not go with SGLANG_RUST_SERVER", "unset it"]],
    ),
    "a variable that env sets": (
        ["env", "SGLANG_RUST_SERVER=1", "sglang", "serve", "--model-path", "MODEL", "--model-type", "llm", *CPU],
        [["does not go with SGLANG_RUST_SERVER", "unset it"]],
    ),
    "a recipe in a file of flags": (
        ["--model-path", "MODEL", "--config", "OURS", "--attention-backend", "torch_native"],
        [["unknown recipe 'nvpf4'"]],
    ),
    "another quantization in a file of flags": (
        ["--model-path", "MODEL", "--config", "STOCK", "--attention-backend", "torch_native"],
        [["--quantization fp8: a server without mixquant"]],
    ),
    **{
        f"what SGLang finds once it starts: {' '.join(words)}": ([*words, *CPU], [[*parts]])
        for words, parts in {
            ("--enable-lora",): ("both --max-lora-rank and --lora-target-modules",),
            ("--max-lora-rank", "8", "--lora-paths", "a=/no/such"): ("--lora-paths /no/such does not exist",),
            ("--chat-template", "nosuch"): ("--chat-template nosuch is neither a file here nor a template",),
            ("--tokenizer-path", "/no/such"): ("--tokenizer-path /no/such does not exist",),
            ("--max-running-requests", "0"): ("--max-running-requests 0; allowed: 1 and more",),
            ("--max-total-tokens", "0"): ("--max-total-tokens 0; allowed: 1 and more",),
            ("--port", "99999"): ("--port 99999; allowed: up to 65535",),
            ("--tokenizer-worker-num", "0"): ("Tokenizer worker num must >= 1",),
        }.items()
    },
    "what goes": (
        [
            *("--model-path", "MODEL", "--tokenizer-path", "MODEL", "--chat-template", "chatml", "--port", "1"),
            *("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "--page-size", "1", *CPU),
        ],
        [],
    ),
    "several that SGLang finds once it starts": (
        ["--port", "99999", "--tokenizer-worker-num", "0", "--enable-two-batch-overlap", *CPU],
        [["--enable-two-batch-overlap"], ["--port 99999"], ["Tokenizer worker num"]],
    ),
    "help": (["--model-path", "MODEL", "--help"], [["it prints something (help, a version) and ends"]]),
    "a model without its flag": (
        ["python", "-m", "sglang.launch_server", "--model-path", "MODEL", *CPU, "a/model"],
        [["unrecognized arguments: a/model"]],
    ),
}
if not cpu_has_amx_support():
    COMMANDS |= {
        f"not on a CPU: {' '.join(words)}": (["--device", "cpu", *words], [[words[0], "does not go on a CPU"]])
        for words in (
            *(["--attention-backend", name] for name in ("flashinfer", "fa3")),
            ["--enable-hierarchical-cache", *CPU[2:]],
            ["--page-size", "16", *CPU[2:]],
            *([["--speculative-algorithm", "NGRAM", *CPU[2:]]] if dialect() is v0_5_17 else []),
        )
    }
if not torch.cuda.is_available():
    NO_GPU = [["--device cuda: torch sees no GPU here"]]
    COMMANDS |= {
        "no GPU": (["--device", "cuda"], NO_GPU),
        "no GPU for a file of flags": (["--config", "GPU", "--model-path", "MODEL"], NO_GPU),
    }
# The servers of examples/: each command that differs once.
EXAMPLES = {flags: name for name, flags in ((name, differs(words)) for name, words in LAUNCHED.items())}
NO_NIXL = [["--disaggregation-transfer-backend nixl: No module named 'nixl'"]] if find_spec("nixl") is None else []
COMMANDS |= {
    f"examples: {name}": (["--model-path", "MODEL", *flags, *CPU], NO_NIXL if "nixl" in " ".join(flags) else [])
    for flags, name in EXAMPLES.items()
}
SCRIPT = """
import json, sys
from mixquant_sglang.tools import launch
for words in json.loads(sys.argv[1]):
    command = launch.Command(words)
    print("ENDS" + json.dumps([launch.ends(command), command.notes]), flush=True)
"""


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor")
    config = json.loads((tiny_model / "config.json").read_text()) | {"torch_dtype": "float32", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    files = {"OURS": "quantization: mixquant\nmixquant-recipe: nvpf4\n", "STOCK": "quantization: fp8\n", "GPU": ""}
    for name, text in files.items():
        device = "cuda" if name == "GPU" else "cpu"
        (folder / f"{name}.yaml").write_text(f"device: {device}\n{text}")
    models = {"MODEL": str(tiny_model), "FLOAT32": str(folder)} | {n: str(folder / f"{n}.yaml") for n in files}
    models["FP8"] = str(quantised_checkpoints.write(tiny_model, folder / "fp8", "fp8 rows")[0])
    models["TENSOR"] = str(quantised_checkpoints.write(tiny_model, folder / "tensor", "fp8 tensor")[0])
    models["BLOCKS"] = str(quantised_checkpoints.write(tiny_model, folder / "blocks", "fp8 blocks")[0])
    lacks, down = quantised_checkpoints.without, "model.layers.3.mlp.down_proj"
    models["LACKS"] = str(lacks(tiny_model, folder / "lacks", "fp8 rows", down))
    unsaid = lacks(tiny_model, folder / "unsaid", "nvfp4 parts")
    (unsaid / "config.json").write_text((tiny_model / "config.json").read_text())
    models["UNSAID"] = str(unsaid)
    ready = lacks(tiny_model, folder / "lacks-ready", "nvfp4 parts", down)
    recipes = {
        "RULE": "{precision: fp8}\ndecode: {precision: w8a16}\nlayers:\n"
        "  - {match: 're:.*down_proj', prefill: bf16, decode: bf16}",
        "READY": f"{{precision: nvfp4, weights: {ready}}}",
    }
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(f"version: 1\nprefill: {text}\n")
        models[name] = str(folder / f"{name}.yaml")
    words = [[models.get(word, word) for word in words] for words, _ in COMMANDS.values()]
    (folder / "ask.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(folder / "ask.py"), json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    lines = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ENDS")]
    assert len(lines) == len(COMMANDS), done.stderr[-3000:]
    return dict(zip(COMMANDS, lines, strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_ends_a_command(name: str, found: dict[str, Any]) -> None:
    lines, notes = found[name]
    expected = COMMANDS[name][1]
    assert len(lines) == len(expected), lines
    for line, parts in zip(lines, expected, strict=True):
        assert all(part in line for part in parts), line
        assert "\n" not in line
    named = any(word == "--model-path" for word in COMMANDS[name][0])
    assert ("no --model-path: asked for a small dense Qwen3" in notes) is not named


def test_the_examples_are_among_them() -> None:
    assert len(EXAMPLES) == 3 and {flags[-1] for flags in EXAMPLES} == {
        *("--api-key=a", "--disaggregation-bootstrap-port=8998", "--disaggregation-decode-enable-radix-cache"),
    }


def test_a_whole_run(tiny_model: Path) -> None:
    """Exit status and last line; ``--report`` gives nothing away."""
    flags = [
        "--model-path",
        str(tiny_model),
        *CPU,
        "--api-key",
        "sk-secret",
        "--enable-single-batch-overlap",
        "--port",
        "30001",
    ]
    python = [sys.executable, "-W", "ignore", "-m", "mixquant_sglang", "doctor"]
    done = subprocess.run([*python, *flags], capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 1 and done.stdout.endswith("=> it will NOT start here: 1 line\n"), done.stdout
    assert "ends: --quantization mixquant does not go with --enable-single-batch-overlap" in done.stdout
    done = subprocess.run([*python, "--report", *flags], capture_output=True, text=True, check=False, timeout=800)
    out = done.stdout
    assert done.returncode == 1
    assert "flag: --api-key (not shown)\n" in out and "flag: --port 30001\n" in out and "flag: --device cpu\n" in out
    assert "recipe: auto (prefill auto" in out and "ends: --quantization mixquant does not go with" in out
    assert "sk-secret" not in out and "/" not in out.replace("and/or", "")


def test_ray_is_asked_for_where_schedulers_are_its_actors(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang imports it once all was parsed and resolved."""
    actors = unresolved(model_path=str(tiny_model), use_ray=True)
    monkeypatch.setattr(starting, "find_spec", lambda name: None)
    assert [*starting._packages(actors)] == [
        "Ray is required for --use-ray mode. Install it with: pip install 'sglang[ray]'"
    ]
    assert not [*starting._packages(unresolved(model_path=str(tiny_model)))]
    asked: list[str] = []
    resolved = SimpleNamespace(quantization="mixquant", lora_paths=None, check_server_args=lambda: None)
    monkeypatch.setattr(launch, "_resolve", lambda flags: resolved)
    monkeypatch.setattr(starting, "lines", lambda args, paths: ["no ray"])
    monkeypatch.setattr(launch, "_check_model", asked.append)
    monkeypatch.setattr(launch, "_check_layers", lambda *_: [])
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: None)
    monkeypatch.setattr(launcher, "asked", launcher.asked)
    assert launch._ends([], []) == ["no ray"] and len(asked) == 1


@pytest.mark.parametrize("backend", ["nixl", "mooncake", "mooncake_tcp"])
def test_what_moves_keys_and_values_is_imported_as_a_server_does(
    backend: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, it may still lack a library of the system."""
    pair = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": backend}
    prefill, single = (unresolved(model_path=str(tiny_model), **more) for more in (pair, {}))
    package = starting._TRANSFER[backend].partition(".")[0]
    monkeypatch.setattr(starting, "find_spec", lambda name: None)
    assert [*starting._packages(prefill)] == [
        f"--disaggregation-transfer-backend {backend}: No module named '{package}'"
    ]
    assert not [*starting._packages(single)]
    monkeypatch.setattr(starting, "find_spec", lambda name: name)
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nImportError: libibverbs.so.1: cannot open\n")
    monkeypatch.setattr(starting.subprocess, "run", lambda *_, **__: failed)
    assert [*starting._packages(prefill)] == [
        f"--disaggregation-transfer-backend {backend}: ImportError: libibverbs.so.1: cannot open"
    ]
    monkeypatch.setattr(starting.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stderr=""))
    assert not [*starting._packages(prefill)]


def test_own_options_come_first() -> None:
    assert doctor.split(["doctor"]) == (["doctor"], [])
    assert doctor.split(["doctor", "--recipe", "fp8", "--report", "--tp", "2"]) == (
        ["doctor", "--recipe", "fp8", "--report"],
        ["--tp", "2"],
    )
    assert doctor.split(["doctor", "--", "--report"]) == (["doctor"], ["--report"])


def test_what_a_command_is() -> None:
    served = launch.Command(["X=1", "sglang", "serve", "a/model", "--tp", "2"])
    assert served.flags == ["--model-path", "a/model", "--tp", "2", "--quantization", "mixquant"]
    assert served.environment == {"X": "1"} and served.notes
    assert not launch.Command(["--tp", "2"]).notes
    one = launch.Command(["A=1 env B='2 3' numactl -N 0 python3 -m sglang.launch_server --model-path 'a model'"])
    assert one.flags[:2] == ["--model-path", "a model"] and one.environment == {"A": "1", "B": "2 3"}
    for words in (
        ["vllm", "serve", "a/model"],
        ["serve", "a/model"],
        ["sglang", "generate", "serve"],
        ["sglang serve 'm"],
    ):
        with pytest.raises(ValueError, match="is no launch command"):
            launch.Command(words)


def test_the_model_of_a_command_for_sglang_serve() -> None:
    """As SGLang's own command line reads it; the model first, for a server, is an error of its parser."""
    for kind in (["--model-type", "llm"], ["--model-type=auto"], []):
        assert launch.Command(["sglang", "serve", "m", *kind, "--tp", "2"]).flags[:4] == [
            "--model-path",
            "m",
            "--tp",
            "2",
        ]
    assert launch.Command(["sglang", "serve", "m", "--model-type", "diffusion"]).flags[2:4] == [
        "--model-type",
        "diffusion",
    ]
    assert launch.Command(["python", "-m", "sglang.launch_server", "m"]).flags[0] == "m"


def test_what_a_file_of_flags_says_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("quantization: mixquant\nmodel_path: a/model\n")
    (tmp_path / "bad.yaml").write_text("[")
    command = launch.Command(["sglang", "serve", "--config", str(tmp_path / "x.yaml")])
    command.stand_in(tmp_path)
    assert command.flags == ["--config", str(tmp_path / "x.yaml")] and not command.notes
    for file in ("bad.yaml", "none.yaml"):
        assert launch.Command(["--config", str(tmp_path / file)]).flags[2:] == ["--quantization", "mixquant"]


@pytest.mark.parametrize(("path", "there"), [("s3://bucket/t", True), ("org/name@main", True), ("/no/such", False)])
def test_what_is_not_a_folder_here_may_be_somewhere_else(path: str, there: bool) -> None:
    args = SimpleNamespace(chat_template=None, tokenizer_path=path)
    said = [] if there else [f"--tokenizer-path {path} does not exist", f"--lora-paths {path} does not exist"]
    assert [*starting._paths(args, [f"a={path}"])] == said
