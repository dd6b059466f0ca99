"""The linear method: one BF16 master per layer, packed copies beside it, and the role of a row picks.

It subclasses ``UnquantizedLinearMethod`` so that SGLang treats the layer as the BF16 layer that it is: same parameter,
same loaders, same fused BF16 kernels in decode.  ``layer.weight`` is never repacked.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.kernels.registry import packed_linear
from mixquant_sglang.kernels.verify import Pair
from mixquant_sglang.layers.outputs import ReadRows, SplitOutput
from mixquant_sglang.passes.limits import GRAPH_ROWS
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.roles import Role, by_role
from mixquant_sglang.versions import compat
from mixquant_sglang.weights.ready_made_linear import ReadyMadeLinear, Share
from mixquant_sglang.weights.refresh import fingerprint

if TYPE_CHECKING:
    from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
    from mixquant_sglang.kernels.linear.base import PackedLinear
    from mixquant_sglang.kernels.rows import Rows
    from mixquant_sglang.recipe.schema import Recipe
    from mixquant_sglang.recipe.select import Selection
    from mixquant_sglang.weights.refresh import Weights

logger = logging.getLogger(__name__)


class Server(Protocol):
    """What linears share."""

    recipe: Recipe
    selection: Selection
    weights: Weights


class MixQuantLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    def __init__(
        self, runtime: Server, name: str, prefill: str, decode: str, ready: ReadyMadeLinear | None = None
    ) -> None:
        """``ready``: where the NVFP4 copy comes from instead of the master."""
        super().__init__()
        self.name = name
        self.precision = by_role(prefill, decode)
        self.split = self.precision[Role.PROMPT] != self.precision[Role.PROTECTED]  # whether rows can need protection
        self.refusal: str | None = None
        self.apart = 0  # columns of the result that prefill writes to a matrix of their own (fusion.py)
        self._parts: tuple[PackedLinear, ...] = ()
        # In the last layer (fusion.py): whether the rows ``Pass.read`` alone are computed, of the whole result or of
        # the part that is kept apart, and whether they are handed over as ``ReadRows``.
        self.prunes = self.prunes_apart = self.hands_over = False
        self._runtime = runtime
        self._layer: torch.nn.Module | None = None
        self._ready = ready
        self._packed: dict[str, PackedLinear] = {}
        self._print: tuple[int, int] | None = None  # of the master that the copies were packed from
        self._ready_print: tuple[int, int] | None = None  # of the master that the ready-made weights belong to

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight on this rank."""
        assert self._layer is not None
        n, k = self._layer.weight.size()  # type: ignore[operator]
        return n, k

    @property
    def master(self) -> torch.Tensor:
        """The BF16 weight [N, K]."""
        assert self._layer is not None
        weight: torch.Tensor = self._layer.weight.data  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = getattr(self._layer, "bias", None)
        return bias

    def runs(self, precision: str, kernel: str) -> bool:
        """Whether some phase runs this linear in ``precision`` with ``kernel``."""
        return precision in self._packed and self._runtime.selection.kernels[precision] == kernel

    def copy_in(self, precision: str) -> PackedLinear:
        """The packed copy of the weight, where some phase runs this linear in ``precision``."""
        return self._packed[precision]

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
        for precision in self.low:
            refusal = packed_linear(precision, self._runtime.selection.kernels[precision]).refusal(n, k)
            if refusal:
                self.refusal = refusal
                self.precision = by_role("bf16", "bf16")
                self.split = False
        if self._ready is not None and self.refusal is None:
            sizes, replicas = tuple(output_partition_sizes), getattr(layer, "num_kv_head_replicas", 1)
            with refusing():
                self._ready.place(Share(sizes, k, input_size, *compat.tensor_parallel(layer), replicas))
        self._runtime.weights.layers.append(self)

    def stay_bf16(self, reason: str) -> None:
        """Makes the layer an ordinary BF16 one for good: its packed copies go, ``refusal`` says why."""
        self.refusal = reason
        self.precision = by_role("bf16", "bf16")
        self.split = self.prunes = self.prunes_apart = self.hands_over = False
        self.apart, self._parts, self._packed, self._ready = 0, (), {}, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if layer is not self._layer:
            with refusing():
                raise MixQuantError(
                    f"SGLang moved the weight of {self.name} into another module, {type(layer).__name__}, with that of "
                    f"a linear beside it; keep both in BF16 with recipe rules like '{{match: {self.name}, prefill: "
                    "bf16, decode: bf16}'"
                )
        self._runtime.weights.loaded(self)

    @property
    def stale(self) -> bool:
        """Whether the copies were never packed, or from other numbers than the master holds now."""
        return bool(self.low) and (self._print is None or self._print != fingerprint(self._master))

    @property
    def by_value(self) -> tuple[float, ...]:
        return tuple(value for packed in self._packed.values() for value in packed.by_value)

    @property
    def decodes_low(self) -> bool:
        return self.precision[Role.DECODE] != "bf16"

    @property
    def low(self) -> set[str]:
        """The low precisions that some role takes."""
        return {*self.precision.values()} - {"bf16"}

    @property
    def _master(self) -> torch.Tensor:
        assert self._layer is not None
        return self._layer.weight.data  # type: ignore[return-value]

    def pack(self) -> None:
        """Packs the master weight; after the first time in place, since captured graphs hold the addresses.

        Raises ValueError for NaN or infinity."""
        if not self.low:
            return
        self._print = None
        weight, now = self._master, fingerprint(self._master)
        for precision in sorted(self.low):
            packed = self._packed.get(precision)
            if packed is None:
                kernel = packed_linear(precision, self._runtime.selection.kernels[precision])
                ready = self._load_ready(precision, check=True)
                self._packed[precision] = kernel(weight, scales=self._runtime.recipe.scales, ready=ready)
                self._ready_print = now
            elif self._ready is not None and precision == "nvfp4" and now == self._ready_print:
                packed.replace(self._ready.load(weight, check=False))  # the memory was released in between
            else:
                packed.refresh(weight)
                if self._ready is not None and precision == "nvfp4":
                    self._ready.warn_updated()
        self._print = now

    def verification(self) -> Pair:
        """The packed NVFP4 copy, and the emulated kernel with the same numbers."""
        assert self._layer is not None
        weight: torch.Tensor = self._layer.weight.data  # type: ignore[assignment]
        ready = self._load_ready("nvfp4", check=False)
        emulated = packed_linear("nvfp4", "emulated")(weight, scales=self._runtime.recipe.scales, ready=ready)
        return Pair(self.name, *self.shape, self._packed["nvfp4"], emulated)

    def _load_ready(self, precision: str, *, check: bool) -> list[NVFP4Tensor] | None:
        if self._ready is None or precision != "nvfp4":
            return None
        assert self._layer is not None
        with refusing():
            return self._ready.load(self._layer.weight.data, check=check)  # type: ignore[arg-type]

    def takes_stock_now(self) -> bool:
        """Whether the running pass takes what SGLang would run without us: BF16 for all rows."""
        running = current()
        if running.from_masters:
            return True
        return self.precision[running.role] == "bf16" and (running.rows is None or not self.split)

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | QuantizedActivations | ReadRows,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | SplitOutput | ReadRows:
        if self.takes_stock_now():
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        running = current()
        precision = self.precision[running.role]
        rows = running.rows if self.split else None
        if self.prunes and running.read is not None:
            assert not isinstance(x, QuantizedActivations), "of few rows, norms and activations hand over BF16"
            return self._read_rows(layer, x, running.read, rows, bias)
        if isinstance(x, torch.Tensor):
            shape = x.shape[:-1]
            x = x.reshape(-1, x.shape[-1])
            if rows is not None:
                self._check_rows(x.shape[0], rows)
            packed = self._packed.get(precision)
            if packed is None or packed.activation_format is None:
                out = self._linear(running.role, layer, x, bias)
                if rows is not None:
                    self._high(layer, rows.gather(x), rows, bias, out)
                return out.view(*shape, out.shape[-1])
            x = operands.quantize(x.contiguous(), packed.activation_format, rows)
        else:
            shape = x.shape[:1]
        assert isinstance(x, QuantizedActivations)
        if self.apart and running.role is Role.PROMPT:
            return self._apart(layer, x, rows, running.read, bias)
        out = self._packed[precision].multiply(x.operand, bias)
        if rows is not None:
            assert x.kept is not None
            self._high(layer, x.kept, rows, bias, out)
        return out.view(*shape, out.shape[-1])

    def _apart(
        self,
        layer: torch.nn.Module,
        x: QuantizedActivations,
        rows: Rows | None,
        read: Rows | None,
        bias: torch.Tensor | None,
    ) -> SplitOutput:
        cut, n = self.apart, self.shape[0]
        first_bias, rest_bias = (None, None) if bias is None else (bias[:cut], bias[cut:])
        if self.prunes_apart and read is not None:
            first = self._first_of(x, read, rows, first_bias)
        else:
            first = self._parts[0].multiply(x.operand, first_bias)
        rest = self._parts[1].multiply(x.operand, rest_bias)
        if rows is not None:
            assert x.kept is not None
            if self._few(x.kept):
                from mixquant_sglang.kernels.triton.few_rows import linear_rows_

                linear_rows_(first, rows.index, x.kept, layer.weight, bias, rest=rest)  # type: ignore[arg-type]
            else:
                high = self._linear(Role.PROTECTED, layer, x.kept, bias)
                rows.scatter(first, high[:, :cut].contiguous())
                rows.scatter(rest, high[:, cut:n].contiguous())
        return SplitOutput(first, rest)

    def _first_of(
        self, x: QuantizedActivations, read: Rows, rows: Rows | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The first columns in the rows ``read``, save protected ones, and zeros elsewhere."""
        assert self._layer is not None
        first: torch.Tensor = self._layer.weight.new_zeros(x.shape[0], self.apart)  # type: ignore[operator]
        if read is not rows and len(read.index):
            read.scatter(first, self._parts[0].multiply(operands.gather(x, read), bias))
        return first

    def set_apart(self, columns: int) -> bool:
        """Lets prefill return its first ``columns`` columns as a matrix of their own; False if the kernel cannot."""
        packed = self._packed.get(self.precision[Role.PROMPT])
        if packed is None or columns % 64:
            return False
        parts = packed.columns(0, columns), packed.columns(columns, self.shape[0])
        if parts[0] is None or parts[1] is None:
            return False
        self.apart, self._parts = columns, (parts[0], parts[1])
        return True

    @property
    def gemm_shapes(self) -> list[tuple[int, int]]:
        """[N, K] of the low-precision GEMMs of a prefill pass."""
        n, k = self.shape
        return [(self.apart, k), (n - self.apart, k)] if self.apart else [(n, k)]

    def _read_rows(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor | ReadRows,
        read: Rows,
        rows: Rows | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | ReadRows:
        """The rows ``read`` of the result, in their places of [T, N] or handed over; the others hold anything."""
        shape = x.shape[:-1]
        if rows is not None:
            self._check_rows(shape.numel(), rows)
        part = x.part if isinstance(x, ReadRows) else read.gather(x.reshape(-1, x.shape[-1]).contiguous())
        out = None
        if not self.hands_over:
            out = part.new_empty(shape.numel(), self.shape[0])
        if read is rows:
            result = self._high(layer, part, rows, bias, out)
        else:
            result = self._packed[self.precision[Role.PROMPT]].matmul(part, bias)
            if rows is not None:
                protected = rows.slots[read.index] >= 0
                result = torch.where(protected[:, None], self._high(layer, part, read, bias), result)
            if out is not None and len(part):
                read.scatter(out, result)
        return ReadRows(result, shape.numel()) if out is None else out.view(*shape, out.shape[-1])

    @property
    def activation_format(self) -> str | None:
        """That of prefill, if its kernel takes quantised activations."""
        packed = self._packed.get(self.precision[Role.PROMPT])
        return packed.activation_format if packed else None

    def fusable(self, tokens: int) -> tuple[str, Rows | None] | None:
        """For the running pass, the format that a producer of ``tokens`` rows may quantise this linear's input to and
        the rows that it has to keep; None if the linear takes BF16.  Decode is never fused: it stays SGLang's own."""
        running = current()
        fmt = self.activation_format
        if running.role is not Role.PROMPT or fmt is None:
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

    def _few(self, kept: torch.Tensor) -> bool:
        """Whether the protected rows ``kept`` are for the kernel of few BF16 rows."""
        return kept.is_cuda and self.precision[Role.PROTECTED] == "bf16" and len(kept) <= GRAPH_ROWS

    def _high(
        self,
        layer: torch.nn.Module,
        kept: torch.Tensor,
        rows: Rows,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result for the protected rows ``kept`` [R, K]: [R, N], or in the places of ``rows`` in ``out``."""
        if self._few(kept):
            from mixquant_sglang.kernels.triton.few_rows import linear_rows_

            index = rows.index
            if out is None:
                out, index = kept.new_empty(len(kept), self.shape[0]), rows.places
            linear_rows_(out, index, kept, layer.weight, bias)  # type: ignore[arg-type]
            return out
        high = self._linear(Role.PROTECTED, layer, kept, bias)
        if out is None:
            return high
        rows.scatter(out, high)
        return out

    def apply_into(
        self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.takes_stock_now():
            return super().apply_into(layer, x, output, bias)  # type: ignore[no-any-return]
        result = self.apply(layer, x, bias)
        assert isinstance(result, torch.Tensor), "qkv projections do not write into an output of the caller"
        return output.copy_(result)

    def apply_with_addend(
        self, layer: torch.nn.Module, x: torch.Tensor, addend: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """0.5.23 only; there the caller counts ``addend`` as used up."""
        if self.takes_stock_now():
            return super().apply_with_addend(layer, x, addend, bias)  # type: ignore[no-any-return]
        result = self.apply(layer, x, bias)
        assert isinstance(result, torch.Tensor), "qkv projections have no addend"
        return result.add_(addend)

    def _linear(self, role: Role, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        precision = self.precision[role]
        if precision == "bf16":
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        return self._packed[precision].matmul(x.contiguous(), bias)
