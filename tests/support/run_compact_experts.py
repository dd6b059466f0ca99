"""Experts of which no BF16 weights are kept, on one ``ModelRunner``: how they load, what they hold, and their updates.

usage: run_compact_experts.py FOLDER RECIPE.  ``tests/sglang/test_compact_experts.py`` runs it and says what is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.weights.expert_staging import ExpertStaging
from tests.support import tiny_models
from tests.support.updates import Trial, changed

GATE, UP, DOWN = (f"model.layers.1.mlp.experts.2.{leaf}_proj.weight" for leaf in ("gate", "up", "down"))
NORM = "model.norm.weight"


class Peak:
    """Bytes of BF16 weights of experts that lie in buffers, at most."""

    def __init__(self) -> None:
        self.peak = 0
        self.stagings: dict[int, ExpertStaging] = {}
        lend = ExpertStaging._lend

        def watched(staging: ExpertStaging, *args: Any) -> torch.Tensor:
            lent = lend(staging, *args)
            self.stagings[id(staging)] = staging
            self.peak = max(self.peak, self.held)
            return lent

        ExpertStaging._lend = watched  # type: ignore[method-assign]

    @property
    def held(self) -> int:
        of = self.stagings.values()
        return sum(len(one.begun) * one.parameter.nbytes // one.parameter.shape[0] for one in of)


class Compact(Trial):
    def fresh(self) -> bool:
        """Whether all packed experts are those of packing the checkpoint's tensors that came last."""
        for _, method in self.experts():
            for expert in range(method.sizes[0]):
                gate, up, down = (
                    self.now[f"{method.name}.{expert}.{leaf}_proj.weight"].bfloat16() for leaf in ("gate", "up", "down")
                )
                copy = method.copy_in(self.packs)
                device = copy.tensors()[0].device
                new = type(copy).empty(method.masters, method.form, scales=self.run.recipe.scales, device=device)
                new.put(0, expert, torch.cat([gate, up]))
                new.put(1, expert, down)
                for a, b in zip(copy.tensors(), new.tensors(), strict=True):
                    if not torch.equal(a[expert].view(torch.uint8), b[expert].view(torch.uint8)):
                        return False
        return True

    def experts(self) -> Any:
        from mixquant_sglang.host import report

        return report.experts(self.runner.model)


def main() -> None:
    folder, recipe = Path(sys.argv[1]), sys.argv[2]
    peak = Peak()
    trial = Compact(tiny_models.make(folder, "qwen3_moe"), folder, recipe)
    trial.packs = "fp8" if recipe == "fp8-compact" else "nvfp4"  # type: ignore[attr-defined]
    old = trial.old
    trial.now = dict(old)  # type: ignore[attr-defined]
    model = trial.runner.model
    weights = [p for name, p in model.named_parameters() if name.endswith(("w13_weight", "w2_weight"))]
    layer = sum(t.nbytes for name, t in old.items() if ".layers.0.mlp.experts." in name)
    methods = [method for _, method in trial.experts()]
    trial.results["loaded"] = {
        "peak": peak.peak,
        "left": peak.held,
        "expert": layer // methods[0].sizes[0],
        "bf16": sum(p.nbytes for p in weights),
        "absent": [len(weights), sum(p.is_meta for p in weights)],
        "held": sum(method.extra_bytes for method in methods),
        "state": trial.run.state(),
    }
    trial.note("start")
    addresses = [t.data_ptr() for method in methods for t in method.copy_in(trial.packs).tensors()]  # type: ignore[attr-defined]

    def send(named: dict[str, torch.Tensor], load_format: str | None = None) -> tuple[bool, str]:
        done = trial.tensor(list(named.items()), load_format)
        if done[0]:
            trial.now.update(named)  # type: ignore[attr-defined]
        return done

    trial.note("a gate alone", send({NORM: old[NORM] * 2, GATE: old[GATE] * 2}))
    trial.note("nan", send({NORM: old[NORM] * 2, DOWN: changed(old[DOWN], float("nan"))}))
    trial.note("direct", send({"model.layers.1.mlp.experts.w2_weight": torch.zeros(1)}, "direct"))
    trial.note("one matrix", send({DOWN: old[DOWN] * 3}))
    trial.note("gate and up", send({UP: old[UP] * 3, GATE: old[GATE]}))
    trial.note("back", send({DOWN: old[DOWN], UP: old[UP], GATE: old[GATE]}))
    trial.note("distributed", trial.distributed([(DOWN, old[DOWN])]))
    trial.note("disk", trial.disk(str(trial.model)))
    if hasattr(trial.updater, "begin_weight_update"):
        trial.updater.begin_weight_update()
        send({GATE: old[GATE]})
        trial.updater.end_weight_update(run_post_load=False)
        trial.note("session cut", warned=list(trial.log.lines))
        trial.note("session mended", send({GATE: old[GATE], UP: old[UP]}))
    now = [t.data_ptr() for method in methods for t in method.copy_in(trial.packs).tensors()]  # type: ignore[attr-defined]
    trial.results["addresses"] = addresses == now
    trial.results["peak at the end"] = peak.peak
    print(json.dumps(trial.results))


if __name__ == "__main__":
    main()
