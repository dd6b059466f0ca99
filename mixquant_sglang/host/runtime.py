"""What one scheduler process knows: recipe, selection, packed layers, how passes run, and what ran.

``start`` is called once, when SGLang builds the quantization config; the hooks ask ``current``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mixquant_sglang import __version__
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.tuning import fp8_gemm
from mixquant_sglang.layers.gathered_attention import Gathering
from mixquant_sglang.layers.low_attention import LowAttention
from mixquant_sglang.passes.counters import PassCounters
from mixquant_sglang.passes.graphs import Graphs
from mixquant_sglang.passes.schedule import Schedule, ScheduledPass
from mixquant_sglang.recipe import pairs
from mixquant_sglang.recipe.capabilities import in_words
from mixquant_sglang.recipe.fingerprint import fingerprint
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.schema import Recipe
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.recipe.text import some
from mixquant_sglang.versions.speculation import is_draft
from mixquant_sglang.weights.arriving import Arriving
from mixquant_sglang.weights.incoming import Known
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.refresh import Layer, Weights

if TYPE_CHECKING:
    from mixquant_sglang.layers.norm_rope import NormRope


class Lifecycle(Protocol):
    """What is done with the model at SGLang's steps (``host/lifecycle.py``)."""

    @property
    def loading(self) -> bool:
        """Whether the model is not loaded yet."""

    @property
    def unproved(self) -> bool:
        """Whether ``prove`` is still to come."""

    def finish_load(self, model_runner: Any) -> None: ...

    def finish_attention(self, model_runner: Any) -> None: ...

    def prove(self, model_runner: Any, eager_runner: Any) -> None: ...


@dataclass
class Pair:
    """One half of a prefill/decode pair: ``mode``, the recipe as it was ``asked`` for, and, of a decode server, the
    ``fingerprint`` that it names keys and values by."""

    mode: str
    asked: Recipe
    fingerprint: str = ""
    model: str = ""  # Identity.model and Identity.weights, once the model is loaded
    weights: str = ""
    kept: str = ""  # the fingerprint of what a decode server keeps for later requests
    said: dict[str, tuple[Any, str]] = field(default_factory=dict)  # bootstrap address -> SGLang's facts, our verdict

    def forget_weights(self) -> None:
        """They were updated, and the two halves of a pair are not updated at once: they are not compared any more."""
        self.weights = ""


@dataclass(frozen=True)
class Stage:
    """What one stage of a pipeline holds; the only one of a model that has no pipeline."""

    layers: Counter[str]
    experts: Counter[str]
    stays_bf16: dict[str, list[str]]
    extra_weight_bytes: int


class Runtime:
    def __init__(
        self,
        recipe: Recipe,
        selection: Selection,
        *,
        ready_made: str = "",
        environment: Environment = NOTHING,
        pair: Pair | None = None,
    ) -> None:
        """``ready_made``: ``ReadyMadeWeights.identity``; ``environment``: what kernels need of the server; ``pair``:
        of a server that does one phase alone."""
        self.recipe = recipe
        self.environment = environment
        self.pair = pair
        own = fingerprint(recipe, selection, ready_made=ready_made, invariant=environment.invariant)
        self.fingerprint = own if pair is None or pair.mode != pairs.DECODE else pair.fingerprint
        self.selection = selection
        self.counters = PassCounters()
        self.weights = Weights()
        self.schedule = Schedule(recipe, selection, self.weights, by_request=environment.invariant)
        self.graphs = Graphs(self.schedule, self.weights)
        self.schedule.carries = self.graphs.carries
        self.lifecycle: Lifecycle | None = None
        self.known = Known()  # of the checkpoint that was loaded at start
        self.quantised: QuantisedCheckpoint | None = None  # where its weights are the only ones
        self.arriving = Arriving()  # the weight update that SGLang carries out
        self.precisions: Counter[str] = Counter()  # linears by the precision of prompt rows
        self.experts: Counter[str] = Counter()  # MoE layers by that of prompt rows
        self.gathering: Gathering | None = None  # of keys and values for prefill attention, where it pays
        self.low_attention: LowAttention | None = None  # where the recipe asks for it
        self.norm_rope: NormRope | None = None  # one kernel between qkv_proj and attention, where it pays
        self.shortage: Callable[[], str] | None = None  # for a server that has too little memory, once it is loaded
        self.unproven: str | None = None  # why the probe could not run
        self.stays_bf16: dict[str, list[str]] = {}  # reason -> modules
        self.bf16_linear_bytes = 0  # of linears and experts on this rank, in BF16
        self.dropped_bytes = 0  # of those, what is not kept
        self.phases: tuple[str, ...] = ("prefill", "decode")  # and "verify", where the server speculates
        self.stages: list[Stage] = []  # of all ranks of the pipeline, once the model is loaded

    def use_quantised(self, checkpoint: QuantisedCheckpoint | None) -> None:
        self.quantised = self.known.quantised = checkpoint

    def loaders_see(self, weights: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
        """What SGLang's loaders are to see of the tensors of a checkpoint or an update."""
        return weights if self.quantised is None else self.quantised.sorted_out(weights)

    @property
    def loading(self) -> bool:
        return self.lifecycle is not None and self.lifecycle.loading

    def count_prefill(self, scheduled: ScheduledPass) -> None:
        self.counters.add("prefill", scheduled.precision, scheduled.tokens, scheduled.protected_total)
        if scheduled.short:
            self.counters.add_short(sum(scheduled.tokens.values()))

    def count_decode(self, rows: int, role: Role = Role.DECODE) -> None:
        """Once per decode step, or per verification of a draft, so it does as little as it can."""
        word = self.schedule.words[role] if self.weights.current else self.weights.fallback
        self.counters.add_rows(role.value, word, rows)

    @property
    def layers(self) -> list[Layer]:
        return self.weights.layers

    @property
    def packed_weight_bytes(self) -> int:
        return sum(layer.extra_bytes for layer in self.layers)

    @property
    def extra_weight_bytes(self) -> int:
        """Beside the BF16 weights; below zero where packed ones replace them, as ``mixquant plan`` counts."""
        return self.packed_weight_bytes - self.dropped_bytes

    @property
    def linear_weight_bytes(self) -> int:
        """Of linears and experts on this rank, as they are held."""
        return self.bf16_linear_bytes + self.extra_weight_bytes

    @property
    def generated_from(self) -> str:
        """In words: what linears compute generated tokens from."""
        return " and ".join(in_words(precision) for precision in self.schedule.words[Role.DECODE].split("+"))

    def stage(self) -> Stage:
        """Of this rank."""
        return Stage(self.precisions, self.experts, self.stays_bf16, self.extra_weight_bytes)

    def counted(self, what: str) -> dict[str, int]:
        """``layers`` or ``experts`` of all stages, by the precision of prompt rows."""
        stages = self.stages if len(self.stages) > 1 else [self.stage()]
        return dict(sum((getattr(stage, what) for stage in stages), Counter()))

    def state(self) -> dict[str, Any]:
        """``internal_states[i].mixquant`` of ``/server_info``; builtin types only."""
        table, several = self.schedule.table, len(self.stages) > 1
        kept: dict[str, list[str]] = {}
        for stage in self.stages if several else [self.stage()]:
            for reason, names in stage.stays_bf16.items():
                kept.setdefault(reason, []).extend(names)
        state: dict[str, Any] = {
            "version": __version__,
            "recipe": self.recipe.name,
            "fingerprint": self.fingerprint,
            "precision": {"prefill": self.schedule.words[Role.PROMPT], "decode": self.schedule.words[Role.DECODE]},
            "roles": {role.value: table.row(role) for role in Role},
            "kernel": dict(self.selection.kernels),
            "layers": self.counted("layers"),
            "experts": self.counted("experts"),
            "stays_bf16": {reason: some(names) for reason, names in kept.items()},
            "extra_weight_bytes": self.extra_weight_bytes,
            "packed_weight_bytes": self.packed_weight_bytes,
            "linear_weight_bytes": self.linear_weight_bytes,
            "bf16_linear_bytes": self.bf16_linear_bytes,
            "generated_from": self.generated_from,
            "tokens": {name: self.counters.by_phase(name) for name in self.phases},
            "protected_rows": self.counters.protected_rows,
            "min_tokens": self.schedule.min_tokens,
            "below_min_tokens": {"passes": self.counters.short_passes, "rows": self.counters.short_rows},
            "passes": {name: self.counters.passes_of(name) for name in self.phases},
        }
        if gemms := fp8_gemm.choices():
            state["fp8_gemms"] = gemms
        if self.environment.invariant:
            state |= {"deterministic": True}
        if self.pair is not None:
            state |= {"disaggregation": self.pair.mode}
        if self.gathering is not None:
            state["gathered_attention"] = self.gathering.state()
        if self.norm_rope is not None:
            state["norm_rope"] = self.norm_rope.state()
        if self.low_attention is not None:
            low = self.counters.low_attention_rows
            rows = {"fp8": low, "bf16": sum(self.counters.by_phase("prefill").values()) - low}
            state["attention"] = self.low_attention.state() | {
                "rows": rows,
                "passes": self.counters.low_attention_passes,
            }
        if self.weights.mixed is not None:
            state["weights_mixed"] = self.weights.mixed
        if several:
            state["stages"] = [
                {"layers": dict(s.layers), "experts": dict(s.experts), "extra_weight_bytes": s.extra_weight_bytes}
                for s in self.stages
            ]
        return state if self.unproven is None else state | {"unproven": self.unproven}


_runtime: Runtime | None = None


def start(runtime: Runtime) -> None:
    global _runtime
    _runtime = runtime


def current() -> Runtime | None:
    return _runtime


def serving(model_runner: Any) -> Runtime | None:
    """``current``, if ``model_runner`` has the served model; None for a draft's, in which everything is SGLang's."""
    return None if _runtime is None or is_draft(model_runner) else _runtime
