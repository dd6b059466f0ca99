"""A quantised checkpoint as the only copy of a model's weights: what a tensor of it is, and where it goes.

SGLang's loaders never see the quantised modules of linears that run packed.  ``sorted_out`` stands in the stream of
tensors, at load and in updates: codes and scales of such a module go to its linear (``quantised_linear.py``) as they
are; a quantised module whose layer has to be BF16 (by a rule, or as MLA's kv_b_proj and a quantised lm_head) is
multiplied out, rounded to BF16 once; all others, biases among them, pass.  Static scales of activations are dropped,
since activations are scaled by token, and so are scales of a quantised KV cache (``host/quantised.py`` says so, or
refuses them).

Found by the headers of the files: a module is quantised if its codes are.  Refused (MixQuantError, with the tensor and
its file): tensors that are missing (``lacking.py``), extra or misshapen, quantised experts, and parts of one linear of
which some are quantised and some not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.linear.base import Piece
from mixquant_sglang.recipe.modules import NEVER, block_of, is_draft, is_never_low
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.lacking import Contents
from mixquant_sglang.weights.names import Names
from mixquant_sglang.weights.pieces import Kind, Parts, piece
from mixquant_sglang.weights.quantised_config import SCALES_OF_INPUTS, Family, family, said
from mixquant_sglang.weights.shard import DTYPES, Stored

_KV = frozenset({"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "output_scale", "prob_output_scale"})
_ACTIVATIONS = frozenset(SCALES_OF_INPUTS)
_FLOATS = frozenset(DTYPES)


class Taker(Protocol):
    """What takes the tensors of a module."""

    def take(self, module: str, leaf: str, tensor: torch.Tensor) -> None: ...

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> str | None: ...


@dataclass
class QuantisedCheckpoint:
    """``modules``: the quantised ones, each with the kind of its weight. ``kept``: those whose layers are BF16, and
    why."""

    source: Source
    family: Family
    modules: dict[str, Kind] = field(default_factory=dict)
    takers: dict[str, Taker] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    scales_of_kv: list[str] = field(default_factory=list)
    _parts: dict[str, Parts] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> QuantisedCheckpoint:
        source = Source.open(folder)
        found = said(source.config, folder, str(folder / "config.json"))
        if found is None:
            raise MixQuantError(f"{folder}: is not quantised")
        opened = cls(source, family(f"{folder}: {found[0]}", found[1]))
        opened._find()
        return opened

    @property
    def folder(self) -> Path:
        return self.source.folder

    @cached_property
    def names(self) -> Names:
        """From SGLang's to the checkpoint's."""
        return Names(self.source.tensors)

    @cached_property
    def contents(self) -> Contents:
        """By which it is known what is missing."""
        return Contents.of(self.source.tensors, self.modules, self.source.config)

    def check_start(self, *, dummy: bool, cache_dtype: str) -> None:
        """MixQuantError for what SGLang would use of it, and does not get; ``dummy``: whether it fills weights with
        random numbers, ``cache_dtype``: its ``--kv-cache-dtype``."""
        if dummy:
            raise MixQuantError(
                f"--load-format dummy reads nothing of {self.folder}, which is quantised: give it a BF16 config"
            )
        scales = self.scales_of_kv
        if cache_dtype.startswith(("fp8", "fp4", "nvfp4", "mxfp4")) and (scales or self.family.kv_cache):
            raise MixQuantError(
                f"--kv-cache-dtype {cache_dtype}: {self.folder} has scales for a quantised KV cache "
                f"({scales[0] if scales else self.family.kv_cache}), which mixquant does not hand to SGLang; leave "
                "the flag out: the cache is BF16 then"
            )

    def modules_of(self, name: str, shards: Sequence[str]) -> tuple[str, ...]:
        """Those that hold the parts of SGLang's linear ``name`` in order, or a single one all of them."""
        name, shards = self.names.of(name), tuple(map(self.names.of, shards))
        whole = not shards or name in self.modules or f"{name}.weight" in self.source.tensors
        return (name,) if whole else shards

    def of_linear(self, name: str, shards: Sequence[str]) -> tuple[str, ...]:
        """The modules of a linear that takes them as they are; none if the checkpoint has it in BF16. MixQuantError if
        some are quantised and some not, or a weight is missing."""
        modules = self.modules_of(name, shards)
        self._check_there(modules)
        there = [module for module in modules if module in self.modules]
        for module in modules if there else ():
            if module not in self.modules:
                raise MixQuantError(
                    f"{self.folder}: {there[0]} is quantised, but {module} is not, and {name} is one GEMM; keep "
                    f"{name} in BF16 with a recipe rule '{{match: {name}, prefill: bf16, decode: bf16}}'"
                )
        return modules if there else ()

    def keep(self, name: str, shards: Sequence[str], reason: str) -> None:
        """``name`` is BF16, so what is quantised of it is multiplied out. MixQuantError if a weight is missing."""
        modules = self.modules_of(name, shards)
        self._check_there(modules)
        self.kept.update({m: reason for m in modules if m in self.modules})

    def _check_there(self, modules: Sequence[str]) -> None:
        if gone := self.contents.lacks([f"{module}.weight" for module in modules]):
            raise MixQuantError(
                f"{self.folder}: {gone} is missing, in {self.family.precision.upper()} and in BF16: the download is "
                "not complete, or the checkpoint is broken"
            )

    def check_experts(self, name: str) -> None:
        """MixQuantError if the experts of SGLang's MoE layer ``name`` are quantised, or some are missing."""
        layer = self.names.of(name)
        found = next((m for m in self.modules if m == layer or m.startswith(f"{layer}.")), None)
        if found is None and layer.endswith(".moe.experts"):  # Gemma-4's lie in the block
            inner = layer.removesuffix(".moe.experts") + ".experts."
            found = next((m for m in self.modules if m.startswith(inner)), None)
        if found is not None:
            raise MixQuantError(
                f"{self.folder}: {found} is quantised; experts of quantised checkpoints are not taken: serve the BF16 "
                "original, or this checkpoint without the plugin"
            )
        if gone := self.contents.lacks_below(layer):
            raise MixQuantError(f"{self.folder}: {gone} is missing, which other blocks have")

    def check_parameters(self, parameters: Mapping[str, Sequence[str]]) -> None:
        """MixQuantError if the tensors of a parameter of the model are missing, as far as that is known by names;
        ``parameters``: SGLang's name -> those of its parts, if it is fused."""
        for name, parts in parameters.items():
            whole = self.names.of(name)
            names = [whole] if not parts or whole in self.contents.names else [*map(self.names.of, parts)]
            gone = self.contents.lacks(names) or (self.contents.lacks_outside_blocks(whole) if not parts else None)
            if gone:
                raise MixQuantError(f"{self.folder}: {gone} is missing: the checkpoint is broken, or not complete")

    def settle(self) -> None:
        """When all layers of this rank have asked: what no recipe makes low, as lm_head, is multiplied out."""
        for module in self.modules.keys() - self.takers.keys() - self.kept.keys():
            if is_never_low(module) and not is_draft(module):
                self.kept[module] = NEVER

    def check_all_asked(self, asked: Collection[str], blocks: float) -> None:
        """Refuses quantised modules that are not among those ``asked`` for by the layers of any stage; ``blocks``: of
        the model, behind which a checkpoint may have a draft."""
        for module in self.modules.keys() - set(asked):
            block = block_of(module)
            if not is_draft(module) and not (block is not None and block >= blocks):
                raise MixQuantError(f"{self.folder}: {module} is quantised, and belongs to no layer of this model")

    # -- the stream ------------------------------------------------------------------------------------------------

    def sorted_out(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """What SGLang's loaders are to see of ``weights``."""
        self.settle()
        for name, tensor in weights:
            module, _, leaf = name.rpartition(".")
            if self.unused(name):
                continue
            kind = self.modules.get(module)
            if kind is None or leaf == "bias" or not (module in self.takers or module in self.kept):
                yield name, tensor
            elif leaf in kind.leaves:
                if module in self.takers:
                    self.takers[module].take(module, leaf, tensor)
                elif (whole := self._gathered(module, kind, leaf, tensor)) is not None:
                    yield f"{module}.weight", whole.dequantize(torch.bfloat16)

    def unused(self, name: str) -> bool:
        """Whether nothing here takes the tensor ``name``: a scale of activations, or of a quantised KV cache."""
        module, _, leaf = name.rpartition(".")
        return leaf in _KV or (leaf in _ACTIVATIONS and module in self.modules)

    @property
    def begun(self) -> str | None:
        """A module that is multiplied out, of which some has arrived, and not all."""
        return next(iter(self._parts), None)

    def forget(self) -> None:
        """Drops what has arrived of modules that are multiplied out, and are not whole."""
        self._parts.clear()

    def _gathered(self, module: str, kind: Kind, leaf: str, tensor: torch.Tensor) -> Piece | None:
        parts = self._parts.setdefault(module, {})
        parts[leaf] = tensor.clone()
        if parts.keys() < kind.leaves:
            return None
        return piece(module, kind, self._parts.pop(module))

    # -- what an update may bring ----------------------------------------------------------------------------------

    def problem(self, name: str, tensor: torch.Tensor) -> str | None:
        """Why an update is refused that has this tensor, of the shape and dtype of the checkpoint's; None if it is
        not, or not for what is known here."""
        module, _, leaf = name.rpartition(".")
        kind = self.modules.get(module)
        if kind is None or leaf == "bias":
            return None
        if leaf not in kind.leaves:
            return f"{name} is no tensor of this checkpoint, in which {module} is quantised"
        if tensor.dtype is not (wanted := kind.dtypes.get(leaf, tensor.dtype)):
            return f"{name} is {tensor.dtype}, not {wanted}: {module} is quantised in this checkpoint"
        return kind.problem(name, leaf, tensor)

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Why an update by ``tensors``, by name, is refused: scales that a linear holds as one are not equal in it."""
        takers = {id(taker): taker for taker in self.takers.values()}
        return next((said for taker in takers.values() if (said := taker.differing(tensors))), None)

    def leaves_of(self, modules: Iterable[str]) -> set[str]:
        """The tensors that make their weights."""
        return {f"{module}.{leaf}" for module in modules for leaf in self.modules[module].leaves}

    # -- headers ---------------------------------------------------------------------------------------------------

    def _find(self) -> None:
        leaves: dict[str, dict[str, Stored]] = {}
        for name, stored in self.source.tensors.items():
            module, _, leaf = name.rpartition(".")
            leaves.setdefault(module, {})[leaf] = stored
            if leaf in _KV:
                self.scales_of_kv.append(name)
        codes = self.family.layout.codes if self.family.layout else "weight"
        for module, found in leaves.items():
            if codes in found and found[codes].dtype == ("U8" if self.family.layout else "F8_E4M3"):
                self.modules[module] = self._kind(module, found)
            elif "weight" in found and found["weight"].dtype not in _FLOATS:
                raise MixQuantError(
                    f"{self.folder / found['weight'].shard}: {module}.weight is {found['weight'].dtype}; quantised are "
                    f"{self.family.precision.upper()} weights alone in such a checkpoint ({self.family.words})"
                )
        if not self.modules:
            raise MixQuantError(f"{self.folder}: holds no {self.family.precision.upper()} weight ({self.family.words})")

    def _kind(self, module: str, found: dict[str, Stored]) -> Kind:
        known = Kind.of(self.family, {leaf: stored.shape for leaf, stored in found.items()})
        if isinstance(known, str):
            raise MixQuantError(f"{self.folder}: {module}: {known}")
        if extra := sorted(found.keys() - known.leaves - _KV - _ACTIVATIONS - {"bias"}):
            raise MixQuantError(
                f"{self.folder / found[extra[0]].shard}: {module}.{extra[0]} is no tensor of {self.family.words}"
            )
        for leaf in known.leaves - {known.codes}:
            wanted = ("F8_E4M3",) if leaf == known.block_scales else tuple(_FLOATS)
            if found[leaf].dtype not in wanted:
                raise MixQuantError(
                    f"{self.folder / found[leaf].shard}: {module}.{leaf} is {found[leaf].dtype}; known: "
                    f"{', '.join(sorted(wanted))}"
                )
        return known
