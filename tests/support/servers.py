"""Three servers side by side, which the end-to-end tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.support.server import Server

CHUNK = 128
FLAGS = [
    "--chunked-prefill-size",
    str(CHUNK),
    "--enable-mixed-chunk",
    "--enable-cache-report",
    "--enable-streaming-session",
    "--random-seed",
    "1",
    "--sleep-on-idle",
]
LOW_RECIPE = os.environ.get("TEST_LOW_RECIPE", "auto")  # by hand: nvfp4 on a GPU whose auto is fp8


class Servers:
    def __init__(self, stock: Server, control: Server, low: Server, spy: Path, stock_fp8: Server | None = None) -> None:
        self.stock, self.control, self.low, self.spy, self.stock_fp8 = stock, control, low, spy, stock_fp8

    def batches(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.spy.read_text().splitlines()]
