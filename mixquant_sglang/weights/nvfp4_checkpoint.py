"""An NVFP4 checkpoint by its headers, in either layout, read slice by slice."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.recipe.fingerprint import digest
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.distance import Distance, distance
from mixquant_sglang.weights.layouts import Layout

logger = logging.getLogger(__name__)


@dataclass
class NVFP4Checkpoint:
    source: Source
    layout: Layout
    quantised: dict[str, set[str]]  # module -> the last parts of its tensors' names
    taken: set[str] = field(default_factory=set)  # modules that a layer of SGLang takes
    rounding: str = "nearest"  # which codes are taken: one of ``recipe.ROUNDINGS``
    seen: Distance | None = None  # from the BF16 weights, of all that this process compared
    worst: tuple[float, str] | None = None  # the farthest module of those
    _warned: bool = field(default=False, init=False)

    @property
    def folder(self) -> Path:
        return self.source.folder

    def file(self, name: str) -> Path:
        """Where the tensor ``name`` lies."""
        return self.folder / self.source.tensors[name].shard

    def identity(self) -> str:
        """Of the weights, wherever they lie: dtypes and shapes, each module's tensor scale and first row of scales and
        of codes, which scales do not decide where they are not the nearest."""
        tensors = sorted((name, stored.dtype, list(stored.shape)) for name, stored in self.source.tensors.items())
        samples = []
        for module in sorted(self.quantised):
            scales = self._slice(f"{module}.{self.layout.scales}", slice(0, 1), slice(None), BLOCK)
            outer = self.source.read(f"{module}.{self.layout.tensor_scale}")
            codes = self._slice(f"{module}.{self.layout.codes}", slice(0, 1), slice(None), 2)
            row = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
            samples.append([scales.view(torch.uint8).flatten().tolist(), outer.flatten().tolist(), row])
        return digest([self.layout.name, tensors, samples])

    def check_shapes(self, module: str, n: int, k: int) -> None:
        layout = self.layout
        for leaf, dtype, shape in (
            (layout.codes, "U8", (n, k // 2)),
            (layout.scales, "F8_E4M3", (n, k // BLOCK)),
            (layout.tensor_scale, "F32", None),
        ):
            stored = self.source.tensors[f"{module}.{leaf}"]
            one = shape is None and math.prod(stored.shape) == 1
            if stored.dtype != dtype or not (one or stored.shape == shape):
                raise MixQuantError(
                    f"{self.file(f'{module}.{leaf}')}: {module}.{leaf} is {stored.dtype} {list(stored.shape)}; "
                    f"the BF16 checkpoint needs {dtype} {list(shape) if shape else 'with one number'}"
                )

    def read(self, module: str, rows: slice, columns: slice, device: torch.device) -> NVFP4Tensor:
        """``rows`` and ``columns`` (a multiple of 16, or all) of a module, which ``check_shapes`` has seen."""
        layout = self.layout
        codes = self._slice(f"{module}.{layout.codes}", rows, columns, 2).to(device)
        scales = self._slice(f"{module}.{layout.scales}", rows, columns, BLOCK).to(device)
        if bool((scales.view(torch.uint8) > 0x7E).any()):  # 0x7F is NaN, the rest have a sign
            name = f"{module}.{layout.scales}"
            raise MixQuantError(f"{self.file(name)}: {name} holds negative or NaN block scales")
        name = f"{module}.{layout.tensor_scale}"
        stored = self.source.read(name).reshape(())
        outer = stored.reciprocal() if layout.encodes else stored
        if not 2.0**-126 <= float(outer) <= 2.0**126:
            raise MixQuantError(f"{self.file(name)}: {name} is {float(stored):g}, which is no scale")
        return NVFP4Tensor(codes, scales, outer.to(device))

    def check_near(self, module: str, piece: NVFP4Tensor, master: torch.Tensor) -> None:
        """Refuses codes that are not those of ``master`` bfloat16 [n, K], of the same rows and columns: the nearest, or
        as far away as ``rounding`` allows."""
        found = distance(piece, master)
        self.seen = found if self.seen is None else self.seen + found
        if self.worst is None or found.errors[0] > self.worst[0]:
            self.worst = found.errors[0], module
        if far := found.problem(self.rounding):
            name = f"{module}.{self.layout.codes}"
            hint = "Another fine-tune and another scale are refused. "
            hint += "GPTQ's codes, which make up for each other's errors, are taken with 'rounding: any' beside "
            hint += "prefill.weights, if they are this checkpoint's"
            if self.rounding == "any":
                hint = "That is no rounding of it, not GPTQ's either"
            raise MixQuantError(
                f"{self.file(name)}: {name} is not this weight of the BF16 checkpoint, rounded: {far}. {hint}"
            )

    def say_rounding(self) -> None:
        """Where any rounding is taken: how far the codes are, for nobody but the user knows whose they are."""
        if self.rounding != "nearest" and self.seen is not None and self.worst is not None:
            far, nearest = self.seen.errors
            logger.info(
                "mixquant: ready-made weights of %s, any rounding: of the codes that this process holds %.1f%% are not "
                "the nearest to the BF16 weights, from which they are %.3f of the norm away (the nearest: %.3f; the "
                "farthest is %s, %.3f)",
                self.folder,
                100 * self.seen.others,
                far,
                nearest,
                self.worst[1],
                self.worst[0],
            )

    def warn_updated(self) -> None:
        """Once: the BF16 weights were updated."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "mixquant: the BF16 weights were updated, so layers that changed no longer prefill with the "
                "ready-made weights of %s, but are quantised from the new BF16 weights",
                self.folder,
            )

    def _slice(self, name: str, rows: slice, columns: slice, per: int) -> torch.Tensor:
        """[rows, columns]; reads the rows whole."""
        first, stop, _ = rows.indices(self.source.tensors[name].shape[0])
        try:
            values = self.source.read_rows(name, first, stop - first)
        except OSError as error:
            raise MixQuantError(f"{self.file(name)}: {name} cannot be read: {error}") from None
        if columns.start is not None:
            values = values[:, columns.start // per : columns.stop // per]
        return values.contiguous()
