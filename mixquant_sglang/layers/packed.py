"""A linear's weight: one BF16 master, packed copies beside it, and products with either.

It subclasses ``UnquantizedLinearMethod`` so that SGLang treats the layer as the BF16 layer that it is: same parameter,
same loaders, same fused BF16 kernels in decode.  ``layer.weight`` is never repacked.

Where decode reads packed weights in BF16 activations (``w8a16``, ``w4a16``), there is no master: ``layer.weight`` has
no memory, and what SGLang loads into it is packed as soon as it is whole (``weights/staging.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.kernels import registry
from mixquant_sglang.kernels.limits import FEW_ROWS, MANY_ROWS
from mixquant_sglang.kernels.linear.weight_only import WeightOnly
from mixquant_sglang.kernels.registry import packed_linear
from mixquant_sglang.kernels.verify import Pair
from mixquant_sglang.layers.share import share_of
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY, keeps_master, stored
from mixquant_sglang.recipe.roles import Kind, Role, by_role
from mixquant_sglang.versions.loading import loads_dummy
from mixquant_sglang.weights.quantised_linear import QuantisedLinear
from mixquant_sglang.weights.ready_made_linear import ReadyMadeLinear
from mixquant_sglang.weights.refresh import fingerprint
from mixquant_sglang.weights.staging import Staging

if TYPE_CHECKING:
    from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
    from mixquant_sglang.kernels.environment import Environment
    from mixquant_sglang.kernels.linear.base import PackedLinear
    from mixquant_sglang.kernels.rows import Rows
    from mixquant_sglang.recipe.schema import Recipe
    from mixquant_sglang.recipe.select import Selection
    from mixquant_sglang.weights.refresh import Weights


class Server(Protocol):
    """What linears share."""

    recipe: Recipe
    selection: Selection
    environment: Environment
    weights: Weights


class PackedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    kind = Kind.LINEAR
    form = ""  # of the packed weights, a kernel's (``registry.py``)

    def __init__(
        self, runtime: Server, name: str, prefill: str, decode: str, ready: ReadyMadeLinear | None = None
    ) -> None:
        """``ready``: where the NVFP4 copy comes from instead of the master."""
        super().__init__()
        self.name = name
        self.precision = by_role(prefill, decode)
        self.split = self.precision[Role.PROMPT] != self.precision[Role.PROTECTED]  # whether rows can need protection
        self.refusal: str | None = None
        self._runtime = runtime
        self._layer: torch.nn.Module | None = None
        self._ready = ready
        self._packed: dict[str, PackedLinear] = {}
        self._staging: Staging | QuantisedLinear | None = None  # where there is no master
        self._failed: str | None = None  # why the weights that came last to where there is no master are not packed
        self._print: tuple[int, int] | None = None  # of the master that the copies were packed from
        self._ready_print: tuple[int, int] | None = None  # of the master that the ready-made weights belong to

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight on this rank."""
        assert self._layer is not None
        n, k = self._layer.weight.size()  # type: ignore[operator]
        return n, k

    @property
    def masterless(self) -> bool:
        """Whether no BF16 weight is kept."""
        return not keeps_master(self.precision[Role.PROMPT], self.precision[Role.DECODE])

    @property
    def layer(self) -> torch.nn.Module:
        assert self._layer is not None
        return self._layer

    @property
    def master(self) -> torch.Tensor:
        """The BF16 weight [N, K], where it is kept."""
        assert self._layer is not None and not self.masterless
        weight: torch.Tensor = self._layer.weight.data  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = getattr(self._layer, "bias", None)
        return bias

    @property
    def invariant(self) -> bool:
        """Whether the bits of a row must not depend on the other rows of its pass."""
        return self._runtime.environment.invariant

    def runs(self, precision: str, kernel: str) -> bool:
        """Whether some phase runs this linear in ``precision`` with ``kernel``."""
        return precision in self.low and self._runtime.selection.kernels[precision] == kernel

    def copy_in(self, precision: str) -> PackedLinear:
        """The packed copy of the weight, where some phase runs this linear in ``precision``."""
        return self._packed[precision]

    @property
    def extra_bytes(self) -> int:
        kept = {t.data_ptr(): t.nbytes for packed in self._packed.values() for t in packed.tensors()}
        return sum(kept.values())

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
        self._choose(layer, sum(output_partition_sizes), input_size_per_partition, params_dtype)
        if self.masterless and not loads_dummy():
            self._stage(layer, self._size, params_dtype, extra_weight_attrs)
        else:
            sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
            super().create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)
        if self._ready is not None and self.refusal is None:
            with refusing():
                self._ready.place(share_of(layer, output_partition_sizes, input_size_per_partition, input_size))
        self._runtime.weights.layers.append(self)

    def _choose(self, layer: torch.nn.Module, n: int, k: int, dtype: torch.dtype) -> None:
        """Makes BF16 what no kernel takes."""
        self._layer, self._size = layer, (n, k)
        for precision in self.low:
            refusal = registry.refusal(precision, self._runtime.selection.kernels[precision], n, k, form=self.form)
            if dtype != torch.bfloat16:  # some routers, whose rows are of that dtype too
                refusal = f"its weight is {str(dtype).removeprefix('torch.')}, not bfloat16"
            if refusal:
                self.refusal = refusal
                self.precision = by_role("bf16", "bf16")
                self.split = False

    def _stage(
        self, layer: torch.nn.Module, shape: tuple[int, int], dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        known = {"input_dim": 1, "output_dim": 0, **attributes}
        self._staging = Staging(shape, dtype, torch.empty(0).device, known, self._arrived)
        layer.register_parameter("weight", self._staging.parameter)

    def _arrived(self, weight: torch.Tensor) -> None:
        self._runtime.weights.arrived(self, weight)

    def stay_bf16(self, reason: str) -> None:
        """Makes the layer an ordinary BF16 one for good: its packed copies go, ``refusal`` says why."""
        if self.masterless:
            with refusing():
                raise MixQuantError(
                    f"{self.name} has to stay BF16 ({reason}), but recipe {self._runtime.recipe.name} keeps no BF16 "
                    f"weight of it; add the rule '{{match: {self.name}, prefill: bf16, decode: bf16}}'"
                )
        self.refusal = reason
        self.precision = by_role("bf16", "bf16")
        self.split = False
        self._packed, self._ready = {}, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not self.masterless:
            super().process_weights_after_loading(layer)
        if layer is not self._layer:
            with refusing():
                raise MixQuantError(
                    f"SGLang moved the weight of {self.name} into another module, {type(layer).__name__}, with that of "
                    f"a linear beside it; keep both in BF16 with recipe rules like '{{match: {self.name}, prefill: "
                    "bf16, decode: bf16}'"
                )
        if self.masterless and self._staging is None:  # SGLang filled it with random numbers
            weight: torch.nn.Parameter = layer.weight  # type: ignore[assignment]
            self._arrived(weight.data)
            with weight.device:
                self._stage(layer, self.shape, weight.dtype, vars(weight))
            return
        self._runtime.weights.loaded(self)

    @property
    def stale(self) -> bool:
        """Whether the copies were never packed, or from other numbers than the master holds now."""
        if self.masterless:
            return not self._packed
        return bool(self.low) and (self._print is None or self._print != fingerprint(self.master))

    @property
    def by_value(self) -> tuple[float, ...]:
        return tuple(value for packed in self._packed.values() for value in packed.by_value)

    @property
    def decodes_low(self) -> bool:
        return self.precision[Role.DECODE] != "bf16"

    @property
    def decodes_by_value(self) -> bool:
        return self.decodes_low and bool(self._packed[self.precision[Role.DECODE]].by_value)

    @property
    def low(self) -> set[str]:
        """The low precisions that some role takes."""
        return {*self.precision.values()} - {"bf16"}

    def pack(self) -> None:
        """Packs the master weight; after the first time in place, since captured graphs hold the addresses.

        Raises ValueError for NaN or infinity."""
        if not self.low:
            return
        if self.masterless:
            self._check_arrived()
            return
        self._print = None
        weight, now = self.master, fingerprint(self.master)
        self._pack(weight, now)
        self._print = now

    def pack_arrived(self, weight: Any) -> None:
        """Where there is no master: packs ``weight`` BF16 [N, K], which is not kept.  Raises as ``pack``."""
        self._failed = "what arrived last was not packed"
        try:
            self._pack(weight, None)
        except ValueError as error:
            self._failed = str(error)
            raise
        self._failed = None

    def forget_arrived(self) -> None:
        """Where there is no master: drops parts of a weight that is not whole."""
        if self._staging is not None and self._staging.begun:
            self._staging.forget()
            self._failed = "only parts of its new weight arrived"

    def _check_arrived(self) -> None:
        if self._staging is not None and self._staging.begun:
            raise MixQuantError("only parts of its weight arrived, and no BF16 weight is kept to put them into")
        if self._failed is not None or not self._packed:
            raise MixQuantError(self._failed or "its weight did not arrive")

    def _pack(self, weight: Any, now: tuple[int, int] | None) -> None:
        for precision in sorted({stored(precision) for precision in self.low}):
            packed = self._packed.get(precision)
            if packed is None:
                # Of a recipe without W8A8, W8A16 packs: by the kernel that runs anywhere.
                kernel = packed_linear(precision, self._runtime.selection.kernels.get(precision, "emulated"))
                ready = self._load_ready(precision, check=True)
                self._packed[precision] = self._copy(kernel, weight, ready)
                self._ready_print = now
            elif self._ready is not None and precision == "nvfp4" and now == self._ready_print:
                packed.replace(self._ready.load(weight, check=False))  # the memory was released in between
            else:
                packed.refresh(weight)
                if self._ready is not None and precision == "nvfp4":
                    self._ready.warn_updated()
        self._add_readers()

    def _add_readers(self) -> None:
        """Kernels that read what others packed."""
        for precision in self.low & WEIGHT_ONLY.keys() - self._packed.keys():
            reader = packed_linear(precision, self._runtime.selection.kernels[precision], self.form)
            assert issubclass(reader, WeightOnly)
            self._packed[precision] = reader.of(self._packed[stored(precision)])

    def verification(self) -> Pair:
        """The packed NVFP4 copy, and the emulated kernel with the same numbers."""
        assert self._layer is not None
        weight, ready = self.master, self._load_ready("nvfp4", check=False)
        emulated = self._copy(packed_linear("nvfp4", "emulated"), weight, ready)
        return Pair(self.name, *self.shape, self._packed["nvfp4"], emulated)

    def _copy(self, kernel: type[PackedLinear], weight: torch.Tensor, ready: list[NVFP4Tensor] | None) -> PackedLinear:
        run = self._runtime
        return kernel(weight, scales=run.recipe.scales, ready=ready, environment=run.environment)

    def _load_ready(self, precision: str, *, check: bool) -> list[NVFP4Tensor] | None:
        if self._ready is None or precision != "nvfp4":
            return None
        assert self._layer is not None
        with refusing():
            return self._ready.load(self._layer.weight.data, check=check)  # type: ignore[arg-type]

    # -- products --------------------------------------------------------------------------------------------------

    def product(self, role: Role, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x BF16 [M, K] -> BF16 [M, N], each row in the precision of ``role``."""
        precision = self.precision[role]
        if precision == "bf16":
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        return self._packed[precision].matmul(x.contiguous(), bias)

    def takes_few(self, kept: torch.Tensor, rows: Rows) -> bool:
        """Whether the protected rows ``kept`` are for a kernel of few BF16 rows."""
        if self.invariant:  # their bits are to be those of a pass that is BF16 for all rows
            return False
        precision = self.precision[Role.PROTECTED]
        most = MANY_ROWS if rows.captured else FEW_ROWS
        return kept.is_cuda and kept.shape[0] <= most and (precision == "bf16" or self._packed[precision].places)

    def place_few(
        self,
        out: torch.Tensor,
        index: torch.Tensor,
        kept: torch.Tensor,
        bias: torch.Tensor | None,
        rest: torch.Tensor | None = None,
    ) -> None:
        """Where it ``takes_few``: as ``triton/few_rows.py`` says of ``linear_rows_``."""
        precision = self.precision[Role.PROTECTED]
        if precision != "bf16":
            self._packed[precision].place(out, index, kept, bias, rest)
            return
        from mixquant_sglang.kernels.triton.few_rows import linear_rows_

        linear_rows_(out, index, kept, self.master, bias, rest=rest)

    def protected(
        self,
        layer: torch.nn.Module,
        kept: torch.Tensor,
        rows: Rows,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result for the protected rows ``kept`` [R, K]: [R, N], or in the places of ``rows`` in ``out``."""
        if self.takes_few(kept, rows):
            index = rows.index
            if out is None:
                out, index = kept.new_empty(len(kept), self.shape[0]), rows.places
            self.place_few(out, index, kept, bias)
            return out
        high = self.product(Role.PROTECTED, layer, kept, bias)
        if out is None:
            return high
        rows.scatter(out, high)
        return out
