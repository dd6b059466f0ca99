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
from mixquant_sglang.weights.shard import DTYPES


@dataclass(frozen=True)
class Quantizer:
    """``inputs``: what calibration found. ``scales``: as on the command line. ``device``: where to compute."""

    source: Source
    targets: Targets
    inputs: Inputs
    scales: str
    device: str
    # weight_global_scale by group, which may lie in several shards
    _global_scales: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def shapes(self, shard: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors dtype, shape) of one shard of the result."""
        made: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, stored in self.source.tensors.items():
            if stored.shard != shard:
                continue
            if (module := self._target(name)) is None:
                made[name] = stored.dtype, stored.shape
                continue
            n, k = stored.shape
            made[f"{module}.weight_packed"] = "U8", (n, k // 2)
            made[f"{module}.weight_scale"] = "F8_E4M3", (n, k // BLOCK)
            made[f"{module}.weight_global_scale"] = "F32", (1,)
            made[f"{module}.input_global_scale"] = "F32", (1,)
        return made

    def pieces(self, shard: str, tick: Callable[[int], object]) -> Iterator[tuple[str, Bytes]]:
        """The bytes of one shard of the result; ``tick`` hears how many of the source's are done."""
        for name, stored in self.source.tensors.items():
            if stored.shard != shard:
                continue
            if module := self._target(name):
                yield from self._quantised(module)
            else:
                for chunk in self.source.chunks(name):
                    if stored.dtype in DTYPES:
                        self._amax(name, torch.frombuffer(chunk, dtype=DTYPES[stored.dtype]))
                    yield name, chunk
            tick(stored.nbytes)

    def _target(self, name: str) -> str | None:
        module = name.removesuffix(WEIGHT)
        return module if name.endswith(WEIGHT) and module in self.targets.quantised else None

    def _quantised(self, module: str) -> Iterator[tuple[str, Bytes]]:
        group = self.targets.quantised[module]
        weight = self.source.read(module + WEIGHT).to(self.device)
        if group not in self._global_scales:
            others = (member + WEIGHT for member in group if member != module)
            amax = max((self._amax(other, self.source.read(other).to(self.device)) for other in others), default=0.0)
            self._global_scales[group] = encode_scale(max(amax, self._amax(module + WEIGHT, weight)))
        global_scale = self._global_scales[group]
        quantised = quantize_nvfp4(
            weight,
            scales="absmax" if self.scales == "absmax" else "search",
            tensor_scale=global_scale.reciprocal()[0],
            column_weights=self.inputs.energy.get(module),
        )
        yield f"{module}.weight_packed", bytes_of(quantised.packed)
        yield f"{module}.weight_scale", bytes_of(quantised.block_scales)
        yield f"{module}.weight_global_scale", bytes_of(global_scale)
        yield f"{module}.input_global_scale", bytes_of(input_scale(self.inputs.amax.get(module)))

    def _amax(self, name: str, x: torch.Tensor) -> float:
        """Largest magnitude of ``x``; refuses NaN and infinity under ``name``."""
        if not x.numel():
            return 0.0
        low, high = (float(bound) for bound in torch.aminmax(x))  # they propagate NaN
        if not max(abs(low), abs(high)) < float("inf"):
            file = self.source.folder / self.source.tensors[name].shard
            raise MixQuantError(f"{file}: {name} contains NaN or infinity; check the checkpoint, or download it again")
        return max(abs(low), abs(high))
