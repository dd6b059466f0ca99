"""A linear whose only weight is that of a quantised checkpoint: packed as it arrives, with nothing rounded anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.kernels.registry import packed_linear
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.share import share_of
from mixquant_sglang.recipe.capabilities import stored
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.weights.quantised_linear import QuantisedLinear
from mixquant_sglang.weights.staging import Absent

if TYPE_CHECKING:
    from mixquant_sglang.layers.packed import Server


class QuantisedLinearMethod(MixQuantLinearMethod):
    """Without a master."""

    def __init__(self, runtime: Server, name: str, prefill: str, decode: str, source: QuantisedLinear) -> None:
        super().__init__(runtime, name, prefill, decode)
        self.source = source
        self.form = source.form
        assert self.masterless

    def runs(self, precision: str, kernel: str) -> bool:
        """Of blocks SGLang's own linear chooses the GEMM."""
        return not self.form and super().runs(precision, kernel)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        with refusing():
            share = share_of(layer, output_partition_sizes, input_size_per_partition, input_size)
            self._choose(layer, sum(share.sizes), share.k, params_dtype)
            if self.refusal:
                raise MixQuantError(self.source.cannot_be_taken(self.refusal))
            self.source.place(share, torch.empty(0).device, self._came)
        absent = Absent(torch.empty(self._size, dtype=params_dtype, device="meta"), False)
        for name, value in {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}.items():
            setattr(absent, name, value)
        absent.weight_loader = self._no_bf16  # type: ignore[attr-defined]
        layer.register_parameter("weight", absent)
        self._staging = self.source
        self._runtime.weights.layers.append(self)

    def _came(self, there: dict[tuple[int, str], torch.Tensor]) -> None:
        self._runtime.weights.arrived(self, there)

    def _no_bf16(self, _parameter: torch.nn.Parameter, _loaded: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(f"mixquant: {self.name} is quantised in this checkpoint, and got a weight that is not")

    def _pack(self, weight: Any, now: tuple[int, int] | None) -> None:
        found = self.source.pieces(weight)
        precision = stored(self.precision[Role.DECODE])
        packed = self._packed.get(precision)
        if packed is None:
            kernel = packed_linear(precision, self._runtime.selection.kernels.get(precision, "emulated"), self.form)
            environment = self._runtime.environment
            self._packed[precision] = kernel(self.layer.weight, ready=found, environment=environment)  # type: ignore[arg-type]
        else:
            packed.replace(found)
        self._add_readers()
