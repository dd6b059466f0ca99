"""The tensors of a quantised checkpoint, shard by shard: their shapes, which need no values, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK
from mixquant_sglang.kernels.packing import quantize_nvfp4
from mixquant_sglang.tools.quantize.calibration import Inputs
from mixquant_sglang.tools.quantize.scales import encode_scale, input_scale
from mixquant_sglang.tools.quantize.targets import WEIGHT, Targets
from mixquant_sglang.tools.quantize.writer import Bytes, bytes_of
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, Layout
from mixquant_sglang.weights.shard import DTYPES


@dataclass(frozen=True)
class Quantizer:
    """``inputs``: what calibration found. ``scales``: as on the command line. ``device``: where to compute. ``layout``:
    of the result."""

    source: Source
    targets: Targets
    inputs: Inputs
    scales: str
    device: str
    layout: Layout = COMPRESSED_TENSORS
    # weight_global_scale by group, which may lie in several shards
    _global_scales: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def shapes(self, shard: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors dtype, shape) of one shard of the result."""
        made: dict[str, tuple[str, tuple[int, ...]]] = {}
        layout, one = self.layout, (1,) if self.layout.encodes else ()
        for name, stored in self.source.tensors.items():
            if stored.shard != shard:
                continue
            if name not in self.targets.made_of:
                made[name] = stored.dtype, stored.shape
            for module in self.targets.made_of.get(name, ()):
                n, k = self._shape(module)
                made[f"{module}.{layout.codes}"] = "U8", (n, k // 2)
                made[f"{module}.{layout.scales}"] = "F8_E4M3", (n, k // BLOCK)
                made[f"{module}.{layout.tensor_scale}"] = "F32", one
                made[f"{module}.{layout.input_scale}"] = "F32", one
        return made

    def pieces(self, shard: str, tick: Callable[[int], object]) -> Iterator[tuple[str, Bytes]]:
        """The bytes of one shard of the result; ``tick`` hears how many of the source's are done."""
        for name, stored in self.source.tensors.items():
            if stored.shard != shard:
                continue
            if modules := self.targets.made_of.get(name):
                for module in modules:
                    yield from self._quantised(module)
                    tick(stored.nbytes // len(modules))
            else:
                for chunk in self.source.chunks(name):
                    if stored.dtype in DTYPES:
                        self._amax(name, torch.frombuffer(chunk, dtype=DTYPES[stored.dtype]))
                    yield name, chunk
                tick(stored.nbytes)

    def _shape(self, module: str) -> tuple[int, int]:
        if part := self.targets.parts.get(module):
            return part.n, part.k
        n, k = self.source.tensors[module + WEIGHT].shape
        return n, k

    def _read(self, module: str) -> torch.Tensor:
        """[N, K], of an expert among others too."""
        part = self.targets.parts.get(module)
        if part is None:
            return self.source.read(module + WEIGHT).to(self.device)
        rows = self.source.tensors[part.tensor].shape[1]
        if part.transposed:
            whole = self.source.read_rows(part.tensor, part.expert * rows, rows).to(self.device)
            return whole[:, part.start : part.start + part.n].t().contiguous()
        return self.source.read_rows(part.tensor, part.expert * rows + part.start, part.n).to(self.device)

    def _quantised(self, module: str) -> Iterator[tuple[str, Bytes]]:
        group, layout = self.targets.quantised[module], self.layout
        weight = self._read(module)
        if group not in self._global_scales:
            amax = max((self._largest(other, self._read(other)) for other in group if other != module), default=0.0)
            self._global_scales[group] = encode_scale(max(amax, self._largest(module, weight)))
        global_scale = self._global_scales[group]
        quantised = quantize_nvfp4(
            weight,
            scales="absmax" if self.scales == "absmax" else "search",
            tensor_scale=global_scale.reciprocal()[0],
            column_weights=self.inputs.energy.get(module),
        )
        of_inputs = input_scale(self.inputs.amax.get(module))
        yield f"{module}.{layout.codes}", bytes_of(quantised.packed)
        yield f"{module}.{layout.scales}", bytes_of(quantised.block_scales)
        for leaf, scale in ((layout.tensor_scale, global_scale), (layout.input_scale, of_inputs)):
            yield f"{module}.{leaf}", bytes_of(scale if layout.encodes else scale.reciprocal())

    def _largest(self, module: str, weight: torch.Tensor) -> float:
        part = self.targets.parts.get(module)
        return self._amax(part.tensor if part else module + WEIGHT, weight)

    def _amax(self, name: str, x: torch.Tensor) -> float:
        """Largest magnitude of ``x``; refuses NaN and infinity under ``name``."""
        if not x.numel():
            return 0.0
        low, high = (float(bound) for bound in torch.aminmax(x))  # they propagate NaN
        if not max(abs(low), abs(high)) < float("inf"):
            file = self.source.folder / self.source.tensors[name].shard
            raise MixQuantError(f"{file}: {name} contains NaN or infinity; check the checkpoint, or download it again")
        return max(abs(low), abs(high))
