"""How protected rows in captured passes are taken follows from the server's flags, for as long as it lives."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.host import compact

packed_rows = pytest.importorskip("mixquant_sglang.kernels.triton.packed_rows")
packed_tiles = pytest.importorskip("mixquant_sglang.kernels.triton.packed_tiles")


@pytest.mark.parametrize(
    ("name", "device", "mixed", "walk"),
    [
        ("fp8-compact", "cuda", True, 0),
        ("fp8-compact", "cuda:0", True, 0),
        ("nvfp4-compact", "cuda", True, 0),
        ("fp8-compact", "cuda", False, packed_rows.FEW_USED),
        ("fp8-compact", "cpu", True, 3),
        ("fp8", "cuda", True, 3),
    ],
)
def test_mixed_chunks_are_taken_by_tiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, device: str, mixed: bool, walk: int
) -> None:
    monkeypatch.setattr(packed_rows, "WALK", 3)
    runner = SimpleNamespace(device=device, server_args=SimpleNamespace(enable_mixed_chunk=mixed))
    with caplog.at_level(logging.INFO):
        compact.expect_slots(recipe.load(name), runner)
    assert walk == packed_rows.WALK
    assert ("64 slots at a time" in caplog.text) == (walk == 0 and packed_tiles.STRAIGHT)
