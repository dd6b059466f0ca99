"""What one scheduler process knows: recipe, selection, packed layers, counters, and how to run the next pass.

``start`` is called once, when SGLang builds the quantization config; the hooks ask ``current``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixquant_sglang import __version__, phase
from mixquant_sglang.fingerprint import fingerprint
from mixquant_sglang.incoming import Known
from mixquant_sglang.kernels import Selection
from mixquant_sglang.metrics import PassCounters
from mixquant_sglang.phase import Pass, Phase
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.refresh import Layer, Weights
from mixquant_sglang.rows import EagerRows, GraphRows, Queries, RequestRows, RowPlan, plan

logger = logging.getLogger(__name__)

# Protected rows that a captured prefill graph can hold.  A pass with more of them runs eagerly: it is then a large
# batch of short requests, whose kernels are long enough to hide their launches.
GRAPH_ROWS = 64

# Multiplications of a linear, on average, from which on a pass without protected rows, such as a middle chunk of a long
# prompt, runs eagerly where graphs have slots for them.  The kernels of protected rows return at once, but for Qwen3-8B
# on an H200 that takes 0.25 ms of a pass.  So large a linear takes 0.45 ms there in FP8, its launches far less.
EAGER_PRODUCTS = 1 << 38

# Pairs of a query and a key from which on the last layer's attention leaves out rows that nobody reads.  2M pairs of
# Qwen3-8B take FA3 65 us on an H200; with half of them, it is estimated, picking the rows takes as long.
ATTENTION_PAIRS = 1 << 20


@dataclass(frozen=True, slots=True)
class PassPlan:
    """How a prefill pass runs and what it counts for: tokens by (phase, precision)."""

    running: Pass
    precision: str
    tokens: dict[tuple[str, str], int]
    protected: tuple[tuple[int, int], ...] = ()
    read: tuple[tuple[int, int], ...] | None = None  # the rows whose hidden states are looked at; None: all

    @property
    def protected_total(self) -> int:
        return sum(stop - start for start, stop in self.protected)


class Runtime:
    def __init__(self, recipe: Recipe, selection: Selection, *, ready_made: str = "") -> None:
        """``ready_made``: ``PrefillWeights.identity``."""
        self.recipe = recipe
        self.fingerprint = fingerprint(recipe, selection, ready_made=ready_made)
        self.selection = selection
        self.counters = PassCounters()
        self.labels = {Phase.PREFILL: selection.prefill, Phase.DECODE: selection.decode}
        self.weights = Weights()
        self.known = Known()  # of the checkpoint that was loaded at start
        self.sent_since_disk = False  # whether the weights are not those of any checkpoint on disk
        self.precisions: Counter[str] = Counter()  # linears by prefill precision
        self.experts: Counter[str] = Counter()  # MoE layers by prefill precision
        self.unproven: str | None = None  # why the probe could not run
        self.stays_bf16: dict[str, list[str]] = {}  # reason -> modules
        self.graph_rows: GraphRows | None = None  # protected rows, if captured graphs have slots for them
        self.graph_read: GraphRows | None = None  # rows that are read, if these are not the protected ones
        self.prunes = False  # whether the last layer leaves out rows that nobody reads
        self.prunes_attention = False  # whether its attention does so too
        self.split = selection.prefill != selection.decode  # whether rows can need protection
        self.finish_load: Callable[[Any], None] | None = None  # takes SGLang's model runner; None once it is loaded
        self.finish_attention: Callable[[Any], None] | None = None  # takes it again, once it has an attention back end
        # takes it and its eager runner, before graphs are captured
        self.prove: Callable[[Any, Any], None] | None = None
        self._captured = False
        self._graphs_logged = False
        self._products = 0  # multiplications for each row and linear, on average

    def label(self) -> None:
        """Names each column by what its layers run; call it when these are known.

        A column goes by the recipe's own precision where that is low and some layer runs it, else by the low ones that
        rules gave some layers, else by ``bf16``.  Passes and tokens are counted and logged under these names."""
        for column, own in ((Phase.PREFILL, self.selection.prefill), (Phase.DECODE, self.selection.decode)):
            low = {layer.precision[column] for layer in self.layers} - {"bf16"}
            self.labels[column] = own if own in low else "+".join(sorted(low)) or "bf16"

    # -- how a pass runs -------------------------------------------------------------------------------------------

    def plan_prefill(
        self, requests: Sequence[RequestRows], device: torch.device, *, reads_all: bool = False
    ) -> PassPlan:
        """Pass of EXTEND, MIXED or SPLIT_PREFILL over ``requests``, in row order; ``reads_all``: the hidden states of
        more rows than each request's last are asked for."""
        protects = self.recipe.protect_last_prompt_token
        rows = plan(requests, last_prompt_token=protects, tail=self.recipe.protected_tail)
        low, high = self.labels[Phase.PREFILL], self.labels[Phase.DECODE]
        # A recipe that is BF16 throughout has no copies: its passes are SGLang's, graphs too.
        if self.selection.kernels and not self.weights.current:
            counted = {("prefill", "bf16"): rows.prefill, ("decode", "bf16"): rows.decode}
            return PassPlan(phase.MASTER_PASS, "bf16", counted)
        if not self.split:
            return self._plan(rows, Pass(Phase.PREFILL), low, protected=())
        if rows.prefill < self.recipe.min_tokens:
            return self._plan(rows, phase.DECODE_PASS, high, protected=())
        if rows.protected_total == rows.total:
            return self._plan(rows, phase.DECODE_PASS, high, protected=rows.protected)
        eager = EagerRows(rows.total, rows.protected, device)
        running = Pass(Phase.PREFILL, eager if rows.protected else None)
        if reads_all or not self.prunes:
            return self._plan(rows, running, low, protected=rows.protected)
        # The last row of a middle chunk is sampled from too, but the token is thrown away.
        read = eager if protects else EagerRows(rows.total, rows.last, device)
        running = replace(running, read=read, queries=self._queries(requests, rows, device))
        return self._plan(rows, running, low, protected=rows.protected, read=rows.protected if protects else rows.last)

    def _queries(self, requests: Sequence[RequestRows], rows: RowPlan, device: torch.device) -> Queries | None:
        pairs = sum(request.new * (request.prefix + request.new // 2) for request in requests)
        if not self.prunes_attention or pairs < ATTENTION_PAIRS or not all(request.new for request in requests):
            return None
        protects = self.recipe.protect_last_prompt_token
        return Queries(rows.shares if protects else [(new, 1) for new, _ in rows.shares], device)

    def _plan(
        self,
        rows: RowPlan,
        running: Pass,
        precision: str,
        protected: tuple[tuple[int, int], ...],
        read: tuple[tuple[int, int], ...] | None = None,
    ) -> PassPlan:
        high = self.labels[Phase.DECODE]
        if running.column is Phase.DECODE:
            tokens = {("prefill", high): rows.prefill}
        else:
            prefill_high = sum(stop - start for start, stop in protected) - (rows.decode if protected else 0)
            tokens = {("prefill", high): prefill_high}
            tokens["prefill", precision] = tokens.get(("prefill", precision), 0) + rows.prefill - prefill_high
        tokens["decode", high] = rows.decode
        return PassPlan(running, precision, tokens, protected, read)

    def count_prefill(self, pass_plan: PassPlan) -> None:
        self.counters.add("prefill", pass_plan.precision, pass_plan.tokens, pass_plan.protected_total)

    def count_decode(self, rows: int) -> None:
        """Once per decode step, so it does as little as it can."""
        self.counters.add_decode(self.labels[Phase.DECODE] if self.weights.current else "bf16", rows)

    # -- prefill CUDA graphs ---------------------------------------------------------------------------------------

    @property
    def most_bf16_rows(self) -> int:
        """Rows of the largest prefill graph that no low pass fits into: each has ``min_tokens`` rows or more."""
        return self.recipe.min_tokens - 1 if self.split else 0

    def captured_pass(self, tokens: int, most: int, device: torch.device) -> Pass:
        """The pass that a prefill graph of ``tokens`` rows, at most ``most``, is captured with."""
        if tokens <= self.most_bf16_rows:
            return phase.DECODE_PASS
        if not self._captured:
            self._products = sum(n * k for n, k in (layer.shape for layer in self.layers)) // max(len(self.layers), 1)
        if not self._captured and self.split:
            if self.recipe.protect_last_prompt_token:
                self.graph_rows = GraphRows(GRAPH_ROWS, most, device)
            elif self.prunes:
                self.graph_read = GraphRows(GRAPH_ROWS, most, device, inverse=False)
        self._captured = True
        rows = self.graph_rows.of(tokens) if self.graph_rows else None
        read = None
        if self.prunes:
            read = self.graph_read.of(tokens) if self.graph_read else rows
        return Pass(Phase.PREFILL, rows, read)

    def load_graph(self, pass_plan: PassPlan) -> None:
        """Fills the buffers that captured prefill graphs read, for a pass that ``can_replay``."""
        if pass_plan.running.column is Phase.DECODE:
            return  # it replays a graph without slots, and may protect more rows than there are
        if self.graph_rows:
            self.graph_rows.fill(pass_plan.protected)
        if self.graph_read and pass_plan.read is not None:
            self.graph_read.fill(pass_plan.read)

    def can_replay(self, pass_plan: PassPlan, graph: int | None = None) -> bool:
        """Whether the prefill graph captured for ``graph`` rows (by default those of the pass) computes what
        ``pass_plan`` asks for."""
        if pass_plan.running.column is Phase.MASTER:
            return False
        if not self.split:
            return self.weights.fits_graphs()
        rows = sum(pass_plan.tokens.values())
        bf16_pass = pass_plan.running.column is Phase.DECODE
        bf16_graph = (graph or rows) <= self.most_bf16_rows
        if bf16_pass or bf16_graph:
            return bf16_pass and bf16_graph
        if not self.weights.fits_graphs():
            return False
        if self.prunes and pass_plan.read is None:
            return False
        if self.graph_rows and not pass_plan.protected:
            return rows * self._products < EAGER_PRODUCTS
        if self.graph_read and pass_plan.read is not None and len(pass_plan.read) > self.graph_read.capacity:
            return False
        # Without protection of the last prompt token most passes protect nothing, so graphs are captured without slots.
        return pass_plan.protected_total <= (self.graph_rows.capacity if self.graph_rows else 0)

    def can_replay_decode(self) -> bool:
        """Whether captured decode graphs, whose linears of low precision hold packed copies, compute the step."""
        if self.weights.as_captured:  # asked before each decode step, so the usual case looks at no layer
            return True
        return not self.weights.decodes_low or (self.weights.current and self.weights.fits_graphs())

    def log_graphs(self, sizes: Sequence[int]) -> None:
        """Says once which of the captured prefill graphs, of ``sizes`` rows, are BF16; which BF16 passes have none."""
        most = self.most_bf16_rows
        if self._graphs_logged or not most:
            return
        self._graphs_logged = True
        largest = max((size for size in sizes if size <= most), default=0)
        logger.info(
            "mixquant: prefill graphs of up to %d rows are captured in BF16, for passes below min_tokens = %d%s",
            largest,
            most + 1,
            f"; such passes of {largest + 1} to {most} rows run without a graph" if largest < most else "",
        )

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Layer]:
        return self.weights.layers

    @property
    def extra_weight_bytes(self) -> int:
        return sum(layer.extra_bytes for layer in self.layers)

    # -- what users see --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """``internal_states[i].mixquant`` of ``/server_info``; builtin types only."""
        state = {
            "version": __version__,
            "recipe": self.recipe.name,
            "fingerprint": self.fingerprint,
            "precision": {column.value: label for column, label in self.labels.items()},
            "kernel": dict(self.selection.kernels),
            "layers": dict(self.precisions),
            "experts": dict(self.experts),
            "stays_bf16": {reason: some(names) for reason, names in self.stays_bf16.items()},
            "extra_weight_bytes": self.extra_weight_bytes,
            "tokens": {name: self.counters.by_phase(name) for name in ("prefill", "decode")},
            "protected_rows": self.counters.protected_rows,
            "passes": {name: self.counters.passes_of(name) for name in ("prefill", "decode")},
        }
        return state if self.unproven is None else state | {"unproven": self.unproven}


def some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_runtime: Runtime | None = None


def start(runtime: Runtime) -> None:
    global _runtime
    _runtime = runtime


def current() -> Runtime | None:
    return _runtime
