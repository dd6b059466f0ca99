"""A served model and its draft on one ``ModelRunner``, with the plugin in this process; prints what came of it as JSON.

usage: run_speculation.py MODEL RECIPE.  ``tests/sglang/test_speculation.py`` runs it and says what is right.

``stock`` runs passes with SGLang's own linear method in place of ours, and without a runtime that schedules them.  The
draft is the same runner under the name of one: SGLang's draft workers need kernels that a CPU lacks.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support import runner as support

PROMPT, DRAFTED = 40, 4


@contextmanager
def stock() -> Iterator[None]:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from mixquant_sglang.host import runtime
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    ours, MixQuantLinearMethod.apply = MixQuantLinearMethod.apply, UnquantizedLinearMethod.apply
    known, runtime._runtime = runtime._runtime, None
    try:
        yield
    finally:
        MixQuantLinearMethod.apply, runtime._runtime = ours, known


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(torch.equal(first.view(torch.int16), second.view(torch.int16)))


class Trial:
    def __init__(self, model: Path, recipe: str) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        # compiles a kernel for CUDA, which moves KV of accepted rows
        MHATokenToKVPool._init_kv_copy_and_warmup = lambda _pool: None
        self.runner = support.build(model, recipe, speculative_algorithm="NGRAM")
        from mixquant_sglang.host import runtime

        run = runtime.current()
        assert run is not None
        self.run = run

    def clear(self) -> None:
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()

    def forward(self, forward_batch: Any) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.runner.forward(forward_batch).logits_output.next_token_logits
        return logits.clone()

    def prompt(self, length: int = PROMPT) -> tuple[Any, Any]:
        from mixquant_sglang.versions import batches

        return batches.prefill_batch([(array("q", range(20, 20 + length)), length)], self.runner)

    def tokens(self) -> dict[str, dict[str, int]]:
        state: dict[str, dict[str, int]] = self.run.state()["tokens"]
        return state

    def verified(self, change: Callable[[Any], None] = lambda _: None) -> torch.Tensor:
        """Logits of drafted rows after a prompt that our method prefills: a chain, as the trie of NGRAM may give."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        from mixquant_sglang.versions import batches

        self.clear()
        batch, prefill = self.prompt()
        self.forward(prefill)
        step = batches.decode_batch(batch, self.runner)
        request = int(step.req_pool_indices[0])
        slots = [step.out_cache_loc, self.runner.token_to_kv_pool_allocator.alloc(DRAFTED - 1)]
        step.out_cache_loc = torch.cat([slot.to(torch.int64) for slot in slots])
        end = PROMPT + DRAFTED
        self.runner.req_to_token_pool.req_to_token[request, PROMPT:end] = step.out_cache_loc.to(torch.int32)
        step.forward_mode = ForwardMode.TARGET_VERIFY
        step.input_ids = torch.arange(70, 70 + DRAFTED)
        step.positions = torch.arange(PROMPT, end)
        step.seq_lens = torch.tensor([end])
        step.seq_lens_cpu, step.seq_lens_sum = step.seq_lens, end
        step.extend_prefix_lens, step.extend_seq_lens = torch.tensor([PROMPT]), torch.tensor([DRAFTED])
        step.extend_prefix_lens_cpu, step.extend_seq_lens_cpu = [PROMPT], [DRAFTED]
        step.extend_start_loc, step.extend_num_tokens = torch.tensor([0]), DRAFTED
        change(step)
        return self.forward(step)


def played(trial: Trial) -> dict[str, Any]:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from mixquant_sglang.host.hooks.forward import scheduled_of
    from mixquant_sglang.passes.running import MASTER_PASS, Pass, current
    from mixquant_sglang.recipe.roles import Role

    seen: list[Pass] = []
    method = type(trial.runner.model.model.layers[0].mlp.down_proj.quant_method)
    apply = method.apply

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(current())
        return apply(self, *args, **kwargs)

    results: dict[str, Any] = {"prunes": trial.run.schedule.prunes, "state": trial.run.state()}
    args = trial.runner.server_args
    results["draft quantization"] = args.speculative_draft_model_quantization
    before = trial.tokens()
    ours = trial.verified()
    results["counted"] = {
        phase: {p: n - before[phase].get(p, 0) for p, n in counts.items()} for phase, counts in trial.tokens().items()
    }
    with stock():
        whole_stock = trial.verified()  # its prompt too
    method.apply = noted
    roles = trial.verified()
    results["roles"] = [*dict.fromkeys(running.role.value for running in seen)]
    method.apply = apply

    def by_stock(_step: Any) -> None:
        method.apply = UnquantizedLinearMethod.apply

    try:
        results["verify is stock"] = same(ours, trial.verified(by_stock))
    finally:
        method.apply = apply
    results["again"] = same(ours, roles)
    results["prompt is low"] = not same(ours, whole_stock)

    trial.run.weights.hold("a test")
    seen.clear()
    method.apply = noted
    trial.verified()
    method.apply = apply
    results["held"] = bool(seen) and all(running is MASTER_PASS for running in seen)
    trial.run.weights.changed()
    trial.run.weights.refresh()

    # the same runner, under the name of a draft
    trial.clear()
    _, served = trial.prompt()
    low = trial.forward(served)
    trial.runner.is_draft_worker = True
    before_draft, passes = trial.tokens(), dict(trial.run.counters.passes)
    trial.clear()
    _, forward_batch = trial.prompt()
    results["draft scheduled"] = scheduled_of(forward_batch) is not None
    seen.clear()
    method.apply = noted
    draft = trial.forward(forward_batch)
    method.apply = apply
    results["draft roles"] = [*dict.fromkeys(running.role.value for running in seen)]
    results["draft counted"] = trial.tokens() != before_draft or dict(trial.run.counters.passes) != passes
    with stock():
        trial.clear()
        results["draft is stock"] = same(draft, trial.forward(trial.prompt()[1]))
    results["draft is low"] = same(draft, low)
    trial.runner.is_draft_worker = False
    assert Role.DRAFT.value not in results["state"]["tokens"]
    return results


if __name__ == "__main__":
    made = Trial(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps(played(made)))
