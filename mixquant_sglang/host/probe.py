"""One tiny prompt and one decode step through the loaded model, to see which linears SGLang runs through us.

SGLang multiplies some layers past their linear method: it reads ``.weight`` itself.  No list of models can know, so the
model is run, once it can run and before graphs are captured, by the very path that serves: ``ModelRunner.forward``.  Of
two requests one ends its prompt, so that rows are protected, and one is a chunk of a longer prompt.  A linear that no
prefill pass called is BF16 from then on: its packed copy goes, and report, labels and metrics say so; where a rule
asked for its precision the start ends.  Some code of SGLang takes small passes alone, so there are two sizes, and what
is missing in one of them is reported as such.

Nothing stays behind: counters, KV and request pools are as before, no token is sampled.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import report
from mixquant_sglang.host.assignment import Assignment
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.passes.counters import PassCounters
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe import show
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.versions import batches
from mixquant_sglang.versions.groups import from_previous_stage, over_ranks, to_next_stage

logger = logging.getLogger(__name__)

DECODE = "decode"
FEW = 12  # rows: below SGLang's own kernels for up to 16
MANY = {"cuda": 1100, "cpu": 40}  # rows: above its kernels for up to 1024

# What building a batch without a scheduler may raise on a kind of model or cache that needs one.
_CANNOT_BUILD = (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


class Unproven(Exception):
    """The model could not be run here; the text says why."""


class Record:
    """Which methods each pass called: name of the pass -> method -> (role, precision, rows)."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[object, tuple[Role, str, int]]] = {}
        self.gathered: list[MixQuantLinearMethod | MixQuantExpertsMethod] = []  # were given other rows than the pass's
        self._now: dict[object, tuple[Role, str, int]] = {}

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        self._now = self.calls.setdefault(name, {})
        yield
        self._now = {}

    def note(self, method: MixQuantLinearMethod | MixQuantExpertsMethod, rows: int) -> None:
        running = current()
        if method.low and running.tokens not in (None, rows):
            self.gathered.append(method)
            method.stay_bf16(report.GATHERED)
        self._now[method] = running.role, method.precision[running.role], rows

    def called(self, what: object, *passes: str) -> bool:
        return any(what in self.calls.get(name, {}) for name in passes)

    @contextmanager
    def listening(self, model: torch.nn.Module) -> Iterator[None]:
        """Puts itself before ``apply`` and ``apply_into`` of every linear of ours and ``apply`` of experts."""
        changed: list[tuple[Any, str]] = []

        def wrap(method: Any, attribute: str, noting: Callable[..., None]) -> None:
            original = getattr(method, attribute)

            def noted(*args: Any, **kwargs: Any) -> Any:
                noting(*args, **kwargs)
                return original(*args, **kwargs)

            setattr(method, attribute, noted)
            changed.append((method, attribute))

        try:
            for _, method in report.linears(model):
                if "apply" not in vars(method):  # one method may serve several modules
                    wrap(method, "apply", self._noting(method))
                    wrap(method, "apply_into", self._noting(method))
            for _, experts in report.experts(model):
                if "apply" not in vars(experts):
                    wrap(experts, "apply", self._noting_experts(experts))
            yield
        finally:
            for method, attribute in changed:
                delattr(method, attribute)

    def _noting(self, method: MixQuantLinearMethod) -> Callable[..., None]:
        def noting(_layer: object, x: Any, *_args: object, **_kwargs: object) -> None:
            self.note(method, x.shape[:-1].numel())

        return noting

    def _noting_experts(self, method: MixQuantExpertsMethod) -> Callable[..., None]:
        def noting(*args: Any, **kwargs: Any) -> None:
            dispatched = kwargs.get("dispatch_output") or args[-1]
            self.note(method, len(dispatched.hidden_states))

        return noting


def prove(
    model_runner: Any,
    eager_runner: Any,
    run: Runtime,
    assignment: Assignment,
) -> None:
    """Runs the model and makes ``run`` say what ran; MixQuantError if a rule, not an optional one, wants a linear low
    that SGLang multiplies itself."""
    record = Record()
    try:
        with _set_aside(run), _runnable(model_runner, eager_runner), record.listening(model_runner.model):
            _run(model_runner, record)
    except Unproven as error:
        if run.schedule.local:
            raise MixQuantError(f"DP attention: what sees rows of other ranks was not seen: {error}") from error
        run.unproven = str(error)
        logger.warning("mixquant: which linears run is as packed, not proved by running: %s", error)
        return
    _correct(model_runner.model, record, run, assignment)


def _correct(
    model: torch.nn.Module,
    record: Record,
    run: Runtime,
    assignment: Assignment,
) -> None:
    prefills = [name for name in record.calls if name != DECODE]
    low = [method for _, method in report.packed(model) if method.low or method in record.gathered]
    missed = bool(record.gathered)
    partly: dict[str, list[str]] = {}
    for name, method in report.packed(model):
        if not method.low:
            continue
        if not record.called(method, *prefills):
            rules = assignment.asking(method.name)
            if rules:
                raise MixQuantError(
                    f"{rules[0].where} layers: {show(rules[0].match)} wants {name} in low precision, but SGLang does "
                    f"not run it through its {method.kind.value} method: it multiplies by the weight itself, or no "
                    "prompt of text reaches it; leave it out of the rule, or mark the rule 'optional: true'"
                )
            if isinstance(method, MixQuantLinearMethod) and method.read_rows is not None:
                run.schedule.prunes = run.schedule.prunes_attention = False
            method.stay_bf16(report.MULTIPLIED)
            missed = True
            continue
        for one, calls in record.calls.items():
            role = Role.DECODE if one == DECODE else Role.PROMPT
            expected = method.precision[role] != "bf16" and not _ran_protected(calls, role)
            if expected and method not in calls:
                partly.setdefault(one, []).append(name)
    if missed:
        run.schedule.split = any(m.split for _, m in report.packed(model))
        weights = report.describe(model, run, assignment.left)
        report.log_precisions(run, weights)
        report.log_reasons(run, [why for why in (report.MULTIPLIED, report.GATHERED) if why in run.stays_bf16])
    for one, names in partly.items():
        reason = f"{report.MULTIPLIED} in {'decode steps of 2 rows' if one == DECODE else f'passes of {one}'}"
        run.stays_bf16[reason] = names
        report.log_reasons(run, [reason])
    ran = sum(bool(method.low) for method in low)
    what, passes = "linears and MoE layers" if run.experts else "linears", ", ".join(record.calls)
    logger.info("mixquant: a tiny prompt ran %d of %d low %s (passes: %s)", ran, len(low), what, passes)


def _ran_protected(calls: Mapping[object, tuple[Role, str, int]], role: Role) -> bool:
    """Whether all rows of a prefill pass were protected, as those of short ones may be."""
    return role is Role.PROMPT and all(ran is Role.PROTECTED for ran, _, _ in calls.values())


@contextmanager
def _set_aside(run: Runtime) -> Iterator[None]:
    counters, run.counters = run.counters, PassCounters()
    try:
        yield
    finally:
        run.counters = counters


@contextmanager
def _runnable(model_runner: Any, eager_runner: Any) -> Iterator[None]:
    """Lets the model runner run eagerly before ``init_cuda_graphs`` gives it its runners."""
    absent = object()
    given = {
        "eager_runner": eager_runner,
        "prefill_cuda_graph_runner": None,
        "decode_cuda_graph_runner": None,
    }
    before = {name: getattr(model_runner, name, absent) for name in given}
    for name, value in given.items():
        setattr(model_runner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is absent:
                delattr(model_runner, name)
            else:
                setattr(model_runner, name, value)


def _run(model_runner: Any, record: Record) -> None:
    pools = batches.Pools(model_runner)
    sizes = [FEW]
    room = min(
        batches.most_prefill_rows(model_runner), pools.free_tokens // 4, model_runner.model_config.context_len // 2
    )
    room = min(over_ranks(room))
    many = min(MANY.get(torch.device(model_runner.device).type, MANY["cpu"]), room)
    if room < FEW:
        raise Unproven(f"the KV cache has no room for a prompt of {FEW} tokens")
    sizes += [many] if many > FEW else []
    for rows in sizes:
        with pools.borrowed(), torch.no_grad():
            batch, forward_batch = _build(partial(_prefill, model_runner, rows))
            with record.during(f"{rows} rows"):
                _forward(model_runner, forward_batch)
            if rows == sizes[-1] and model_runner.is_generation:
                forward_batch = _build(partial(batches.decode_batch, batch, model_runner))
                with record.during(DECODE):
                    _forward(model_runner, forward_batch)


def _build(make: Callable[[], Any]) -> Any:
    """What ``make`` gives; ``Unproven`` in all ranks, which wait for each other, if one cannot."""
    made, problem = None, None
    try:
        made = make()
    except _CANNOT_BUILD as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for said in over_ranks(problem):
        if said is not None:
            raise Unproven(said)
    return made


def _prefill(model_runner: Any, rows: int) -> tuple[Any, Any]:
    """A batch of ``rows`` rows: a whole prompt, and the first half of another."""
    whole = rows // 3
    lengths = [(whole, whole), (2 * (rows - whole), rows - whole)]
    vocab = model_runner.model_config.vocab_size
    # ids that are not those of special tokens, which models number from either end
    prompts = [(array("q", ((100 + i % 100) % vocab for i in range(n))), new) for n, new in lengths]
    return batches.prefill_batch(prompts, model_runner)


def _forward(model_runner: Any, forward_batch: Any) -> None:
    ran = False
    try:
        proxies = from_previous_stage()
        more = {} if proxies is None else {"pp_proxy_tensors": proxies}
        to_next_stage(model_runner.forward(forward_batch, **more))
        ran = True
    finally:
        if not ran:
            logger.error(
                "mixquant: %s cannot run a pass of %d tokens, so it cannot serve; what follows is why",
                type(model_runner.model).__name__,
                len(forward_batch.input_ids),
            )
