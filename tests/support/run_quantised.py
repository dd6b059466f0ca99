"""A quantised checkpoint (FP8, a scale for each row) on one ``ModelRunner``, and updates of it.

usage: run_quantised.py MODEL FOLDER.  ``tests/sglang/test_quantised.py`` runs it and says what is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.support.updates import NORM, Trial

DOWN = "model.layers.2.mlp.down_proj"
Q, K, V = (f"model.layers.1.self_attn.{part}_proj" for part in "qkv")
LEAVES = ("weight", "weight_scale")


class Quantised(Trial):
    def fresh(self) -> bool:
        return True  # what was packed shows in the answers


def main() -> None:
    trial = Quantised(Path(sys.argv[1]), Path(sys.argv[2]), "fp8-compact")
    old = trial.old

    def of(*modules: str) -> dict[str, torch.Tensor]:
        return {f"{module}.{leaf}": old[f"{module}.{leaf}"] for module in modules for leaf in LEAVES}

    def addresses() -> list[int]:
        layers = trial.run.weights.layers
        return [t.data_ptr() for layer in layers for t in next(iter(layer._packed.values())).tensors()]  # type: ignore[attr-defined]

    def send(named: dict[str, torch.Tensor]) -> tuple[bool, str]:
        return trial.tensor(list(named.items()))

    trial.note("start")
    before = addresses()
    trial.note("no scales", send({NORM: old[NORM], f"{Q}.weight": old[f"{Q}.weight"]}))
    values = old[f"{DOWN}.weight"].float() * old[f"{DOWN}.weight_scale"].float()
    trial.note("bf16", send({f"{DOWN}.weight": values.bfloat16(), f"{DOWN}.weight_scale": old[f"{DOWN}.weight_scale"]}))
    nan = old[f"{DOWN}.weight"].clone()
    nan.view(torch.uint8)[3, 3] = 0x7F
    trial.note("nan", send({f"{DOWN}.weight": nan, f"{DOWN}.weight_scale": old[f"{DOWN}.weight_scale"]}))
    good = {f"{DOWN}.weight_scale": old[f"{DOWN}.weight_scale"] / 8, f"{Q}.weight_scale": old[f"{Q}.weight_scale"] * 2}
    trial.note("good", send(of(DOWN, Q, K, V) | good))
    trial.note("back", send(of(DOWN, Q, K, V)))
    trial.note("ipc", trial.ipc([[*of(Q).items()], [*of(K, V).items()]]))
    small = trial.checkpoint("small", lambda tensors: tensors.update(good))
    trial.note("disk", trial.disk(small))
    trial.note("disk back", trial.disk(str(trial.model)))
    if hasattr(trial.updater, "begin_weight_update"):
        trial.updater.begin_weight_update()
        send(of(Q))
        send(of(DOWN) | {f"{DOWN}.weight_scale": good[f"{DOWN}.weight_scale"]})
        trial.updater.end_weight_update(run_post_load=False)
        trial.note("session cut", warned=list(trial.log.lines), mixed=trial.run.state().get("weights_mixed"))
        trial.note("session mended", send(of(DOWN, Q, K, V)))
        trial.results["session mended"]["mixed"] = trial.run.state().get("weights_mixed")  # packed by the next pass
    trial.results["addresses"] = before == addresses()
    print(json.dumps(trial.results))


if __name__ == "__main__":
    main()
