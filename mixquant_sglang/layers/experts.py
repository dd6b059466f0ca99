"""The method of a MoE layer: the role of each row of the running pass picks the experts that it goes through.

It subclasses ``UnquantizedFusedMoEMethod`` so that SGLang treats the layer as the BF16 layer that it is: same weights,
same loaders, same routing, its own BF16 run in decode.  Of a pass with prompt rows all rows go through the packed
experts, and protected rows once more through SGLang's BF16 ones, with the experts that the router picked for them from
their own BF16 hidden states.  Both are partial sums of this rank: the reduction over ranks comes after.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixquant_sglang.errors import refusing
from mixquant_sglang.kernels import registry
from mixquant_sglang.kernels.experts.base import Form, Masters, Ready
from mixquant_sglang.kernels.limits import FEW_ROWS
from mixquant_sglang.kernels.registry import packed_experts
from mixquant_sglang.kernels.verify_experts import ExpertsPair
from mixquant_sglang.layers.expert_config import choices_of, form_of
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.roles import Kind, Role, by_role
from mixquant_sglang.weights.ready_made_experts import ExpertShare
from mixquant_sglang.weights.refresh import fingerprint

if TYPE_CHECKING:
    from mixquant_sglang.kernels.experts.base import PackedExperts, ReadyExperts
    from mixquant_sglang.kernels.rows import Rows
    from mixquant_sglang.layers.packed import Server
    from mixquant_sglang.weights.ready_made_experts import ReadyMadeExperts


class MixQuantExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
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
        super().create_weights(
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            with_bias=with_bias,
            **extra_weight_attrs,
        )
        self._layers = [layer]
        form = "another back end than Triton runs them" if self._others else form_of(layer.moe_runner_config)
        refusals = [form] if isinstance(form, str) else []
        for precision in sorted(self.low):
            selection = self._runtime.selection
            kernel, sizes = selection.kernels[precision], (intermediate_size_per_partition, hidden_size)
            refusal = registry.refusal(precision, kernel, *sizes, Kind.EXPERTS, selection.capability)
            if not refusal and isinstance(form, Form):
                refusal = packed_experts(precision, kernel).refuses(form, with_bias)
            refusals.append(refusal or "")
        refusal = next(filter(None, refusals), None)
        if refusal:
            self.stay_bf16(refusal)
        elif isinstance(form, Form):
            # On a CPU SGLang leaves the scaling to the model.
            self._form = form if layer.w13_weight.is_cuda else replace(form, scaling=1.0)
            if self._ready is not None:
                with refusing():
                    self._ready.place(_share(layer, self.masters))
        self._runtime.weights.layers.append(self)

    def stay_bf16(self, reason: str) -> None:
        """Makes the layer an ordinary BF16 one for good: its packed copies go, ``refusal`` says why."""
        self.refusal = reason
        self.precision = by_role("bf16", "bf16")
        self.split = False
        self._packed, self._ready = {}, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._runtime.weights.loaded(self)  # before SGLang may repack the masters for a CPU's own kernels
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

    masterless = False  # experts keep their BF16 weights

    def pack_arrived(self, weight: torch.Tensor) -> None:
        raise RuntimeError(f"mixquant: {self.name} keeps BF16 weights, which are packed when all of them are there")

    def forget_arrived(self) -> None:
        pass

    @property
    def decodes_low(self) -> bool:
        return self.precision[Role.DECODE] != "bf16"

    @property
    def by_value(self) -> tuple[float, ...]:
        return ()

    decodes_by_value = False

    @property
    def extra_bytes(self) -> int:
        return sum(packed.nbytes for packed in self._packed.values())

    @property
    def stale(self) -> bool:
        """Whether the copies were never packed, or from other numbers than the masters hold now."""
        return bool(self.low) and (self._print is None or self._print != self._fingerprint())

    def _fingerprint(self) -> tuple[tuple[int, int], ...]:
        return tuple(fingerprint(master.flatten(0, 1)) for master in self.masters[:2])

    def runs(self, precision: str, kernel: str) -> bool:
        """Whether some phase runs these experts in ``precision`` with ``kernel``."""
        return precision in self._packed and self._runtime.selection.kernels[precision] == kernel

    def copy_in(self, precision: str) -> PackedExperts:
        """The packed copy, where some phase runs these experts in ``precision``."""
        return self._packed[precision]

    def pack(self) -> None:
        """Packs the masters; after the first time in place, since captured graphs hold the addresses.

        Raises ValueError for NaN or infinity."""
        if not self.low:
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

    # -- products --------------------------------------------------------------------------------------------------

    def takes_stock_now(self) -> bool:
        """Whether the running pass takes what SGLang would run without us: BF16 for all rows."""
        running = current()
        if running.from_masters:
            return True
        return self.precision[running.role] == "bf16" and (running.rows is None or not self.split)

    def apply(self, layer: torch.nn.Module, dispatch_output: StandardDispatchOutput) -> Any:
        if self.takes_stock_now():
            return super().apply(layer, dispatch_output)
        running = current()
        rows = running.rows if self.split else None
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        assert isinstance(topk, StandardTopKOutput), f"routing of {self.name} is {type(topk).__name__}"
        if rows is None:
            return StandardCombineInput(self._run(running.role, layer, x, topk))
        if len(x) != rows.tokens:
            raise RuntimeError(
                f"mixquant: {self.name} got {len(x)} rows in a pass of {rows.tokens}, so it cannot tell "
                f"which are protected; keep it in BF16 with a recipe rule '{{match: {self.name}, prefill: bf16}}'"
            )
        out = self._run(running.role, layer, x, topk)
        if x.is_cuda and self.precision[Role.PROTECTED] == "bf16" and len(rows.index) <= FEW_ROWS:
            from mixquant_sglang.kernels.triton.expert_rows import expert_rows_

            assert self._form is not None
            expert_rows_(out, rows.index, x.contiguous(), *_routing(topk), self.masters, self._form)
            return StandardCombineInput(out)
        high = self._run(Role.PROTECTED, layer, *pick(x, topk, rows))
        rows.scatter(out, high[: len(rows.index)])
        return StandardCombineInput(out)

    def _run(self, role: Role, layer: torch.nn.Module, x: torch.Tensor, topk: StandardTopKOutput) -> torch.Tensor:
        """x BF16 [T, H], which stays as it is -> BF16 [T, H], each row in the precision of ``role``; ids may be -1."""
        precision = self.precision[role]
        if precision != "bf16":
            return self._packed[precision].run(x.contiguous(), *_routing(topk))
        dispatched = StandardDispatchOutput(x, None, topk)
        if not x.is_cuda:
            return super().apply(layer, dispatched).hidden_states  # type: ignore[no-any-return]
        assert self._padded_runner is not None
        out: torch.Tensor = self._padded_runner.run(dispatched, self.get_triton_quant_info(layer)).hidden_states
        return out

    def run_by_itself(self, role: Role, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """As a pass of ``role`` does: x BF16 [T, H], ``weights`` float32 and ``ids`` int32 [T, experts a token]."""
        topk = StandardTopKOutput(weights, ids, weights.new_empty(0))
        if self.precision[role] == "bf16":
            self._run(role, self._layer, x, topk)  # what SGLang runs, but never in place of x
        else:
            self.apply(self._layer, StandardDispatchOutput(x, None, topk))

    def warm_up(self, tokens: list[int]) -> None:
        """Runs every product once, so that nothing is compiled while a request waits; CUDA only."""
        experts, _, h, k = self.sizes
        device = self.masters.w13.device
        for rows in (*tokens, FEW_ROWS):
            x = torch.zeros(rows, h, dtype=torch.bfloat16, device=device)
            ids = torch.arange(rows * k, dtype=torch.int32, device=device).view(rows, k) % experts
            topk = StandardTopKOutput(torch.zeros(rows, k, device=device), ids, torch.empty(0, device=device))
            for role in (Role.PROMPT, Role.PROTECTED):
                if self.precision[role] != "bf16" or (self.split and rows == FEW_ROWS):
                    self._run(role, self._layer, x, topk)
        if self.split and self.precision[Role.PROTECTED] == "bf16" and self._form is not None:
            from mixquant_sglang.kernels.triton import expert_rows

            for slots in expert_rows.BUCKETS:
                index = torch.full((slots,), -1, dtype=torch.int64, device=device)
                expert_rows.expert_rows_(x, index, x, *_routing(topk), self.masters, self._form)


def _share(layer: Any, masters: Masters) -> ExpertShare:
    """What this rank holds of the FusedMoE ``layer``; as ``FusedMoE._map_global_expert_id_to_local_expert_id``."""
    shared: int = layer.num_fused_shared_experts
    held, hidden, inner = masters.w2.shape
    first = layer.moe_ep_rank * (held - shared)
    local = tuple(range(first, first + held - shared))
    return ExpertShare(layer.num_experts - shared, local, inner, hidden, layer.moe_tp_rank, layer.moe_tp_size, shared)


def _routing(topk: StandardTopKOutput) -> tuple[torch.Tensor, torch.Tensor]:
    return topk.topk_weights.float().contiguous(), topk.topk_ids.int().contiguous()


def pick(x: torch.Tensor, topk: StandardTopKOutput, rows: Rows) -> tuple[torch.Tensor, StandardTopKOutput]:
    """The protected rows of x [T, H] and of the routing [T, k].  On CUDA in blocks of 64, so that SGLang's kernels see
    few sizes: what is not used has experts -1, of which no weight is read."""
    index = rows.index
    if x.is_cuda:
        index = F.pad(index, (0, -len(index) % FEW_ROWS), value=-1)
    there = index.clamp(min=0)
    ids = topk.topk_ids.index_select(0, there)
    if x.is_cuda:
        ids.masked_fill_((index < 0)[:, None], -1)
    # The router's logits are read by nothing here, and some routers leave them out.
    return x.index_select(0, there), StandardTopKOutput(topk.topk_weights.index_select(0, there), ids, x[:0])
