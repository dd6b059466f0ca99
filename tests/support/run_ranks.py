"""Runs models as one rank of a server with DP attention, as ``run_model`` does alone; other processes are the others.

    python -m tests.support.run_ranks '[CASE, ...]' RANK PORT

All of them come to the same passes, each with requests of its own, and print one line of JSON for each case.  There are
as many as ``tp_size`` of the cases says.  In a case with ``unsorted`` nothing is kept in BF16 by where it stands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tests.support import gloo_shim, run_model


def main() -> None:
    rank, port = int(sys.argv[2]), int(sys.argv[3])
    run_model.take_part(rank, port)
    gloo_shim.over_gloo()
    from sglang.benchmark import one_batch

    from mixquant_sglang.host import report

    load: Callable[..., Any] = one_batch.load_model
    one_batch.load_model = lambda args, ports, gpu, _rank: load(args, ports, gpu, rank)
    run, keep = run_model._run, report.keep_gathered_bf16

    def run_case(case: dict[str, Any]) -> dict[str, Any]:
        report.keep_gathered_bf16 = (lambda *_: None) if case.get("unsorted") else keep
        return run(case)

    run_model._run = run_case
    sys.argv = sys.argv[:2]
    run_model.main()


if __name__ == "__main__":
    main()
