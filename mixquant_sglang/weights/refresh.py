"""Whether the packed copies are those of the BF16 masters; if they are not, passes run whole from the masters.

Masters change at load, by SGLang's weight updates, and when their memory is released and resumed.  From the first write
until every layer of every rank is packed again, ``current`` is False: no packed copy is multiplied by in any column,
and no captured graph that holds one is replayed, so decode and prefill never see different weights.  A layer that
cannot be packed (NaN, no memory) leaves it so until a later update; that is warned of once.

Numbers that captured graphs hold by value (the tensor scale of emulated NVFP4) are compared with those at capture each
time: other ones stop the replay of graphs, and the same ones, as after reloading the same checkpoint, allow it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.roles import Kind, Role
from mixquant_sglang.recipe.text import some

logger = logging.getLogger(__name__)

# What packing raises for weights or a machine that it cannot work with; torch.OutOfMemoryError is a RuntimeError.
PACK_ERRORS = (MixQuantError, ValueError, RuntimeError, OSError)
_OPEN = "a weight update is open"


class Layer(Protocol):
    """What is asked of the method of a linear or of a layer's experts."""

    name: str
    kind: Kind
    precision: dict[Role, str]

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def extra_bytes(self) -> int: ...

    @property
    def stale(self) -> bool:
        """Whether it was never packed, or from other numbers than its master holds now."""

    @property
    def by_value(self) -> tuple[float, ...]:
        """What captured graphs of it hold by value."""

    @property
    def decodes_low(self) -> bool: ...

    @property
    def decodes_by_value(self) -> bool:
        """Whether captured decode graphs of it hold some of ``by_value``."""

    @property
    def masterless(self) -> bool:
        """Whether it has no master: new weights are packed as they arrive."""

    def pack_arrived(self, weight: Any, at: Any = None) -> None: ...

    def forget_arrived(self) -> None: ...

    def pack(self) -> None: ...


def alone(problem: str | None) -> str | None:
    """What the ranks of a group of one agree on."""
    return problem


def _settle() -> None:
    """With ``--enable-pdmux`` prefill and decode are on streams of their own, and packed copies are written on the
    one whose pass comes first."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Weights:
    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.current = True
        # The first problem of any rank, in the same words on all of them; a collective where there are several.
        self.agree: Callable[[str | None], str | None] = alone
        self.on_change: Callable[[], None] | None = None  # the masters are no longer what was loaded
        self._loading = True
        self._open = False
        self._due = False  # packing is to be tried before the next pass
        self._why = ""
        self._packed: set[int] = set()  # the layers that were packed since the masters changed, by id
        self._problem: str | None = None
        self._behind: list[str] = []  # layers that could not be packed, as far as was tried
        self.mixed: str | None = None  # where weights of two updates serve beside each other: why, and which are old
        self.out_of_memory = False  # whether packing ended so, once
        self._warned: set[str] = set()
        self._captured: dict[int, tuple[float, ...]] = {}
        self._moved: str | None = None  # a layer of which graphs hold an old number

    # -- at load ---------------------------------------------------------------------------------------------------

    def loaded(self, layer: Layer) -> None:
        """SGLang's ``process_weights_after_loading`` of a layer, at load and in an update."""
        if not self._loading and not self._due:
            self.changed()  # a path that we do not hook
        self._pack(layer)

    def arrived(self, layer: Layer, weight: Any, at: Any = None) -> None:
        """All of a ``weight`` that is not kept, at load and in an update: BF16 [N, K] of a linear, or what a quantised
        checkpoint has in its place; with ``at``, a part of a layer, which says when it is to be packed whether all of
        them came."""
        if not self._loading and self.current:
            self.hold("new weights arrived")  # by a path that we do not hook
            self._due = True
        if at is None:
            self._try(layer, lambda: layer.pack_arrived(weight))
        else:
            self._try(layer, lambda: layer.pack_arrived(weight, at))
            self._packed.discard(id(layer))

    def keep(self, methods: Iterable[Any]) -> None:
        """Forgets layers that are not among ``methods``: of a model that SGLang built and threw away."""
        ids = {id(method) for method in methods}
        self.layers = [layer for layer in self.layers if id(layer) in ids]

    def finish_load(self) -> None:
        """Packs what the loader did not hand over, or wrote afterwards (``--load-format remote_instance``,
        ``sharded_state``); raises MixQuantError if a layer cannot be packed."""
        late = [layer for layer in self.layers if id(layer) not in self._packed or layer.stale]
        for layer in late:
            self._problem = None
            self._pack(layer)
            if self._problem:
                raise MixQuantError(self._problem)
        if late:
            logger.info("mixquant: packed %d layers after the loader, which did not ask for it", len(late))
        self._loading, self._problem = False, None
        self.captured()

    # -- updates ---------------------------------------------------------------------------------------------------

    def hold(self, why: str) -> None:
        """The masters are being written, or their memory is gone; until ``changed`` nothing is packed."""
        self.current, self._due, self._why = False, False, why
        self._packed.clear()
        if not self._open:  # a session may bring the parts of a weight one by one
            for layer in self.layers:
                if layer.masterless:
                    layer.forget_arrived()
        self._changed()

    def changed(self) -> None:
        """The masters changed: pack again before the next pass."""
        self.current, self._due, self._why, self._problem = False, True, "the weights changed", None
        self._packed.clear()
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def written(self) -> None:
        """The masters that ``hold`` spoke of are whole, unless a session writes more of them."""
        if self._open:
            self.hold(_OPEN)
        elif not self._due:
            self.changed()

    def begin(self) -> None:
        """A session of several updates begins."""
        self.hold(_OPEN)
        self._open = True

    def end(self) -> str | None:
        """A session ends: None if all that changed is packed, or why it is not."""
        self._open = False
        if not self._due:
            self.changed()
        return self.refresh()

    def broken(self, why: str) -> None:
        """An update failed while it wrote, so the masters may be of two versions, and nothing brings them back."""
        self.hold(why)
        self.mixed = why
        self._warn()

    def refresh(self) -> str | None:
        """Packs what has changed since; None if all copies are those of their masters now, or why they are not."""
        if self._due:
            self._due, self._behind = False, []
            _settle()
            for layer in self.layers:
                # without a master it is no more than asked whether it was packed when it arrived
                if (self._problem is None or layer.masterless) and id(layer) not in self._packed:
                    self._pack(layer)
            _settle()
            self._problem = self.agree(self._problem)
            if self._problem is None:
                captured = self._captured
                moved = (
                    layer.name for layer in self.layers if layer.by_value != captured.get(id(layer), layer.by_value)
                )
                self._moved = self.agree(next(moved, None))
            self.current = self._problem is None
            if self.current:
                self._warned.clear()
                self.mixed = None
                logger.info("mixquant: packed %d layers again after a weight update", len(self.layers))
            else:
                self._why = self._problem or ""
                if any(layer.masterless for layer in self.layers):
                    old = f": {some(self._behind)}" if self._behind else " on another rank"
                    self.mixed = f"{self._why}; of before the update are the weights{old}"
        if self.current:
            return None
        self._warn()
        return self._why

    def _pack(self, layer: Layer) -> None:
        self._try(layer, layer.pack)

    def _try(self, layer: Layer, pack: Callable[[], None]) -> None:
        try:
            pack()
            self._packed.add(id(layer))
        except PACK_ERRORS as error:
            self.out_of_memory |= isinstance(error, torch.OutOfMemoryError)
            said = (str(error) or repr(error)).splitlines()[0]
            self._problem = self._problem or f"cannot pack {layer.name}: {said}"
            self._behind.append(layer.name)

    def _warn(self) -> None:
        if self.layers and self._why not in self._warned:
            self._warned.add(self._why)
            how = self.meanwhile + ("," if "," in self.meanwhile else "")
            logger.warning("mixquant: passes run %s until a weight update succeeds: %s", how, self._why)

    @property
    def meanwhile(self) -> str:
        """How passes run while ``current`` is False, for messages."""
        return "in BF16 whole" if self.fallback == "bf16" else f"in {self.fallback} whole, as packed last"

    # -- captured graphs -------------------------------------------------------------------------------------------

    def captured(self) -> None:
        """Graphs are captured from now on, or were captured again."""
        self._captured = {id(layer): layer.by_value for layer in self.layers}
        self._moved = None

    @property
    def as_captured(self) -> bool:
        """Whether the packed copies are current, and hold the numbers that captured graphs hold."""
        return self.current and self._moved is None

    def fits_graphs(self) -> bool:
        """Whether captured graphs hold the numbers of the packed copies; the first refusal is warned of."""
        if self._moved is None:
            return True
        if (name := self._moved) not in self._warned:
            self._warned.add(name)
            logger.warning(
                "mixquant: the new weights of %s have another scale than captured CUDA graphs hold; passes that use it "
                "run without graphs until the server is restarted",
                name,
            )
        return False

    @property
    def in_session(self) -> bool:
        return self._open

    @property
    def fallback(self) -> str:
        """What rows count under while ``current`` is False: what layers without a master decode in, where there are
        such."""
        return "+".join(sorted({layer.precision[Role.DECODE] for layer in self.layers if layer.masterless})) or "bf16"

    @property
    def decodes_by_value(self) -> bool:
        """Whether captured decode graphs hold numbers by value, which capturing them anew would change."""
        return any(layer.decodes_by_value for layer in self.layers)

    @property
    def decodes_low(self) -> bool:
        return any(layer.decodes_low for layer in self.layers)


def fingerprint(weight: torch.Tensor) -> tuple[int, int]:
    """Two sums over the bits of ``weight`` bfloat16 [N, K], by row and by column; other values give others, as good as
    surely."""
    bits = weight.detach().view(torch.int16)
    sums = []
    for dim in (1, 0):
        line = bits.sum(dim=dim, dtype=torch.int64)
        sums.append((line * torch.arange(1, len(line) + 1, device=line.device)).sum())
    return int(sums[0]), int(sums[1])
