"""How a prefill pass runs: which of its rows are protected, which are read, what they count for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from mixquant_sglang.kernels.rows import EagerRows
from mixquant_sglang.passes import limits
from mixquant_sglang.passes.attention import LowLimits, LowRows
from mixquant_sglang.passes.queries import Queries
from mixquant_sglang.passes.rows import RequestRows, RowSplit, split_rows
from mixquant_sglang.passes.running import MASTER_PASS, PROTECTED_PASS, Pass
from mixquant_sglang.recipe.roles import Kind, PrecisionTable, Role, by_role
from mixquant_sglang.recipe.schema import Recipe
from mixquant_sglang.recipe.select import Selection


@dataclass(frozen=True, slots=True)
class ScheduledPass:
    """How a prefill pass runs and what it counts for: tokens by (phase, precision)."""

    running: Pass
    precision: str
    tokens: dict[tuple[str, str], int]
    protected: tuple[tuple[int, int], ...] = ()
    read: tuple[tuple[int, int], ...] | None = None  # the rows whose hidden states are looked at; None: all
    short: bool = False  # whether it is BF16 because it is below ``min_tokens``

    @property
    def protected_total(self) -> int:
        return sum(stop - start for start, stop in self.protected)


class Packed(Protocol):
    """A linear, or the experts of a layer, with packed copies."""

    kind: Kind
    precision: dict[Role, str]

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weights that a row is multiplied by."""


class Copies(Protocol):
    """The packed copies of a model (``weights/refresh.py``)."""

    @property
    def current(self) -> bool:
        """Whether they are those of their masters."""

    @property
    def fallback(self) -> str:
        """What rows count under while they are not."""


class Schedule:
    """Of one recipe and model; ``table`` says what rows of each role take, and passes count under its words."""

    def __init__(self, recipe: Recipe, selection: Selection, copies: Copies, *, by_request: bool = False) -> None:
        """``by_request``: ``min_tokens`` speaks of a request's prompt, not of a pass: which of its rows are low does
        not depend on who is beside it, nor on its chunks."""
        self.recipe = recipe
        self.selection = selection
        self.by_request = by_request
        self.min_tokens = recipe.min_tokens or 1  # passes of fewer stay BF16; "auto" is 1 until it was measured
        self.table = PrecisionTable(by_role(selection.prefill, selection.decode))
        self.words = by_role(selection.prefill, selection.decode)  # role -> what passes and tokens count under
        self.split = selection.prefill != selection.decode  # whether rows can need protection
        self.prunes = False  # whether the last layer leaves out rows that nobody reads
        self.prunes_attention = False  # whether its attention does so too
        self.local = False  # whether layers between attention are given the rows of all ranks (DP attention)
        self.low_attention: LowLimits | None = None  # of which requests attention runs in low precision
        self.carries: Callable[[ScheduledPass], bool] = lambda _: False  # of captured graphs: ``Graphs.carries``
        self._copies = copies
        self._name_roles()

    def label(self, layers: Collection[Packed]) -> None:
        """Makes ``table`` and ``words`` what the layers run; call it when these are known.

        A role goes by every low precision that some layer runs it in, the recipe's own first (``nvfp4+fp8``), else by
        ``bf16``."""
        kinds = {kind: [layer for layer in layers if layer.kind is kind] for kind in (Kind.LINEAR, Kind.EXPERTS)}
        attention = {} if self.low_attention is None else {Role.PROMPT: self.recipe.attention}
        self.table = PrecisionTable(self._words(kinds[Kind.LINEAR]), self._words(kinds[Kind.EXPERTS]), attention)
        self.words = self._words(layers)
        self._name_roles()

    def _words(self, layers: Collection[Packed]) -> dict[Role, str]:
        words = {}
        for role, own in by_role(self.selection.prefill, self.selection.decode).items():
            low = {layer.precision[role] for layer in layers} - {"bf16"}
            words[role] = "+".join([*(low & {own}), *sorted(low - {own})]) or "bf16"
        return words

    def _name_roles(self) -> None:
        self._prompt, self._protected, self.decode = (
            self.words[role] for role in (Role.PROMPT, Role.PROTECTED, Role.DECODE)
        )

    def prefill(
        self, requests: Sequence[RequestRows], device: torch.device, *, reads_all: bool = False
    ) -> ScheduledPass:
        """Pass of EXTEND, MIXED or SPLIT_PREFILL over ``requests``, in row order; ``reads_all``: the hidden states of
        more rows than each request's last are asked for."""
        if self.by_request:
            requests = [replace(r, bf16=True) if r.prompt < self.min_tokens else r for r in requests]
        rows = split_rows(
            requests, last_prompt_token=self.recipe.protect_last_prompt_token, tail=self.recipe.protected_tail
        )
        # A recipe that is BF16 throughout has no copies: its passes are SGLang's, graphs too.
        if self.selection.kernels and not self._copies.current:
            fallback = self._copies.fallback
            counted = {("prefill", fallback): rows.prefill, ("decode", fallback): rows.decode}
            return ScheduledPass(MASTER_PASS, fallback, counted)
        attention = self._low_rows(requests, rows, device)
        if not self.split:
            return self._scheduled(rows, Pass(Role.PROMPT, attention=attention), protected=())
        if not self._short(requests, rows):
            return self._by_row(requests, rows, device, attention, reads_all)
        if rows.decode and rows.total >= self.min_tokens and not self.by_request:
            # BF16 graphs end below ``min_tokens``. Launched one by one, BF16 passes of Qwen3-8B take 17.5 ms on an H200
            # however few rows they have; 768 rows take 15.8 in the graph of low ones (docs/benchmarks.md).
            by_row = self._by_row(requests, rows, device, attention, reads_all)
            if self.carries(by_row):
                return by_row
        return replace(self._scheduled(rows, PROTECTED_PASS, protected=()), short=True)

    def _short(self, requests: Sequence[RequestRows], rows: RowSplit) -> bool:
        if self.by_request:
            return all(request.decoding or request.prompt < self.min_tokens for request in requests)
        return rows.prefill < self.min_tokens

    def _by_row(
        self,
        requests: Sequence[RequestRows],
        rows: RowSplit,
        device: torch.device,
        attention: LowRows | None,
        reads_all: bool,
    ) -> ScheduledPass:
        """Each row in its own precision."""
        protects = self.recipe.protect_last_prompt_token
        if rows.protected_total == rows.total:
            return self._scheduled(rows, PROTECTED_PASS, protected=rows.protected)
        eager = EagerRows(rows.total, rows.protected, device)
        running = Pass(Role.PROMPT, eager if rows.protected else None, attention=attention)
        running = replace(running, tokens=rows.total if self.local else None)
        if reads_all or not self.prunes:
            return self._scheduled(rows, running, protected=rows.protected)
        # The last row of a middle chunk is sampled from too, but the token is thrown away.
        read = eager if protects else EagerRows(rows.total, rows.last, device)
        running = replace(running, read=read, queries=self._queries(requests, rows, device))
        return self._scheduled(rows, running, protected=rows.protected, read=rows.protected if protects else rows.last)

    @staticmethod
    def padded(running: Pass, tokens: int) -> Pass:
        """``running`` with ``tokens`` rows: those that SGLang added at its end belong to no request."""
        rows = running.rows
        assert rows is None or isinstance(rows, EagerRows), "a captured pass has its rows"
        return replace(running, tokens=tokens, rows=None if rows is None else rows.padded(tokens))

    def _queries(self, requests: Sequence[RequestRows], rows: RowSplit, device: torch.device) -> Queries | None:
        pairs = sum(request.new * (request.prefix + request.new // 2) for request in requests)
        if not self.prunes_attention or pairs < limits.ATTENTION_PAIRS or not all(request.new for request in requests):
            return None
        protects = self.recipe.protect_last_prompt_token
        return Queries(rows.shares if protects else [(new, 1) for new, _ in rows.shares], device)

    def _low_rows(self, requests: Sequence[RequestRows], rows: RowSplit, device: torch.device) -> LowRows | None:
        if self.low_attention is None:
            return None
        low = LowRows(requests, rows.shares, self.low_attention, device)
        return low if low.requests else None

    def _scheduled(
        self,
        rows: RowSplit,
        running: Pass,
        protected: tuple[tuple[int, int], ...],
        read: tuple[tuple[int, int], ...] | None = None,
    ) -> ScheduledPass:
        if running.role is Role.PROTECTED:
            precision = self._protected
            tokens = {("prefill", precision): rows.prefill}
        else:
            precision = self._prompt
            protected_prefill = sum(stop - start for start, stop in protected) - (rows.decode if protected else 0)
            tokens = {("prefill", self._protected): protected_prefill}
            tokens["prefill", precision] = tokens.get(("prefill", precision), 0) + rows.prefill - protected_prefill
        # Decode rows of a mixed pass are protected ones, or, where nothing is protected, take what prompt rows take.
        tokens["decode", self._protected] = rows.decode
        return ScheduledPass(running, precision, tokens, protected, read)
