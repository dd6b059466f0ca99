"""``min_tokens``: from how many tokens of a pass on low precision is faster than BF16, and so the first token sooner.

In a dense model protected rows read the weights once, whatever their number, which some hundred tokens do not earn
back. Of experts each reaches others: 64 rows of Qwen3-30B-A3B read nearly all of them.
"""

from __future__ import annotations

from dataclasses import replace

from mixquant_sglang.tools.plan.cost import Cost
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder

PROMPTS = (1, 16, 64)  # that end in a pass
_LADDER = tuple(round(2 ** (i / 4) / 16) * 16 for i in range(16, 61))  # 16 to 32768 tokens


def break_even(plan: Plan, baseline: Plan, model: Decoder, gpu: Gpu, tp: int) -> dict[int, int | None]:
    """Prompts that end in a pass -> its tokens, from which on ``plan`` is faster than ``baseline`` (stock BF16),
    as far as 32768; None if it is not even then. Both in one pass without cached tokens."""
    cost, free = Cost(gpu, model, tp), replace(plan, min_tokens=1)
    found: dict[int, int | None] = {}
    for prompts in PROMPTS:
        found[prompts] = None
        for tokens in reversed([n for n in _LADDER if n >= prompts]):
            work = Workload(tokens // prompts, batch=prompts, tp=tp, chunk=max(64, tokens))
            low, high = (sum(cost.prefill(one, work)[0].values()) for one in (free, baseline))
            if low >= high:
                break
            found[prompts] = tokens
    return found


def settled(plan: Plan, found: dict[int, int | None] | None) -> Plan:
    """``plan`` with the ``min_tokens`` that a server would measure, if it does; ``found``: by ``break_even``."""
    if not plan.measures or found is None:
        return plan
    least = found[1] or _LADDER[-1] + 1
    return replace(plan, min_tokens=least, describe=f"{plan.describe}; passes of less than {least} tokens in bf16")
