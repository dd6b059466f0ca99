"""The linear method: the role of each row of the running pass picks how it is multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.layers.outputs import ReadRows, SplitOutput
from mixquant_sglang.layers.packed import PackedLinearMethod
from mixquant_sglang.layers.read_rows import ReadRowsProduct
from mixquant_sglang.layers.split_output import SplitProduct
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.roles import Role

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows


class MixQuantLinearMethod(PackedLinearMethod):
    # What the blocks around it take instead of a whole matrix, where they are known (``blocks.py``).
    split_product: SplitProduct | None = None
    read_rows: ReadRowsProduct | None = None
    whole = False  # whether it must be handed, and give, whole BF16 matrices, because adapters read them (LoRA)

    def stay_bf16(self, reason: str) -> None:
        super().stay_bf16(reason)
        self.split_product = self.read_rows = None

    def takes_stock_now(self) -> bool:
        """Whether the running pass takes what SGLang would run without us: BF16 for all rows.

        A pass from masters is a decode pass where there is none."""
        running = current()
        if running.from_masters:
            return not self.masterless
        return self.precision[running.role] == "bf16" and (running.rows is None or not self.split)

    def leaves_product_now(self) -> bool:
        """Whether SGLang may multiply by the weight in another way than by ``apply``.

        Where rows must not depend on their company it may not in a prefill pass that is BF16 for all of them: the same
        rows beside low ones go through ``apply``."""
        return self.takes_stock_now() and not (self.invariant and current().role is Role.PROTECTED)

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
        if running.tokens is not None:
            self._check_rows(x.shape[:-1].numel(), running.tokens)
        if self.read_rows is not None and running.read is not None:
            assert not isinstance(x, QuantizedActivations), "of few rows, norms and activations hand over BF16"
            if rows is not None:
                self._check_rows(x.shape[:-1].numel(), rows.tokens)
            return self.read_rows(self, layer, x, running.read, rows, bias)
        if isinstance(x, torch.Tensor):
            shape = x.shape[:-1]
            x = x.reshape(-1, x.shape[-1])
            if rows is not None:
                self._check_rows(x.shape[0], rows.tokens)
            packed = self._packed.get(precision)
            if packed is None or packed.activation_format is None:
                out = self.product(running.role, layer, x, bias)
                if rows is not None:
                    self.protected(layer, rows.gather(x), rows, bias, out)
                return out.view(*shape, out.shape[-1])
            x = operands.quantize(x.contiguous(), packed.activation_format, rows)
        else:
            shape = x.shape[:1]
        assert isinstance(x, QuantizedActivations)
        if self.split_product is not None and running.role is Role.PROMPT:
            return self.split_product(self, layer, x, rows, running.read, bias)
        out = self._packed[precision].multiply(x.operand, bias)
        if rows is not None:
            assert x.kept is not None
            self.protected(layer, x.kept, rows, bias, out)
        return out.view(*shape, out.shape[-1])

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
            self._check_rows(tokens, rows.tokens)
        return fmt, rows

    def _check_rows(self, tokens: int, expected: int) -> None:
        if tokens != expected:
            raise RuntimeError(
                f"mixquant: {self.name} got {tokens} rows in a pass of {expected}, so it cannot tell "
                f"which are protected; keep it in BF16 with a recipe rule '{{match: {self.name}, prefill: bf16}}'"
            )

    def apply_into(
        self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.leaves_product_now():
            return super().apply_into(layer, x, output, bias)  # type: ignore[no-any-return]
        result = self.apply(layer, x, bias)
        assert isinstance(result, torch.Tensor), "qkv projections do not write into an output of the caller"
        return output.copy_(result)

    def apply_with_addend(
        self, layer: torch.nn.Module, x: torch.Tensor, addend: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """0.5.23 only; there the caller counts ``addend`` as used up."""
        if self.leaves_product_now():
            return super().apply_with_addend(layer, x, addend, bias)  # type: ignore[no-any-return]
        result = self.apply(layer, x, bias)
        assert isinstance(result, torch.Tensor), "qkv projections have no addend"
        return result.add_(addend)

    def split_columns(self, columns: int) -> bool:
        """Lets prefill return its first ``columns`` columns as a matrix of their own; False if the kernel cannot."""
        packed = self._packed.get(self.precision[Role.PROMPT])
        self.split_product = None if packed is None else SplitProduct.of(packed, columns, self.shape[0])
        return self.split_product is not None

    @property
    def gemm_shapes(self) -> list[tuple[int, int]]:
        """[N, K] of the low-precision GEMMs of a prefill pass."""
        n, k = self.shape
        cut = self.split_product.columns if self.split_product is not None else 0
        return [(cut, k), (n - cut, k)] if cut else [(n, k)]
