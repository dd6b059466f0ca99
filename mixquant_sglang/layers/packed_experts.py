"""The BF16 weights of a MoE layer and their packed copies, as ``packed.py`` has them of a linear.

Where decode reads packed weights (w8a16, w4a16), there are no masters: ``one_copy.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.kernels import registry
from mixquant_sglang.kernels.experts.base import Form, Masters, Ready
from mixquant_sglang.kernels.experts.weight_only import WeightOnlyExperts
from mixquant_sglang.kernels.registry import packed_experts
from mixquant_sglang.kernels.verify_experts import ExpertsPair
from mixquant_sglang.layers.expert_config import choices_of, form_of, share_of
from mixquant_sglang.layers.one_copy import OneCopy
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY, keeps_master, stored
from mixquant_sglang.recipe.roles import Kind, Role, by_role
from mixquant_sglang.versions.loading import loads_dummy
from mixquant_sglang.weights.refresh import fingerprint

if TYPE_CHECKING:
    from mixquant_sglang.kernels.experts.base import PackedExperts, ReadyExperts
    from mixquant_sglang.layers.packed import Server
    from mixquant_sglang.weights.ready_made_experts import ReadyMadeExperts


class PackedExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    kind = Kind.EXPERTS

    def __init__(
        self,
        runtime: Server,
        name: str,
        prefill: str,
        decode: str,
        ready: ReadyMadeExperts | None = None,
        *,
        flags: tuple[bool, bool, bool],
    ) -> None:
        """``ready``: where the NVFP4 copy comes from instead of the masters. ``flags``: what SGLang gives its own
        method: Triton kernels of OpenAI's, FlashInfer's, DeepGEMM."""
        super().__init__(*flags)
        self.name = name
        self.precision = by_role(prefill, decode)
        self.split = self.precision[Role.PROMPT] != self.precision[Role.PROTECTED]  # whether rows can need protection
        self.refusal: str | None = None
        self._runtime = runtime
        self._others = any(flags) or self.use_flashinfer_cutlass
        self._layers: list[torch.nn.Module] = []  # the one; the method is a module in it, which must not contain it
        self._form: Form | None = None
        self._packed: dict[str, PackedExperts] = {}
        self._print: tuple[tuple[int, int], ...] | None = None  # of the masters that the copies were packed from
        self._ready = ready
        self._ready_print: tuple[tuple[int, int], ...] | None = None  # of those that the ready-made weights belong to
        self._padded_runner: MoeRunner | None = None
        self._choices: int | None = None
        self._one_copy: OneCopy | None = None  # where there are no masters

    # -- weights ---------------------------------------------------------------------------------------------------

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = num_experts, hidden_size, intermediate_size_per_partition, params_dtype, with_bias
        device, absent = torch.empty(0).device, self.masterless and not loads_dummy()
        with torch.device("meta") if absent else nullcontext():
            super().create_weights(layer, *sizes, **extra_weight_attrs)
        self._layers = [layer]
        form = "another back end than Triton runs them" if self._others else form_of(layer.moe_runner_config)
        refusals = [form] if isinstance(form, str) else []
        for precision in sorted(self.low):
            refusals.append(self._refusal(precision, form, with_bias, intermediate_size_per_partition, hidden_size))
        refusal = next(filter(None, refusals), None)
        if refusal:
            self._keep_bf16(refusal)
            if absent:
                super().create_weights(layer, *sizes, **extra_weight_attrs)
        elif isinstance(form, Form):
            # On a CPU SGLang leaves the scaling to the model.
            self._form = form if device.type == "cuda" else replace(form, scaling=1.0)
            if self._ready is not None:
                with refusing():
                    self._ready.place(share_of(layer, self.masters))
            if self.masterless:
                self._one_copy = OneCopy(layer, device, lambda *at: self._runtime.weights.arrived(self, at[2], at[:2]))
                self._one_copy.keep_biases()
                if absent:
                    self._one_copy.stage()
                    self._make_empty(self._one_copy)
        self._runtime.weights.layers.append(self)

    def _refusal(self, precision: str, form: Form | str, biased: bool, i: int, h: int) -> str:
        """Why these experts, [I, H] each, cannot be of ``precision``; empty if they can."""
        selection = self._runtime.selection
        kernel = selection.kernels[precision]
        refusal = registry.refusal(precision, kernel, i, h, Kind.EXPERTS, selection.capability)
        if refusal or not isinstance(form, Form):
            return refusal or ""
        packs = packed_experts(precision, kernel)
        if self.masterless and precision not in WEIGHT_ONLY and not packs.piecewise:
            return f"its {kernel} {precision} kernel packs all experts at once, and no BF16 weights are kept"
        return packs.refuses(form, biased) or ""

    def stay_bf16(self, reason: str) -> None:
        """Makes the layer an ordinary BF16 one for good: its packed copies go, ``refusal`` says why."""
        if self._one_copy is not None:
            with refusing():
                raise MixQuantError(
                    f"{self.name} has to stay BF16 ({reason}), but recipe {self._runtime.recipe.name} keeps no BF16 "
                    f"weights of it; add the rule '{{match: {self.name}, prefill: bf16, decode: bf16}}'"
                )
        self._keep_bf16(reason)

    def _keep_bf16(self, reason: str) -> None:
        self.refusal = reason
        self.precision = by_role("bf16", "bf16")
        self.split = False
        self._packed, self._ready = {}, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        one = self._one_copy
        if one is not None and not self._packed:  # SGLang filled the weights with random numbers
            masters = self.masters
            self._make_empty(one)
            for which, weights in enumerate((masters.w13, masters.w2)):
                for expert, weight in enumerate(weights):
                    one.arrived(which, expert, weight)
            one.stage()
        self._runtime.weights.loaded(self)  # before SGLang may repack the masters for a CPU's own kernels
        if one is None:
            super().process_weights_after_loading(layer)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        super().create_moe_runner(layer, moe_runner_config)
        # Without a number of experts SGLang's Triton runner looks out for -1 among the ids, as with expert parallelism.
        if self._form is not None:
            config = replace(moe_runner_config, num_experts=None, inplace=False)
            self._padded_runner = MoeRunner(self.runner.runner_backend, config)

    @property
    def _layer(self) -> torch.nn.Module:
        return self._layers[0]

    @property
    def masters(self) -> Masters:
        biases = (getattr(self._layer, f"{name}_weight_bias", None) for name in ("w13", "w2"))
        weights = (getattr(self._layer, f"{name}_weight") for name in ("w13", "w2"))
        return Masters(*(w.data for w in weights), *(None if b is None else b.data for b in biases))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Experts of this rank, I, H, experts a token."""
        w13, w2 = self.masters[:2]
        assert self._choices is not None, f"{self.name} was not asked how many experts a token takes"
        return len(w13), w2.shape[2], w2.shape[1], self._choices

    def find_choices(self, model: torch.nn.Module) -> None:
        """How many experts a token takes: as the layer was told, or (Llama-4) the router that stands beside it in
        ``model``.  Without either the layer stays BF16: nothing could be timed or proved of it."""
        self._choices = choices_of(self._layer, model)
        if self._choices is None:
            self.stay_bf16("neither it nor a router beside it says how many experts a token takes")

    @property
    def form(self) -> Form | None:
        """What they compute; None if they stay BF16 for it."""
        return self._form

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weights that a row is multiplied by."""
        experts, i, h, k = self.sizes
        return 3 * i * min(k, experts), h

    @property
    def low(self) -> set[str]:
        """The low precisions that some role takes."""
        return {*self.precision.values()} - {"bf16"}

    @property
    def masterless(self) -> bool:
        """Whether no BF16 weights are kept."""
        return not keeps_master(self.precision[Role.PROMPT], self.precision[Role.DECODE])

    def pack_arrived(self, weight: torch.Tensor, at: tuple[int, int] | None = None) -> None:
        """Where there are no masters: packs w13 (``at`` 0) or w2 (1) of an expert.  Raises as ``pack``."""
        assert self._one_copy is not None and at is not None
        self._one_copy.put(*at, weight)

    def forget_arrived(self) -> None:
        """Where there are no masters: drops experts that are not whole."""
        if self._one_copy is not None:
            self._one_copy.forget()

    @property
    def decodes_low(self) -> bool:
        return self.precision[Role.DECODE] != "bf16"

    @property
    def by_value(self) -> tuple[float, ...]:
        return ()

    decodes_by_value = False

    @property
    def extra_bytes(self) -> int:
        kept = {t.data_ptr(): t.nbytes for packed in self._packed.values() for t in packed.tensors()}
        return sum(kept.values())

    @property
    def stale(self) -> bool:
        """Whether the copies were never packed, or from other numbers than the masters hold now."""
        if self._one_copy is not None:
            return not self._packed
        return bool(self.low) and (self._print is None or self._print != self._fingerprint())

    def _fingerprint(self) -> tuple[tuple[int, int], ...]:
        return tuple(fingerprint(master.flatten(0, 1)) for master in self.masters[:2])

    def runs(self, precision: str, kernel: str) -> bool:
        """Whether some phase runs these experts in ``precision`` with ``kernel``."""
        return precision in self.low and self._runtime.selection.kernels[precision] == kernel

    def copy_in(self, precision: str) -> PackedExperts:
        """The packed copy, where some phase runs these experts in ``precision``."""
        return self._packed[precision]

    def pack(self) -> None:
        """Packs the masters; after the first time in place, since captured graphs hold the addresses.

        Raises ValueError for NaN or infinity."""
        if not self.low:
            return
        if self._one_copy is not None:
            self._one_copy.finish()
            return
        assert self._form is not None
        self._print = None
        run, masters, now = self._runtime, self.masters, self._fingerprint()
        for precision in sorted(self.low):
            packed = self._packed.get(precision)
            made = self._ready if precision == "nvfp4" else None
            if packed is None:
                kernel = packed_experts(precision, run.selection.kernels[precision])
                scales, environment = run.recipe.scales, run.environment
                ready = None if made is None else self._reader(made, masters, check=True)
                self._packed[precision] = kernel(
                    masters, self._form, scales=scales, ready=ready, environment=environment
                )
                self._ready_print = now
            elif made is not None and now == self._ready_print:
                packed.replace(self._reader(made, masters, check=False))  # the memory was released in between
            else:
                packed.refresh(masters)
                if made is not None:
                    made.warn_updated()
        self._print = now

    def _make_empty(self, one: OneCopy) -> None:
        """Where there are no masters: copies for what arrives, and their readers."""
        assert self._form is not None
        kernels, scales, shapes = self._runtime.selection.kernels, self._runtime.recipe.scales, self.masters
        for precision in sorted({stored(precision) for precision in self.low}):
            # Of a recipe without W8A8, W8A16 packs: by the kernel that runs anywhere.
            packs = packed_experts(precision, kernels.get(precision, "emulated"))
            self._packed[precision] = packs.empty(shapes, self._form, scales=scales, device=one.device)
        one.fill([*self._packed.values()], shapes)
        for precision in self.low & WEIGHT_ONLY.keys():
            reads = packed_experts(precision, kernels[precision])
            assert issubclass(reads, WeightOnlyExperts)
            self._packed[precision] = reads.of(self._packed[stored(precision)])

    def verification(self) -> ExpertsPair:
        """The packed NVFP4 copy, and the emulated experts with the same weights."""
        assert self._form is not None
        masters, run = self.masters, self._runtime
        ready = None if self._ready is None else self._reader(self._ready, masters, check=False)
        emulated = packed_experts("nvfp4", "emulated")(masters, self._form, scales=run.recipe.scales, ready=ready)
        return ExpertsPair(self.name, self.sizes, self._packed["nvfp4"], emulated)

    def _reader(self, made: ReadyMadeExperts, masters: Masters, *, check: bool) -> ReadyExperts:
        def read(expert: int) -> Ready:
            with refusing():
                return Ready(*made.load(expert, masters.w13[expert], masters.w2[expert], check=check))

        return read
