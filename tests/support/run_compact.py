"""A recipe without BF16 weights on one ``ModelRunner``: how it loads, what it holds, and updates of every kind.

usage: run_compact.py MODEL FOLDER RECIPE.  ``tests/sglang/test_compact.py`` runs it and says what is right.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.weights.staging import Staging
from tests.support.updates import DOWN, NORM, Trial, changed

Q, K, V = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")


class Peak:
    """Bytes of BF16 weights that lie in buffers, at most, while something is loaded."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.peak = 0
        load = Staging.load

        def watched(staging: Staging, *args: Any, **kwargs: Any) -> None:
            self.held[id(staging)] = staging.parameter.nbytes
            self.peak = max(self.peak, sum(self.held.values()))
            load(staging, *args, **kwargs)
            if not staging.begun:
                del self.held[id(staging)]

        Staging.load = watched  # type: ignore[method-assign]


class Compact(Trial):
    def fresh(self) -> bool:
        """Whether all packed numbers are those of packing the checkpoint's tensors that came last."""
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        for layer in self.run.weights.layers:
            block, _, leaf = layer.name.rpartition(".")
            weight = torch.cat([self.now[f"{block}.{part}.weight"] for part in parts.get(leaf, (leaf,))])
            for packed in layer._packed.values():  # type: ignore[attr-defined]
                new = type(packed)(weight.bfloat16(), scales=self.run.recipe.scales)
                for a, b in zip(packed.tensors(), new.tensors(), strict=True):
                    if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                        return False
        return True


def main() -> None:
    peak = Peak()
    folder = Path(sys.argv[2])
    trial = Compact(Path(sys.argv[1]), folder, sys.argv[3])
    old = trial.old
    trial.now = dict(old)
    model = trial.runner.model
    packed = {
        t.data_ptr(): t.nbytes
        for layer in trial.run.weights.layers
        for copy in layer._packed.values()  # type: ignore[attr-defined]
        for t in copy.tensors()
    }
    linears = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    trial.results["loaded"] = {
        "peak": peak.peak,
        "left": sum(peak.held.values()),
        "block": sum(t.nbytes for name, t in old.items() if name.startswith("model.layers.0.") and "proj" in name),
        "bf16": sum(p.nbytes for p in linears),
        "absent": [len(linears), sum(p.is_meta for p in linears)],
        "held": sum(packed.values()),
        "state": trial.run.state(),
    }
    trial.note("start")

    def send(named: dict[str, torch.Tensor], load_format: str | None = None) -> tuple[bool, str]:
        done = trial.tensor(list(named.items()), load_format)
        if done[0]:
            trial.now.update(named)
        return done

    trial.note("some parts", send({NORM: old[NORM], Q: old[Q] * 2}))
    trial.note("nan", send({DOWN: changed(old[DOWN], float("nan"))}))
    trial.note("direct", send({"model.layers.2.mlp.down_proj.weight": old[DOWN] * 2}, "direct"))
    addresses = sorted(packed)
    trial.note("good", send({DOWN: old[DOWN] * 2**-10, Q: old[Q] * 3, K: old[K], V: old[V]}))
    trial.note("back", send({DOWN: old[DOWN], Q: old[Q], K: old[K], V: old[V]}))
    trial.note("ipc", trial.ipc([[(Q, old[Q])], [(K, old[K]), (V, old[V])]]))
    small = folder / "small"
    shutil.copytree(trial.model, small)
    from safetensors.torch import load_file, save_file

    for file in small.glob("*.safetensors"):
        tensors = load_file(file)
        if DOWN in tensors:
            tensors[DOWN] = trial.now[DOWN] = tensors[DOWN] * 2**-10
        save_file(tensors, file, metadata={"format": "pt"})
    trial.note("disk", trial.disk(str(small)))
    trial.now = dict(old)
    trial.note("disk back", trial.disk(str(trial.model)))
    if hasattr(trial.updater, "begin_weight_update"):
        trial.updater.begin_weight_update()
        trial.note("session", send({Q: old[Q] * 3}))
        trial.note("session, more", send({K: old[K], V: old[V]}))
        trial.updater.end_weight_update(run_post_load=False)
        trial.note("session over")
        trial.updater.begin_weight_update()
        send({Q: old[Q]})
        trial.updater.end_weight_update(run_post_load=False)
        trial.note("session cut", warned=list(trial.log.lines))
        trial.note("session mended", send({Q: old[Q], K: old[K], V: old[V]}))
    trial.results["addresses"] = addresses == sorted(
        t.data_ptr()
        for layer in trial.run.weights.layers
        for t in next(iter(layer._packed.values())).tensors()  # type: ignore[attr-defined]
    )
    layer = next(layer for layer in trial.run.weights.layers if layer.name == DOWN.removesuffix(".weight"))
    pack = layer.pack_arrived

    def fails(_weight: torch.Tensor) -> None:
        layer._failed = "out of memory"  # type: ignore[attr-defined]
        raise RuntimeError("out of memory")

    layer.pack_arrived = fails  # type: ignore[method-assign]
    trial.note("packing fails", send({DOWN: old[DOWN]}))
    layer.pack_arrived = pack  # type: ignore[method-assign]
    trial.note("packing works again", send({DOWN: old[DOWN]}))
    trial.results["peak at the end"] = peak.peak
    print(json.dumps(trial.results))


if __name__ == "__main__":
    main()
