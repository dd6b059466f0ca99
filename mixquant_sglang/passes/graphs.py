"""Captured CUDA graphs: the pass that a prefill graph is captured with, and which passes the graphs compute."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch

from mixquant_sglang.kernels.limits import FEW_ROWS
from mixquant_sglang.kernels.rows import GraphRows
from mixquant_sglang.passes import limits
from mixquant_sglang.passes.running import PROTECTED_PASS, Pass
from mixquant_sglang.passes.schedule import Copies, Packed, Schedule, ScheduledPass
from mixquant_sglang.recipe.roles import Kind, Role

logger = logging.getLogger(__name__)


class CapturedCopies(Copies, Protocol):
    """The packed copies of a model, some of whose numbers graphs hold by value (``weights/refresh.py``)."""

    @property
    def layers(self) -> Sequence[Packed]: ...

    @property
    def as_captured(self) -> bool: ...

    @property
    def decodes_low(self) -> bool: ...

    @property
    def decodes_by_value(self) -> bool: ...

    def fits_graphs(self) -> bool: ...


class Graphs:
    def __init__(self, schedule: Schedule, copies: CapturedCopies) -> None:
        self.protected: GraphRows | None = None  # if captured graphs have slots for protected rows
        self.read: GraphRows | None = None  # of rows that are read, if these are not the protected ones
        self._schedule = schedule
        self._copies = copies
        self._captured = self._logged = False
        self._low: set[int] = set()  # rows of the graphs that low passes replay

    @property
    def most_bf16_rows(self) -> int:
        """Rows of the largest prefill graph that no low pass fits into: each has ``min_tokens`` rows or more."""
        return self._schedule.min_tokens - 1 if self._schedule.split else 0

    @property
    def slots(self) -> int:
        """Rows that a captured low pass can protect."""
        return limits.EXPERT_GRAPH_ROWS if self._protects_experts else limits.GRAPH_ROWS

    @property
    def _protects_experts(self) -> bool:
        experts = (layer.precision for layer in self._copies.layers if layer.kind is Kind.EXPERTS)
        return any(precision[Role.PROMPT] != precision[Role.PROTECTED] for precision in experts)

    def captured_pass(self, tokens: int, most: int, device: torch.device) -> Pass:
        """The pass that a prefill graph of ``tokens`` rows, at most ``most``, is captured with."""
        schedule = self._schedule
        if tokens <= self.most_bf16_rows:
            return PROTECTED_PASS
        if not self._captured and schedule.split:
            if schedule.recipe.protect_last_prompt_token:
                self.protected = GraphRows(self.slots, most, device)
            elif schedule.prunes:
                self.read = GraphRows(self.slots, most, device, inverse=False)
        self._captured = True
        self._low.add(tokens)
        rows = self.protected.of(tokens) if self.protected else None
        read = None
        if schedule.prunes:
            read = self.read.of(tokens) if self.read else rows
        return Pass(Role.PROMPT, rows, read)

    def load(self, scheduled: ScheduledPass) -> None:
        """Fills the buffers that captured prefill graphs read, for a pass that ``can_replay``."""
        if scheduled.running.role is not Role.PROMPT:
            return  # it replays a graph without slots, and may protect more rows than there are
        if self.protected:
            self.protected.fill(scheduled.protected)
        if self.read and scheduled.read is not None:
            self.read.fill(scheduled.read)

    def can_replay(self, scheduled: ScheduledPass, graph: int | None = None) -> bool:
        """Whether the prefill graph captured for ``graph`` rows (by default those of the pass) computes what
        ``scheduled`` asks for."""
        schedule, running = self._schedule, scheduled.running
        if running.from_masters:
            return False
        if not schedule.split:
            return self._copies.fits_graphs()
        rows = sum(scheduled.tokens.values())
        bf16_pass = running.role is Role.PROTECTED
        bf16_graph = (graph or rows) <= self.most_bf16_rows
        if bf16_pass or bf16_graph:
            return bf16_pass and bf16_graph
        if not self._copies.fits_graphs():
            return False
        if schedule.prunes and scheduled.read is None:
            return False
        if self.read and scheduled.read is not None and len(scheduled.read) > self.read.capacity:
            return False
        if scheduled.protected_total > FEW_ROWS and rows >= limits.EAGER_TOKENS:
            return False
        # Without protection of the last prompt token most passes protect nothing, so graphs are captured without slots.
        return scheduled.protected_total <= (self.protected.capacity if self.protected else 0)

    def carries(self, scheduled: ScheduledPass) -> bool:
        """Whether a pass that decode rows alone make as long as ``min_tokens`` is better low: a captured graph computes
        it so, and its protected rows read no experts, of which some ten rows read most a second time.  Linears take up
        to 128 rows in the time of the one that ``min_tokens: auto`` was timed with (``triton/few_rows.py``)."""
        rows = sum(scheduled.tokens.values())
        captured = any(rows <= size <= limits.PADDING * rows for size in self._low)
        low = scheduled.running.role is Role.PROMPT
        return captured and low and not self._protects_experts and self.can_replay(scheduled)

    def can_replay_decode(self) -> bool:
        """Whether captured decode graphs, whose linears of low precision hold packed copies, compute the step."""
        copies = self._copies
        if copies.as_captured:  # asked before each decode step, so the usual case looks at no layer
            return True
        if copies.decodes_low and not copies.current:
            return False
        return not copies.decodes_by_value or copies.fits_graphs()

    def log(self, sizes: Sequence[int]) -> None:
        """Says once which of the captured prefill graphs, of ``sizes`` rows, are BF16; which BF16 passes have none."""
        most = self.most_bf16_rows
        if self._logged or not most:
            return
        self._logged = True
        largest = max((size for size in sizes if size <= most), default=0)
        logger.info(
            "mixquant: prefill graphs of up to %d rows are captured in BF16, for passes below min_tokens = %d%s",
            largest,
            most + 1,
            f"; such passes of {largest + 1} to {most} rows run without a graph" if largest < most else "",
        )
