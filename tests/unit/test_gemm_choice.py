"""The choice of a GEMM without a GPU: candidates and their times are made up, the rest is what the server runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.tuning import fp8_cache, fp8_gemm, fp8_measure, timing
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell, GemmTable

CPU = torch.device("cpu")
VERSIONS = {"sgl_kernel": "0.4.5"}
SHAPES = [(48, 32), (32, 64)]
ROWS = [16, 64]


class Fakes:
    """Candidates that note their calls and timers that note what was timed; both answer as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, int, int, bool]] = []  # name, n, k, m, bias
        self.timed: list[tuple[str, int, int, int]] = []
        self.ms: dict[str, float] = {"cutlass": 1.0, "cublas": 0.5}
        self.errors: dict[str, Callable[[int, int, int], Exception | None]] = {}
        monkeypatch.setattr(fp8_gemm, "CANDIDATES", {name: self.candidate(name) for name in self.ms})
        monkeypatch.setattr(fp8_measure, "milliseconds", self.milliseconds)
        monkeypatch.setattr(fp8_gemm, "_table", GemmTable({}))

    def candidate(self, name: str) -> fp8_gemm.Gemm:
        def run(
            xq: torch.Tensor, wq: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            (m, k), n = xq.shape, wq.shape[0]
            assert wq.shape == (n, k) and sx.shape == (m, 1) and sw.shape == (n,) and xq.is_contiguous()
            assert xq.dtype == wq.dtype == torch.float8_e4m3fn and sx.dtype == sw.dtype == torch.float32
            assert bias is None or (bias.shape == (n,) and bias.dtype == torch.bfloat16)
            for operand in (xq.float(), wq.float(), sx, sw):
                assert operand.isfinite().all() and (operand != 0).float().mean() > 0.95
            self.calls.append((name, n, k, m, bias is not None))
            error = self.errors.get(name, lambda n, k, m: None)(n, k, m)
            if error:
                raise error
            return torch.full((m, n), float(len(name)), dtype=torch.bfloat16)

        return run

    def milliseconds(self, calls: Sequence[Callable[[], torch.Tensor]], seconds: float) -> list[float]:
        out = []
        for call in calls:
            call()
            name, n, k, m, bias = self.calls.pop()
            assert not bias
            self.timed.append((name, n, k, m))
            out.append(self.ms[name] * m)
        return out


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXQUANT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=fp8_cache.logger.name)
    return caplog


def load(shapes: Sequence[tuple[int, int]] = SHAPES, rows: Sequence[int] = ROWS) -> GemmTable:
    return fp8_cache.load_or_tune(shapes, rows, CPU, VERSIONS)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]


def infos(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno == logging.INFO]


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()  # and no leftovers beside it
    return file


def cell(**ms: float) -> Cell:
    return Cell(ms, {})


# -- the lookup --------------------------------------------------------------------------------------------------------


def test_buckets_are_powers_of_two_from_16() -> None:
    edges = [(1, 16), (15, 16), (16, 16), (17, 32), (32, 32), (33, 64), (8192, 8192), (8193, 16384)]
    assert [fp8_gemm.bucket(m) for m, _ in edges] == [b for _, b in edges]


def test_pick_at_the_edges_of_buckets() -> None:
    fast, slow = cell(cutlass=1.0, cublas=2.0), cell(cutlass=2.0, cublas=1.0)
    table = GemmTable({(48, 32, 512): slow, (48, 32, 64): fast, (48, 32, 128): slow, (32, 48, 64): slow})
    table = GemmTable({**table.cells, (48, 32, 512): fast})
    picks = {m: table.pick(48, 32, m) for m in (1, 16, 64, 65, 128, 129, 256, 512, 513, 10**6)}
    assert picks == {m: "cublas" if m in (65, 128) else "cutlass" for m in picks}
    assert table.pick(32, 48, 64) == "cublas"  # [N, K], not [K, N]
    assert table.pick(48, 48, 64) == "cutlass"  # not tuned
    ends = GemmTable({(48, 32, 64): slow, (48, 32, 128): fast, (48, 32, 256): slow})
    assert [ends.pick(48, 32, m) for m in (1, 64, 65, 257, 10**6)] == ["cublas", "cublas", "cutlass"] + ["cublas"] * 2


def test_what_was_chosen_is_said_by_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.host.runtime import Runtime
    from mixquant_sglang.recipe import load
    from mixquant_sglang.recipe.select import Device, select

    monkeypatch.setattr(fp8_gemm, "_table", GemmTable({}))
    run = Runtime(asked := load("fp8"), select(asked, Device("this CPU", None)))
    assert "fp8_gemms" not in run.state()
    fast, slow = cell(cutlass=1.0, cublas=2.0), cell(cutlass=2.0, cublas=1.0)
    fp8_gemm.use(GemmTable({(48, 32, 64): fast, (48, 32, 32): slow, (48, 32, 16): fast, (32, 48, 16): slow}))
    chosen = {"48 x 32": {"cutlass": [16, 64], "cublas": [32]}, "32 x 48": {"cublas": [16]}}
    assert run.state()["fp8_gemms"] == json.loads(json.dumps(chosen)) == chosen


@pytest.mark.parametrize(
    ("cutlass", "cublas", "chosen"),
    [
        (1.0, 0.99, "cutlass"),
        (1.02, 1.0, "cutlass"),
        (1.03, 1.0, "cublas"),
        (1.0, 1.0, "cutlass"),
        (1.0, 9.0, "cutlass"),
    ],
)
def test_a_tie_goes_to_the_first_candidate(cutlass: float, cublas: float, chosen: str) -> None:
    assert cell(cutlass=cutlass, cublas=cublas).pick == chosen


def test_scaled_mm_runs_what_the_table_says(fakes: Fakes) -> None:
    xq, wq = torch.ones(17, 32).to(torch.float8_e4m3fn), torch.ones(48, 32).to(torch.float8_e4m3fn)
    operands = xq, wq, torch.ones(17, 1), torch.ones(48)
    assert fp8_gemm.scaled_mm(*operands).unique().tolist() == [len("cutlass")]  # before anything is tuned
    fp8_gemm.use(GemmTable({(48, 32, 16): cell(cutlass=1.0, cublas=2.0), (48, 32, 32): cell(cutlass=2.0, cublas=1.0)}))
    bias = torch.zeros(48, dtype=torch.bfloat16)
    assert fp8_gemm.scaled_mm(*operands, bias).unique().tolist() == [len("cublas")]
    fp8_gemm.use(GemmTable({}))
    fp8_gemm.scaled_mm(*operands)
    assert fakes.calls == [("cutlass", 48, 32, 17, False), ("cublas", 48, 32, 17, True), ("cutlass", 48, 32, 17, False)]


# -- tuning ------------------------------------------------------------------------------------------------------------


def test_tune_times_each_candidate_once_per_shape_and_bucket(fakes: Fakes) -> None:
    before = torch.get_rng_state()
    table = fp8_measure.tune([*SHAPES, SHAPES[0]], [64, 16, 9, 50], CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert fakes.timed == [(name, n, k, m) for n, k in SHAPES for m in (16, 64) for name in ("cutlass", "cublas")]
    assert ("cublas", 48, 32, 63, True) in fakes.calls  # tried with an odd row count and a bias
    assert set(table.cells) == {(n, k, m) for n, k in SHAPES for m in (16, 64)}
    assert table.pick(48, 32, 50) == "cublas" and table.cells[48, 32, 64].ms == {"cutlass": 64.0, "cublas": 32.0}
    assert fp8_measure.tune([], ROWS, CPU).cells == {}


@pytest.mark.parametrize("error", [RuntimeError("no such kernel\nat gemm.cpp:1"), ImportError("no such kernel")])
def test_a_candidate_that_raises_is_out_for_that_shape(fakes: Fakes, error: Exception) -> None:
    fakes.errors["cublas"] = lambda n, k, m: error if (n, m) == (48, 63) else None
    table = fp8_measure.tune(SHAPES, ROWS, CPU)
    assert [table.pick(48, 32, m) for m in ROWS] == ["cutlass"] * 2 and table.pick(32, 64, 16) == "cublas"
    assert ("cublas", 48, 32, 16) not in fakes.timed
    first, second = str(table).splitlines()
    assert (
        first
        == "fp8 GEMM [32, 64]: 16 rows cublas 8.000 ms (cutlass 16.000), 64 rows cublas 32.000 ms (cutlass 64.000)"
    )
    assert second == (
        "fp8 GEMM [48, 32]: 16 rows cutlass 16.000 ms, 64 rows cutlass 64.000 ms; cublas is out: no such kernel"
    )


def test_a_shape_that_nothing_runs(fakes: Fakes) -> None:
    fakes.errors = {name: lambda n, k, m: RuntimeError(f"refuses {n}") if n == 32 else None for name in fakes.ms}
    with pytest.raises(MixQuantError, match=r"\[32, 64\].*cutlass: refuses 32.*cublas: refuses 32"):
        fp8_measure.tune(SHAPES, ROWS, CPU)


def test_too_little_memory_is_neither_a_refusal_nor_kept(
    fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture
) -> None:
    fakes.errors["cublas"] = lambda n, k, m: torch.OutOfMemoryError("CUDA out of memory") if n == 48 else None
    table = load()
    assert table.pick(48, 32, 16) == "cutlass" and table.pick(32, 64, 16) == "cublas"
    assert len(warnings(log)) == 1 and "[48, 32]" in warnings(log)[0] and len(infos(log)) == 1
    fakes.errors.clear()
    assert load().pick(48, 32, 16) == "cublas"


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_the_second_start_tunes_nothing(fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture) -> None:
    fakes.errors["cublas"] = lambda n, k, m: RuntimeError("no such kernel") if n == 32 else None
    tuned = load()
    lines = infos(log)
    assert lines == [f"mixquant: {tuned.describe(n, k)}" for n, k in sorted(SHAPES)] and "cublas is out" in lines[0]
    assert json.loads(the_file(folder).read_text())["key"]["torch"] == torch.__version__
    log.clear()
    fakes.timed.clear()
    fakes.calls.clear()
    cached = load()
    assert cached.cells == tuned.cells and not fakes.timed and not fakes.calls
    assert infos(log) == [f"{line} (cached)" for line in lines] and not warnings(log)


def test_only_what_is_missing_is_tuned(fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture) -> None:
    load(SHAPES[:1], [64])
    log.clear()
    fakes.timed.clear()
    table = load(SHAPES, [64])
    assert {where[1:] for where in fakes.timed} == {(32, 64, 64)}
    assert [line.endswith("(cached)") for line in infos(log)] == [False, True]  # [32, 64] comes first
    fakes.timed.clear()
    fakes.ms["cublas"] = 9.0
    table = load(SHAPES[:1], [1000, 64])
    assert {where[1:] for where in fakes.timed} == {(48, 32, 1024)}
    assert (table.pick(48, 32, 64), table.pick(48, 32, 65)) == ("cublas", "cutlass")
    fakes.timed.clear()
    assert set(load(SHAPES, [64]).cells) == {(n, k, 64) for n, k in SHAPES} and not fakes.timed  # nothing was lost


def spoil(change: Callable[[dict], object]) -> Callable[[str], str]:
    def spoiled(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return spoiled


BROKEN: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "not json": lambda text: "{'key': 1}",
    "not text": lambda text: b"\xff\xfe\x00",
    "too deep": lambda text: "[" * 200_000,
    "truncated": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "no entries": spoil(lambda d: d.pop("entries")),
    "entries of another type": spoil(lambda d: d.update(entries=3)),
    "an entry of another type": spoil(lambda d: d["entries"].append("x")),
    "another gpu": spoil(lambda d: d["key"].update(gpu="another")),
    "another version": spoil(lambda d: d["key"].update(sgl_kernel="0.1")),
    "no key": spoil(lambda d: d.pop("key")),
    "unknown candidate": spoil(lambda d: d["entries"][0]["ms"].update(marlin=0.1)),
    "a candidate less": spoil(lambda d: d["entries"][0]["ms"].pop("cublas")),
    "no times": spoil(lambda d: d["entries"][0].update(ms={}, out={"cutlass": "", "cublas": ""})),
    "time as text": spoil(lambda d: d["entries"][0]["ms"].update(cublas="0.1")),
    "time of nan": spoil(lambda d: d["entries"][0]["ms"].update(cublas=float("nan"))),
    "negative time": spoil(lambda d: d["entries"][0]["ms"].update(cublas=-0.1)),
    "rows no power of two": spoil(lambda d: d["entries"][0].update(rows=48)),
    "shape as text": spoil(lambda d: d["entries"][0].update(n="48")),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_broken_or_foreign_is_rebuilt(
    fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture, how: str
) -> None:
    good = load()
    file = the_file(folder)
    text = file.read_text()
    spoiled = BROKEN[how](text)
    file.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    log.clear()
    fakes.timed.clear()
    assert load().cells == good.cells and len(fakes.timed) == 2 * len(good.cells)
    (line,) = warnings(log)
    assert line.startswith(f"mixquant: {file}: ") and line.endswith(": rebuilt") and "\n" not in line
    assert the_file(folder).read_text() == text


def test_other_versions_have_a_file_of_their_own(fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture) -> None:
    load()
    fakes.timed.clear()
    fp8_cache.load_or_tune(SHAPES, ROWS, CPU, {"sgl_kernel": "0.4.10"})
    assert len(fakes.timed) == 8 and len(list(folder.iterdir())) == 2 and not warnings(log)


@pytest.mark.parametrize("obstacle", ["a file in its place", "a directory as the file", "no home"])
def test_a_folder_that_cannot_be_written_is_one_warning(
    fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle == "a file in its place":
        folder.write_text("")
    elif obstacle == "a directory as the file":
        load()
        file = the_file(folder)
        file.unlink()
        (file / "in the way").mkdir(parents=True)
        log.clear()
    else:
        monkeypatch.delenv("MIXQUANT_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "expanduser", no_home)
    assert load().pick(48, 32, 64) == "cublas"
    (line,) = warnings(log)
    assert "cannot be written" in line and len(infos(log)) == 2


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_where_the_file_lies(fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MIXQUANT_CACHE_DIR", "")  # empty counts as unset
    for xdg, folder in (("", tmp_path / ".cache" / "mixquant"), (str(tmp_path / "xdg"), tmp_path / "xdg" / "mixquant")):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        load()
        assert the_file(folder).suffix == ".json"


def test_what_another_rank_wrote_meanwhile_goes_first(
    fakes: Fakes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with close times would else choose differently."""

    def slow_rank(calls: Sequence[Callable[[], torch.Tensor]], seconds: float) -> list[float]:
        monkeypatch.setattr(fp8_measure, "milliseconds", fakes.milliseconds)
        load([(48, 32)], [16])  # the other rank, done before this one
        return [1.0, 5.0]

    monkeypatch.setattr(fp8_measure, "milliseconds", slow_rank)
    assert load([(48, 32)], [16]).pick(48, 32, 16) == "cublas"
    assert load([(48, 32)], [16]).pick(48, 32, 16) == "cublas"


def test_what_others_disturbed_serves_this_start_alone(
    fakes: Fakes, folder: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(calls: Sequence[Callable[[], torch.Tensor]], seconds: float) -> list[float]:
        timing._disturbed(3.0)
        return fakes.milliseconds(calls, seconds)

    monkeypatch.setattr(timing, "_said", False)
    monkeypatch.setattr(fp8_measure, "milliseconds", shared)
    assert load().pick(48, 32, 16) == "cublas" and not folder.exists()
    said = warnings(log)
    assert len(said) == 2 and "in use by others" in said[0] and "the next start times again" in said[1]
    fakes.timed.clear()
    monkeypatch.setattr(fp8_measure, "milliseconds", fakes.milliseconds)
    load()
    assert fakes.timed and the_file(folder)


def test_racing_writers_leave_a_whole_file(folder: Path, tmp_path: Path) -> None:
    path, key = folder / "f.json", {"gpu": "x"}
    tables = [
        {(16 * n, 16, 16): Cell({"cutlass": float(rank + 1), "cublas": 1.0}, {}) for n in range(1, 400)}
        for rank in range(4)
    ]
    fp8_cache.FILE._write(path, key, tables[0])
    seen: list[str] = []
    done = threading.Event()

    def write(rank: int) -> None:
        for _ in range(15):
            fp8_cache.FILE._write(path, key, tables[rank])

    def read() -> None:
        while not done.is_set():
            cells, complaint = fp8_cache.FILE._read(path, key)
            seen.append(complaint if cells in tables else complaint or "mixed or missing")

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert len(seen) > 1 and set(seen) == {""}
    assert [file.name for file in folder.iterdir()] == ["f.json"]


def test_imports_neither_sglang_nor_its_kernels() -> None:
    code = (
        "import sys, mixquant_sglang.kernels.tuning.fp8_cache; assert not {'sglang', 'sgl_kernel'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
