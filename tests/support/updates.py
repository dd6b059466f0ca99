"""Weight updates of every kind, good and broken, on one ``ModelRunner``; prints what came of each as JSON.

usage: updates.py MODEL FOLDER RECIPE.  ``tests/sglang/test_weight_updates.py`` runs it and says what is right.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import runner as support

DOWN = "model.layers.2.mlp.down_proj.weight"
NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("mixquant"):
            self.lines.append(record.getMessage())


class Trial:
    def __init__(self, model: Path, folder: Path, recipe: str) -> None:
        self.model, self.folder = model, folder
        self.runner = support.build(model, recipe)
        from mixquant_sglang.host import runtime

        run = runtime.current()
        assert run is not None
        self.run, self.updater = run, self.runner.weight_updater
        self.before = support.answer(self.runner)
        self.log = Log()
        logging.getLogger().addHandler(self.log)
        self.results: dict[str, Any] = {}
        self.old = {name: t for file in sorted(model.glob("*.safetensors")) for name, t in load_file(file).items()}

    def note(self, label: str, done: tuple[bool, str] | None = None, **more: Any) -> None:
        """How the model answers now, against the start; which precision the prompt took; whether copies are fresh."""
        self.log.lines.clear()
        counted = dict(self.run.counters.by_phase("prefill"))
        steps = dict(self.run.counters.by_phase("decode"))
        first, second = support.answer(self.runner)
        after = self.run.counters.by_phase("prefill")
        self.results[label] = {
            "done": done and done[0],
            "message": done and done[1].replace(str(self.folder), "DIR"),
            "same": bool(torch.equal(first, self.before[0]) and torch.equal(second, self.before[1])),
            "prefill": {p: n - counted.get(p, 0) for p, n in after.items() if n != counted.get(p, 0)},
            "decode": {p: n - steps.get(p, 0) for p, n in self.run.counters.by_phase("decode").items()},
            "fresh": self.fresh() if self.run.weights.current and (done is None or done[0]) else None,
            "path": self.updater.model_config.model_path.replace(str(self.folder), "DIR"),
            "warnings": list(self.log.lines),
            **more,
        }

    def fresh(self) -> bool:
        """Whether all packed numbers are those of packing the masters anew."""
        for layer in self.run.weights.layers:
            for packed in layer._packed.values():  # type: ignore[attr-defined]
                new = type(packed)(layer.master, scales=self.run.recipe.scales)  # type: ignore[attr-defined]
                for a, b in zip(packed.tensors(), new.tensors(), strict=True):
                    if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                        return False
                if packed.by_value != new.by_value:
                    return False
        return True

    def checkpoint(self, label: str, edit: Callable[[Tensors], Any]) -> str:
        folder = self.folder / label
        shutil.copytree(self.model, folder)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            edit(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        return str(folder)

    def disk(self, path: str) -> tuple[bool, str]:
        done: tuple[bool, str] = self.updater.update_weights_from_disk(path, "auto")
        return done

    def tensor(self, named: Any, load_format: str | None = None) -> tuple[bool, str]:
        done: tuple[bool, str] = self.updater.update_weights_from_tensor(named, load_format)
        return done

    def distributed(self, named: list[tuple[str, torch.Tensor]]) -> tuple[bool, str]:
        done: tuple[bool, str]
        if hasattr(self.updater, "load_weights_from_distributed"):
            done = self.updater.load_weights_from_distributed(named)
            return done
        values, broadcast = [t for _, t in named], torch.distributed.broadcast
        waits = types.SimpleNamespace(wait=lambda: None)
        torch.distributed.broadcast = lambda t, **_: (t.copy_(values.pop(0)), waits)[1]
        self.updater._model_update_group["group"] = None
        try:
            done = self.updater.update_weights_from_distributed(
                *([n for n, _ in named], [str(t.dtype)[6:] for _, t in named], [t.shape for _, t in named], "group")
            )
        finally:
            torch.distributed.broadcast = broadcast
        return done

    def ipc(self, buckets: list[list[tuple[str, torch.Tensor]] | Exception]) -> tuple[bool, str]:
        """As checkpoint-engine does: one buffer for all buckets, then the post hook."""

        def update(_context: Any, _handle: str, *, device_id: int, run: Any, post_hook: Any) -> None:
            for bucket in buckets:
                if isinstance(bucket, Exception):
                    raise bucket
                buffers = [(name, tensor.clone()) for name, tensor in bucket]
                run(buffers)
                for _, buffer in buffers:
                    buffer.fill_(7)  # the sender writes the next bucket there
            self.results.setdefault("ipc", {"hooks": []})["hooks"].append(post_hook.__module__)
            post_hook()

        worker = types.ModuleType("checkpoint_engine.worker")
        worker.update_weights_from_ipc = update  # type: ignore[attr-defined]
        sys.modules.update({"checkpoint_engine": types.ModuleType("checkpoint_engine"), worker.__name__: worker})
        from sglang.srt.checkpoint_engine import checkpoint_engine_worker as extension

        extension.update_weights_from_ipc = update
        impl = extension.SGLangCheckpointEngineWorkerExtensionImpl
        impl.get_device_uuid, impl.get_device_id = lambda _: "GPU-0", lambda _: 0
        done: tuple[bool, str] = self.updater.update_weights_from_ipc(
            types.SimpleNamespace(zmq_handles={"GPU-0": "ipc://none"})
        )
        return done


def changed(value: torch.Tensor, at: float) -> torch.Tensor:
    out = value.clone()
    out.view(-1)[7] = at
    return out


def main() -> None:
    trial = Trial(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    old = trial.old
    nan, inf = float("nan"), float("inf")
    trial.note("start")

    def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
        return lambda tensors: tensors.update({name: value(tensors[name])}) if name in tensors else None

    broken = {
        "nan": replace(DOWN, lambda t: changed(t, nan)),
        "inf in a norm": replace(NORM, lambda t: changed(t, -inf)),
        "missing": lambda t: t.pop(DOWN, None),
        "extra": lambda t: t.update({"model.extra.weight": t[NORM].clone()}) if NORM in t else None,
        "shape": replace(DOWN, lambda t: t[:-1].contiguous()),
        "fp8": replace(DOWN, lambda t: t.to(torch.float8_e4m3fn)),
        "too large for bf16": replace(DOWN, lambda t: changed(t.float(), 3.4e38)),
    }
    for label, edit in broken.items():
        trial.note(f"disk {label}", trial.disk(trial.checkpoint(label, edit)))
    cut = Path(trial.checkpoint("cut", lambda _: None))
    file = sorted(cut.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1000])
    trial.note("disk cut", trial.disk(str(cut)))
    trial.note("disk nowhere", trial.disk(str(trial.folder / "nowhere")))
    trial.note("disk dummy", trial.updater.update_weights_from_disk(str(trial.model), "dummy"))

    small = trial.checkpoint("small", replace(DOWN, lambda t: t * 2**-10))
    kind, load = type(trial.runner.model), type(trial.runner.model).load_weights
    calls: list[int] = []

    def stops(model: Any, weights: Any) -> Any:
        calls.append(0)
        if len(calls) > 1:
            return load(model, weights)

        def some() -> Any:
            for i, named in enumerate(weights):
                if i == 40:
                    raise OSError("Input/output error")
                yield named

        return load(model, some())

    kind.load_weights = stops
    trial.note("disk stops half way", trial.disk(small), calls=len(calls))
    kind.load_weights = load

    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    skipped = trial.checkpoint("skipped", lambda t: t.update({inv_freq: torch.ones(8)}) if NORM in t else None)
    trial.note("disk skipped", trial.disk(skipped))
    trial.note("disk good", trial.disk(small))
    trial.note("disk back", trial.disk(str(trial.model)))

    for label, named in {
        "nan": [(NORM, old[NORM]), (DOWN, changed(old[DOWN], nan))],
        "shape": [(NORM, old[NORM] * 2), (DOWN, old[DOWN][:, :-16].contiguous())],
        "unknown": [(NORM, old[NORM] * 2), ("model.layers.99.mlp.down_proj.weight", old[DOWN])],
    }.items():
        trial.note(f"tensor {label}", trial.tensor(named))
        trial.note(f"distributed {label}", trial.distributed(named))
        trial.note(f"ipc {label}", trial.ipc([named[:1], named[1:]]))
    norms = [(NORM, old[NORM] * 2)]
    trial.note("ipc dies", trial.ipc([norms, OSError("the sender is gone")]))
    trial.note("direct nan", trial.tensor([*norms, (DOWN, changed(old[DOWN], nan))], "direct"))
    trial.note("direct unknown", trial.tensor([*norms, ("model.layers.0.mlp.gate_proj.weight", old[DOWN])], "direct"))
    trial.note("direct shape", trial.tensor([*norms, (DOWN, old[DOWN][:1])], "direct"))
    merged = "model.layers.0.self_attn.qkv_proj.weight"
    held = trial.runner.model.get_parameter(merged).detach().clone()
    trial.note("tensor merged", trial.tensor([*norms, (merged, held)]))
    trial.note("unknown format", trial.tensor(norms, "no-such-format"))
    trial.updater.custom_weight_loaders.append("a.custom.loader")
    trial.note("custom loader", trial.tensor(norms, "a.custom.loader"))

    new, back = [(DOWN, old[DOWN] * 2**-10)], [(DOWN, old[DOWN])]
    for label, send in {
        "tensor": trial.tensor,
        "fp32": lambda named: trial.tensor([(n, t.float()) for n, t in named]),
        "direct": lambda named: trial.tensor(named, "direct"),
        "distributed": trial.distributed,
        "ipc": lambda named: trial.ipc([named, norms, [(NORM, old[NORM])]]),
    }.items():
        given: list[str] = []
        kind.load_weights = lambda model, weights, given=given: (
            given.append(type(weights).__name__),
            load(model, weights),
        )
        trial.note(f"{label} good", send(new), given=given)
        kind.load_weights = load
        trial.note(f"{label} back", send(back))

    layer = trial.run.weights.layers[5]
    pack = layer.pack

    def fails() -> None:
        raise RuntimeError("out of memory")

    layer.pack = fails  # type: ignore[method-assign]
    trial.note("packing fails", trial.tensor(back))
    trial.note("packing failed")
    trial.note("packing fails, disk", trial.disk(str(trial.model)))
    layer.pack = pack  # type: ignore[method-assign]
    trial.note("packing works again", trial.tensor(back))

    if hasattr(trial.updater, "begin_weight_update"):
        trial.updater.begin_weight_update()
        trial.note("session", trial.tensor(back))
        trial.updater.end_weight_update(run_post_load=False)
        trial.note("session over")
    memory(trial)
    print(json.dumps(trial.results))


def memory(trial: Trial) -> None:
    """Released and resumed: the masters and their copies come back as garbage."""
    from sglang.srt.managers.scheduler_components import weight_updater

    def lost(_tag: str) -> None:
        for layer in trial.run.weights.layers:
            layer.master.fill_(float("nan"))  # type: ignore[attr-defined]
            for packed in layer._packed.values():  # type: ignore[attr-defined]
                for tensor in packed.tensors():
                    tensor.view(torch.uint8).fill_(0x5A) if tensor.dim() else tensor.fill_(1e-30)

    saver = types.SimpleNamespace(pause=lambda _tag: None, resume=lost)
    group = (
        {}
        if hasattr(weight_updater.SchedulerWeightUpdaterManager, "__post_init__")
        else {"tp_cpu_group": trial.runner.tp_group.cpu_group}
    )
    torch.get_device_module = lambda *_: types.SimpleNamespace(synchronize=lambda: None)
    manager = weight_updater.SchedulerWeightUpdaterManager(
        tp_worker=types.SimpleNamespace(model_runner=trial.runner),
        draft_worker=None,
        memory_saver_adapter=saver,
        flush_cache=lambda **_: True,
        is_fully_idle=lambda **_: True,
        **group,
    )
    asked = types.SimpleNamespace(tags=["weights"])
    manager.release_memory_occupation(asked)
    trial.results["released"] = {"current": trial.run.weights.current}
    manager.resume_memory_occupation(asked)
    trial.note("resumed")
    trial.note("resumed, reloaded", trial.disk(str(trial.model)))
    manager.release_memory_occupation(types.SimpleNamespace(tags=["kv_cache"]))
    trial.results["kv cache released"] = {"current": trial.run.weights.current}


if __name__ == "__main__":
    main()
