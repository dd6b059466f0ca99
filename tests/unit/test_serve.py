"""The parts of ``scripts/serve_pd``, and servers that are up already as arms of a benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_pairs_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.serve import pd

    monkeypatch.setattr(pd, "gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = pd.parse(["hub/model", "--tp", "2", "--decode", "stock", "--recipe", "fp8", "--", "--page-size", "16"])
    (prefill, prefill_env), (decode, decode_env) = plan.server("prefill"), plan.server("decode")
    assert (prefill_env["CUDA_VISIBLE_DEVICES"], decode_env["CUDA_VISIBLE_DEVICES"]) == ("0,1", "2,3")
    assert decode_env["SGLANG_PLUGINS"] == "none" and "SGLANG_PLUGINS" not in prefill_env
    for command in (prefill, decode):
        assert command[-2:] == ["--page-size", "16"] and command[command.index("--tp-size") + 1] == "2"
        assert command[command.index("--disaggregation-transfer-backend") + 1] == "nixl"
    assert "fp8" in prefill and "--quantization" not in decode
    assert "--disaggregation-decode-enable-radix-cache" in decode
    router = plan.router_command()
    assert router[router.index("--prefill") + 2] == prefill[prefill.index("--disaggregation-bootstrap-port") + 1]
    assert "--mini-lb" in router and router[router.index("--port") + 1] == "8595"
    assert "--quantization" in pd.parse(["hub/model"]).server("decode")[0]
    for wrong in (["m", "--decode-gpu", "0"], ["m", "--tp", "3"], ["m", "--tp", "0"]):
        with pytest.raises(SystemExit):
            pd.parse(wrong)


def test_a_process_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    from scripts.serve.processes import Ended, Process, stop, wait_for

    waits = Process("one that waits", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "waits.log")
    dies = Process("other", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], tmp_path / "dies.log")
    try:
        assert dies.wait(60)
        with pytest.raises(Ended, match=r"(?s)the other ended with status 3; last lines of .*dies.log:\nthe reason"):
            wait_for([waits, dies], ["http://127.0.0.1:1/health"], 60, lambda _: None)
    finally:
        stop([waits, dies], patience_s=5)
    assert not waits.running


def test_arms_that_are_up_already() -> None:
    from scripts.bench.agent import parse, summarise
    from scripts.bench.client import Answer
    from scripts.bench.running import Running

    model = str(ROOT / "tests" / "models" / "tiny-qwen3")
    common = ["--arms", "none", "--model", model, "--kv-tokens", "900000"]
    args, _ = parse(
        [
            *common,
            "--url",
            "pair",
            "http://a:1/",
            "2",
            "http://p:1",
            "http://d:1",
            "--url",
            "two",
            "http://b:1,http://b:2",
            "2",
        ]
    )
    assert args.arms == [] and args.running == [
        Running("pair", "http://a:1", 2, ("http://p:1", "http://d:1")),
        Running("two", "http://b:1,http://b:2", 2, ("http://b:1", "http://b:2")),
    ]
    for wrong in (["pair", "http://a:1"], ["pair", "a:1", "2"], ["pair", "http://a:1", "0"]):
        with pytest.raises(SystemExit):
            parse([*common, "--url", *wrong])
    with pytest.raises(SystemExit):
        parse(common)
    answers = [Answer([1, 2, 3, 4], 10, 0, ttft=0.1, latency=0.5, gaps=[(0.3, 3)])]
    assert summarise(answers, wall_s=2, gpus=2)["output_tokens_per_s_per_gpu"] == 1


def test_libraries_are_unpacked_once_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.serve import libraries

    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    monkeypatch.setattr(libraries, "installed", lambda: False)
    monkeypatch.setattr(libraries.shutil, "which", lambda _: None)
    with pytest.raises(libraries.MissingLibraries, match=r"libibverbs\.so\.1"):
        libraries.mooncake_environment()
    for folder, name in zip(("lib", "usr/lib", "usr/lib"), libraries.NAMES, strict=True):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).touch()
    found = libraries.mooncake_environment()["LD_LIBRARY_PATH"]
    assert found.split(":")[:2] == [str(tmp_path / "lib"), str(tmp_path / "usr" / "lib")]
    monkeypatch.setattr(libraries, "installed", lambda: True)
    assert libraries.mooncake_environment() == {}
