"""Runs one command: ``python scripts/__main__.py COMMAND ...``, as each file without an ending in this folder does.

``scripts`` is found by its place, not by ``sys.path``: there, the checkout would offer its ``mixquant_sglang`` as well,
and hide the installed one from the command and from the servers that it starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

# Each module has a function ``command``, which reads sys.argv.
COMMANDS = {
    "bench_agent": "bench.agent",
    "bench_attention": "bench.attention",
    "bench_bursts": "bench.bursts",
    "bench_kernels": "bench.kernels",
    "bench_packed": "bench.packed",
    "bench_prefill": "bench.prefill",
    "bench_trace": "bench.trace",
    "demo": "tools.demo",
    "draw_overview": "tools.overview",
    "draw_rooms": "tools.rooms",
    "drift": "tools.drift",
    "eval_accuracy": "eval.accuracy",
    "eval_longbench_v2": "public.longbench_v2",
    "eval_longmemeval": "public.longmemeval",
    "eval_reasoning": "public.reasoning",
    "eval_ruler": "public.ruler",
    "eval_tasks": "eval.tasks",
    "eval_text": "eval.text",
    "fuzz": "tools.fuzz",
    "make_family_models": "models.make_family_models",
    "make_tiny_model": "models.make_tiny_model",
    "measure_formats": "tools.measure_formats",
    "serve_pd": "serve.pd",
    "soak": "load.soak",
    "support_matrix": "tools.support",
    "train_tiny_model": "models.train_tiny_model",
}


def provide() -> None:
    """Makes ``scripts`` importable in this process, and nothing else of the checkout."""
    if "scripts" in sys.modules:
        return
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "scripts", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec and spec.loader
    package = sys.modules["scripts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python scripts/__main__.py COMMAND ...; commands: {', '.join(COMMANDS)}")
    del sys.argv[0]  # argparse and messages call the command by its own name
    provide()
    importlib.import_module(f"scripts.{COMMANDS[sys.argv[0]]}").command()


if __name__ == "__main__":
    main()
