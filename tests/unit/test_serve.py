"""The parts of ``scripts/serve_pd``, and servers that are up already as arms of a benchmark."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from scripts.serve.processes import Ended, check_port, free_port

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


@pytest.mark.parametrize(("host", "theirs"), [("127.0.0.1", ""), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")])
def test_a_pair_starts_nothing_where_somebody_has_its_port(
    host: str, theirs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose answers to /health it would take for its router's, and whose logs it would write over."""
    from scripts.serve import pair, pd

    monkeypatch.setattr(pd, "ROOT", tmp_path)
    monkeypatch.setattr(pd.signal, "signal", lambda *_: None)
    monkeypatch.setattr(pair, "Process", lambda *_: pytest.fail("it started something"))
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((theirs, 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve_pd", "m", "--host", host, "--port", str(port)])
        assert pd.main() == 1
        said = capsys.readouterr().out
        assert said == f"port {port} of {host} is not free: Address already in use; give another one\n"
        plan = pair.Plan("m", free_port(), ports={"bootstrap": port}, host=host)
        with pytest.raises(Ended, match=f"port {port} of {host} is not free"):
            pair.Pair(plan, tmp_path).__enter__()
    check_port(host, port)  # free again
    with pytest.raises(Ended, match=r"host no\.such\.invalid: "):
        check_port("no.such.invalid", port)


def test_an_address_that_this_host_has_not_is_no_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.getaddrinfo("127.0.0.1", port := free_port(), type=socket.SOCK_STREAM)
    elsewhere = [(*found[:4], ("192.0.2.1", port)) for found in here]  # of documentation, RFC 5737
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: elsewhere + here)
    check_port("localhost", port)


def test_a_second_pair_leaves_the_logs_of_one_that_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose router has not taken the port yet."""
    from scripts.serve import pair

    class Loads(pair.Pair):
        def wait(self, *names: str) -> None:
            if "router" not in names:
                during()

        def check(self) -> None: ...

    def during() -> None:
        with pytest.raises(Ended, match=rf"^another pair starts or runs with port {plan.port}; give another one$"):
            pair.Pair(plan, tmp_path).__enter__()

    started: list[str] = []
    monkeypatch.setattr(pair, "Process", lambda title, *_: started.append(title))
    monkeypatch.setattr(pair, "stop", lambda _: None)
    plan = pair.Plan("m", free_port())
    with Loads(plan, tmp_path, lambda _: None):
        during()
    assert started == ["prefill server", "decode server", "router"]
    with Loads(plan, tmp_path, lambda _: None):
        pass
    # and one of another folder of logs, which took the port meanwhile
    with socket.socket() as other:

        def taken() -> None:
            other.bind(("127.0.0.1", plan.port))
            other.listen()

        during = taken
        with pytest.raises(Ended, match="is not free"):
            Loads(plan, tmp_path, lambda _: None).__enter__()
    assert started[-1] == "decode server"


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
