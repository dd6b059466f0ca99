"""Throwaway SGLang plugins for tests: a folder with one module and the metadata by which SGLang finds it."""

from __future__ import annotations

import os
from pathlib import Path

# What a stock SGLang needs on a machine without a GPU; with SGLANG_PLUGINS=cpu_shim no other plugin is loaded.
CPU_SHIM = """
def register():
    import torch

    if not torch.cuda.is_available():
        import sglang.srt.layers.rotary_embedding.base as rotary

        rotary._is_cpu = True
"""

# Writes down the requests of every batch that reaches the model, as SGLang has them, one JSON line a batch.
SPY = """
import json
import os

import torch.distributed


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.register("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", note)


def note(forward_batch, _cls, batch, *args, **kwargs):
    if torch.distributed.get_rank():
        return  # every rank sees the same batches
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    mode = forward_batch.forward_mode.name
    decode = mode == "DECODE"
    rows = []
    for i, req in enumerate(batch.reqs):
        rows.append(
            {
                "rid": req.rid,
                "prompt": len(req.origin_input_ids),
                "prefix": 0 if decode else int(forward_batch.extend_prefix_lens_cpu[i]),
                "new": 1 if decode else int(forward_batch.extend_seq_lens_cpu[i]),
                "decoding": decode or id(req) in decoding,
            }
        )
    with open(os.environ["SPY_FILE"], "a") as file:
        file.write(json.dumps({"mode": mode, "requests": rows}) + "\\n")
"""

# Writes down what each rank ran, and what mixquant there counted of it: one file a process, kept as of its last pass.
RANKS = """
import json
import os
from collections import Counter
from pathlib import Path

rows = Counter()


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.forward", note)


def note(_result, _runner, forward_batch, *args, **kwargs):
    from mixquant_sglang.host import runtime

    rows[forward_batch.forward_mode.name] += len(forward_batch.input_ids)
    run = runtime.current()
    if run is None:
        return
    state = run.state()
    said = {"rows": rows, "tokens": state["tokens"], "protected": state["protected_rows"]}
    file = Path(os.environ["RANKS_FOLDER"]) / f"{os.getpid()}.json"
    file.with_suffix(".new").write_text(json.dumps(said))
    file.with_suffix(".new").replace(file)
"""

# Writes down the name of every Triton kernel that a process compiles or loads for the first time, one a line.
COMPILER_SPY = """
import os


def register():
    from triton import knobs

    knobs.runtime.jit_post_compile_hook = note


def note(*args, fn=None, **kwargs):
    with open(os.environ["COMPILED_FILE"], "a") as file:
        file.write(f"{fn.module}.{fn.name}\\n")
"""

# Takes a symbol out of SGLang before mixquant looks for it, as a release that renamed it would.
SABOTEUR = """
import os
import pkgutil


def register():
    owner, _, name = os.environ["SABOTAGE"].rpartition(".")
    delattr(pkgutil.resolve_name(owner), name)
"""


def write(folder: Path, name: str, source: str) -> Path:
    """Makes the plugin ``name`` from the module ``source``; returns the folder to put on PYTHONPATH.

    Entry points are found in the order of PYTHONPATH, so this plugin runs before the installed ones.
    """
    root = folder / name
    info = root / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    (root / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    return root


def on_path(folders: list[Path]) -> str:
    """PYTHONPATH of a server that has the plugins in ``folders``."""
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.pathsep.join([*map(str, folders), *inherited])
