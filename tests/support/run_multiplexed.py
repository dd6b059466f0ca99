"""Prefill of a few layers at a time between decode steps, as PD multiplexing runs it, on one ``ModelRunner``; prints
what came of it as JSON.

usage: run_multiplexed.py MODEL RECIPE.  ``tests/sglang/test_multiplexing.py`` runs it and says what is right.  Streams
a CPU has none of: what is seen is what each call computes, in the order in which SGLang's loop makes them.
"""

from __future__ import annotations

import json
import logging
import sys
from array import array
from pathlib import Path
from typing import Any

import torch

from tests.support import runner as support

PROMPT, OTHER = 40, 24


class Trial:
    def __init__(self, model: Path, recipe: str) -> None:
        self.runner = support.build(model, recipe)
        from mixquant_sglang.host import runtime

        run = runtime.current()
        assert run is not None
        self.run = run
        self.layers = self.runner.model_config.num_hidden_layers

    def clear(self) -> None:
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()

    def forward(self, forward_batch: Any, **more: Any) -> torch.Tensor | None:
        with torch.no_grad():
            output = self.runner.forward(forward_batch, **more).logits_output
        return None if output is None else output.next_token_logits.clone()

    def prompt(self, first: int, length: int, *, split: bool = False) -> tuple[Any, Any]:
        """``split``: scheduled as SGLang's loop does, which names the mode after it made the batch."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        from mixquant_sglang.versions import batches

        batch, whole = batches.prefill_batch([(array("q", range(first, first + length)), length)], self.runner)
        if not split:
            return batch, whole
        batch.forward_mode = ForwardMode.SPLIT_PREFILL
        return batch, ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)

    def counts(self) -> dict[str, dict[str, int]]:
        tokens: dict[str, dict[str, int]] = self.run.state()["tokens"]
        return {phase: dict(found) for phase, found in tokens.items()}

    def apart(self) -> tuple[Any, list[torch.Tensor | None]]:
        """Logits of a prompt, and of decode steps of another request, one after the other."""
        from mixquant_sglang.versions import batches

        self.clear()
        batch, prefill = self.prompt(20, PROMPT)
        whole = self.forward(prefill)
        batch, prefill = self.prompt(70, OTHER)
        self.forward(prefill)
        return whole, [self.forward(batches.decode_batch(batch, self.runner)) for _ in range(self.layers)]

    def beside(self, step: int, between: Any = None) -> tuple[Any, list[torch.Tensor | None], list[str]]:
        """The same, a decode step before each ``step`` layers of the prompt; ``between`` is called after the first."""
        from mixquant_sglang.passes.running import current
        from mixquant_sglang.versions import batches

        self.clear()
        batch, prefill = self.prompt(70, OTHER)
        self.forward(prefill)
        _, forward_batch = self.prompt(20, PROMPT, split=True)
        decoded, roles, whole = [], [], None
        for start in range(0, self.layers, step):
            decoded.append(self.forward(batches.decode_batch(batch, self.runner)))
            roles.append(current().role.value)
            assert whole is None and forward_batch.split_index == start
            whole = self.forward(forward_batch, split_forward_count=min(step, self.layers - start))
            roles.append(current().role.value)
            if between is not None and not start:
                between()
        return whole, decoded, roles


def same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    assert first is not None and second is not None
    return bool(torch.equal(first.view(torch.int16), second.view(torch.int16)))


def played(trial: Trial) -> dict[str, Any]:
    whole, steps = trial.apart()
    trial.run.weights.hold("a test")  # so all of it from the masters
    masters, _ = trial.apart()
    trial.run.weights.changed()
    trial.run.weights.refresh()
    results: dict[str, Any] = {"low differs": not same(whole, masters), "layers": trial.layers, "by": {}}
    results["prunes"] = trial.run.schedule.prunes
    for step in (1, 3, trial.layers):
        before = trial.counts()
        split, decoded, roles = trial.beside(step)
        counted = {
            phase: {p: n - before[phase].get(p, 0) for p, n in found.items()} for phase, found in trial.counts().items()
        }
        results["by"][step] = {
            "prompt": same(split, whole),
            "decode": all(same(one, other) for one, other in zip(decoded, steps, strict=False)),
            "steps": len(decoded),
            "outside": sorted(set(roles)),
            "counted": counted,
        }
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mixquant_sglang").addHandler(handler)
    held, _, _ = trial.beside(2, lambda: trial.run.weights.hold("a test"))
    results["held"] = [same(held, whole), same(held, masters)]
    from mixquant_sglang.layers.linear import MixQuantLinearMethod
    from mixquant_sglang.passes.running import current

    trial.run.weights.changed()
    trial.run.weights.refresh()
    apply, from_masters = MixQuantLinearMethod.apply, []

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        from_masters.append(current().from_masters)
        return apply(self, *args, **kwargs)

    def hold() -> None:
        trial.run.weights.hold("a test")
        MixQuantLinearMethod.apply = noted  # type: ignore[method-assign]

    trial.beside(2, hold)
    MixQuantLinearMethod.apply = apply  # type: ignore[method-assign]
    results["from masters"] = [len(from_masters), all(from_masters)]
    results["said"] = [line for line in said if "layers of a prefill pass" in line]
    return results


if __name__ == "__main__":
    print(json.dumps(played(Trial(Path(sys.argv[1]), sys.argv[2]))))
