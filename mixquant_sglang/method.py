"""The linear method: one BF16 master per layer, packed copies beside it, and the column of the running pass picks.

It subclasses ``UnquantizedLinearMethod`` so that SGLang treats the layer as the BF16 layer that it is: same parameter,
same loaders, same fused BF16 kernels in decode.  ``layer.weight`` is never repacked.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mixquant_sglang import phase
from mixquant_sglang.kernels import activations, packed_linear
from mixquant_sglang.kernels.activations import QuantizedActivations
from mixquant_sglang.phase import Phase
from mixquant_sglang.runtime import GRAPH_ROWS

if TYPE_CHECKING:
    from mixquant_sglang.kernels.base import PackedLinear
    from mixquant_sglang.rows import Rows
    from mixquant_sglang.runtime import Runtime

logger = logging.getLogger(__name__)


class MixQuantLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    def __init__(self, runtime: Runtime, name: str, prefill: str, decode: str) -> None:
        super().__init__()
        self.name = name
        self.precision = {Phase.PREFILL: prefill, Phase.DECODE: decode}
        self.split = prefill != decode  # whether rows can need protection
        self.refusal: str | None = None
        self._runtime = runtime
        self._layer: torch.nn.Module | None = None
        self._packed: dict[str, PackedLinear] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight on this rank."""
        assert self._layer is not None
        n, k = self._layer.weight.size()  # type: ignore[operator]
        return n, k

    def runs(self, precision: str, kernel: str) -> bool:
        """Whether some phase runs this linear in ``precision`` with ``kernel``."""
        return precision in self._packed and self._runtime.selection.kernels[precision] == kernel

    @property
    def extra_bytes(self) -> int:
        return sum(packed.nbytes for packed in self._packed.values())

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
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self._layer = layer
        n, k = sum(output_partition_sizes), input_size_per_partition
        for precision in {*self.precision.values()} - {"bf16"}:
            refusal = packed_linear(precision, self._runtime.selection.kernels[precision]).refusal(n, k)
            if refusal:
                self.refusal = refusal
                self.precision = dict.fromkeys(Phase, "bf16")
                self.split = False
        self._runtime.layers.append(self)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.pack()

    def pack(self) -> None:
        """Packs the master weight; after the first time in place, since captured graphs hold the addresses."""
        assert self._layer is not None
        weight: torch.Tensor = self._layer.weight.data  # type: ignore[assignment]
        for precision in sorted({*self.precision.values()} - {"bf16"}):
            packed = self._packed.get(precision)
            try:
                if packed is None:
                    kernel = packed_linear(precision, self._runtime.selection.kernels[precision])
                    self._packed[precision] = kernel(weight, scales=self._runtime.recipe.scales)
                elif not packed.refresh(weight):
                    self._runtime.graphs_are_stale(self.name)
            except ValueError as error:
                raise ValueError(f"mixquant: cannot pack {self.name}: {error}") from error

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor | QuantizedActivations, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        running = phase.current()
        precision = self.precision[running.column]
        rows = running.rows if self.split else None
        if isinstance(x, QuantizedActivations):
            out = self._packed[precision].multiply(x.operand, bias)
            return out if rows is None else self._protect(layer, out, x.kept, rows, bias)
        if rows is None and precision == "bf16":
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        flat = x.reshape(-1, x.shape[-1])
        if rows is not None:
            self._check_rows(flat.shape[0], rows)
        packed = self._packed.get(precision)
        if packed is not None and packed.activation_format is not None:
            quantized = activations.quantize(flat.contiguous(), packed.activation_format, rows)
            out, kept = packed.multiply(quantized.operand, bias), quantized.kept
        else:
            out, kept = self._linear(running.column, layer, flat, bias), rows.gather(flat) if rows is not None else None
        if rows is not None:
            self._protect(layer, out, kept, rows, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    @property
    def activation_format(self) -> str | None:
        """That of prefill, if its kernel takes quantised activations."""
        packed = self._packed.get(self.precision[Phase.PREFILL])
        return packed.activation_format if packed else None

    def fusable(self, tokens: int) -> tuple[str, Rows | None] | None:
        """For the running pass, the format that a producer of ``tokens`` rows may quantise this linear's input to and
        the rows that it has to keep; None if the linear takes BF16.  Decode is never fused: it stays SGLang's own."""
        running = phase.current()
        fmt = self.activation_format
        if running.column is Phase.DECODE or fmt is None:
            return None
        rows = running.rows if self.split else None
        if rows is not None:
            self._check_rows(tokens, rows)
        return fmt, rows

    def _check_rows(self, tokens: int, rows: Rows) -> None:
        if tokens != rows.tokens:
            raise RuntimeError(
                f"mixquant: {self.name} got {tokens} rows in a pass of {rows.tokens}, so it cannot tell "
                f"which are protected; keep it in BF16 with a recipe rule '{{match: {self.name}, prefill: bf16}}'"
            )

    def _protect(
        self,
        layer: torch.nn.Module,
        out: torch.Tensor,
        kept: torch.Tensor | None,
        rows: Rows,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gives the protected rows of ``out`` [T, N] the decode column's result for ``kept`` [R, K]."""
        assert kept is not None
        if out.is_cuda and self.precision[Phase.DECODE] == "bf16" and len(kept) <= GRAPH_ROWS:
            from mixquant_sglang.kernels.triton.few_rows import linear_rows_

            linear_rows_(out, rows.index, kept, layer.weight, bias)  # type: ignore[arg-type]
        else:
            rows.scatter(out, self._linear(Phase.DECODE, layer, kept, bias))
        return out

    def apply_into(
        self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        running = phase.current()
        if self.precision[running.column] == "bf16" and (running.rows is None or not self.split):
            return super().apply_into(layer, x, output, bias)  # type: ignore[no-any-return]
        return output.copy_(self.apply(layer, x, bias))

    def _linear(
        self, column: Phase, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        precision = self.precision[column]
        if precision == "bf16":
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        return self._packed[precision].matmul(x.contiguous(), bias)
