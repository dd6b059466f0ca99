"""The method of a MoE layer: the role of each row of the running pass picks the experts that it goes through.

It subclasses ``UnquantizedFusedMoEMethod`` so that SGLang treats the layer as the BF16 layer that it is: same weights,
same loaders, same routing, its own BF16 run in decode.  Of a pass with prompt rows all rows go through the packed
experts, and protected rows once more through SGLang's BF16 ones, with the experts that the router picked for them from
their own BF16 hidden states.  Both are partial sums of this rank: the reduction over ranks comes after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput

from mixquant_sglang.kernels.limits import FEW_ROWS
from mixquant_sglang.layers.packed_experts import PackedExpertsMethod
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.roles import Role

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows


class MixQuantExpertsMethod(PackedExpertsMethod):
    def takes_stock_now(self) -> bool:
        """Whether the running pass takes what SGLang would run without us: BF16 for all rows."""
        running = current()
        if running.from_masters:
            return not self.masterless
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
        if x.is_cuda and len(rows.index) <= FEW_ROWS and self._takes_few:
            self._place_few(out, rows.index, x.contiguous(), topk)
            return StandardCombineInput(out)
        high = self._run(Role.PROTECTED, layer, *pick(x, topk, rows))
        rows.scatter(out, high[: len(rows.index)])
        return StandardCombineInput(out)

    @property
    def _takes_few(self) -> bool:
        """Whether protected rows have a kernel of few BF16 rows; CUDA only."""
        precision = self.precision[Role.PROTECTED]
        return precision == "bf16" or self._packed[precision].places

    def _place_few(self, out: torch.Tensor, index: torch.Tensor, x: torch.Tensor, topk: StandardTopKOutput) -> None:
        precision = self.precision[Role.PROTECTED]
        if precision != "bf16":
            self._packed[precision].place(out, index, x, *_routing(topk))
            return
        from mixquant_sglang.kernels.triton.expert_rows import expert_rows_

        assert self._form is not None
        expert_rows_(out, index, x, *_routing(topk), self.masters, self._form)

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
        device = self._one_copy.device if self._one_copy is not None else self.masters.w13.device
        for rows in (*tokens, FEW_ROWS):
            x = torch.zeros(rows, h, dtype=torch.bfloat16, device=device)
            ids = torch.arange(rows * k, dtype=torch.int32, device=device).view(rows, k) % experts
            topk = StandardTopKOutput(torch.zeros(rows, k, device=device), ids, torch.empty(0, device=device))
            for role in (Role.PROMPT, Role.PROTECTED):
                if self.precision[role] != "bf16" or (self.split and rows == FEW_ROWS):
                    self._run(role, self._layer, x, topk)
        if self._form is not None and self._takes_few and (self.split or self.decodes_low):
            from mixquant_sglang.kernels.triton.expert_units import BUCKETS

            for slots in BUCKETS:
                self._place_few(x, torch.full((slots,), -1, dtype=torch.int64, device=device), x, topk)


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
