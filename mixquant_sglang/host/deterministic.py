"""Deterministic inference in low precision: the bits of a row depend on its request alone, not on who is beside it.

SGLang keeps that promise for BF16 (``--enable-deterministic-inference``) with products, norms and attention of its own.
What low precision adds keeps it too:

* low rows: one GEMM for every number of rows (``kernels/triton/invariant.py``), nothing tuned by it;
* protected rows: SGLang's own product of the rows that were picked (``layers/packed.py``), so that they have the bits
  of a pass that is BF16 for all rows;
* norms and activations: SGLang's own, nothing fused; no row left out; attention as SGLang has it;
* which rows are low: ``min_tokens`` speaks of a request's prompt, not of a pass (``passes/schedule.py``), and ``auto``,
  which is timed, is 1;
* experts stay BF16: nothing has shown yet that a row of theirs keeps its bits.

What a start cannot keep ends it: ``prove_rows``.  What is refused: ``refused_deterministic.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import report
from mixquant_sglang.host.refusal import is_set
from mixquant_sglang.host.refused_deterministic import FLAG
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.versions.dialect import dialect

logger = logging.getLogger(__name__)

EXPERTS = "deterministic inference: that their rows do not depend on each other's number has not been shown"
ROWS = 257  # of the whole of which parts are compared: of no one size that a kernel has tiles of
_PARTS = (slice(0, 1), slice(254, 257), slice(100, 164))


def keep_rows_apart(run: Runtime, model_runner: Any) -> None:
    """Keeps experts in BF16, and says what is done; ``MixQuantError`` if SGLang was asked for another thing than this
    process was told."""
    asked = is_set(getattr(dialect().resolved(model_runner.server_args), "enable_deterministic_inference", None))
    if asked != run.environment.invariant and run.selection.kernels:
        raise MixQuantError(f"SGLang has {FLAG} {asked}, where this process was told {run.environment.invariant}")
    if not run.environment.invariant or not run.selection.kernels:
        return
    for _, experts in report.experts(model_runner.model):
        if experts.low:
            experts.stay_bf16(EXPERTS)
    logger.info(
        "mixquant: deterministic inference: one GEMM for every number of low rows, SGLang's own product of protected "
        "ones; nothing is fused, tuned or left out"
    )


def prove_rows(run: Runtime, methods: Iterable[object]) -> None:
    """Runs a linear of each shape on many rows and on some of them, as prompt rows and as protected ones: their bits
    are to be equal.  ``MixQuantError`` if they are not.  Call it once SGLang's own products are what they will be."""
    if not run.environment.invariant:
        return
    done: set[tuple[object, ...]] = set()
    for method in methods:
        if not isinstance(method, MixQuantLinearMethod) or not method.low:
            continue
        kind = (method.shape, *method.precision.values(), method.bias is None)
        if kind not in done:
            done.add(kind)
            _prove(method)
    if done:
        said = "mixquant: deterministic inference: a row has the same bits alone and beside %d, in %d kinds of linear"
        logger.info(said, ROWS - 1, len(done))


def _prove(method: MixQuantLinearMethod) -> None:
    device = method.master.device
    seed = torch.Generator(device).manual_seed(0)
    x = torch.randn(ROWS, method.shape[1], dtype=torch.bfloat16, device=device, generator=seed)
    for role in (Role.PROMPT, Role.PROTECTED):
        whole = method.product(role, method.layer, x, method.bias)
        for part in _PARTS:
            if not torch.equal(method.product(role, method.layer, x[part].contiguous(), method.bias), whole[part]):
                precision = method.precision[role]
                whose = "SGLang's own product" if precision == "bf16" else "its GEMM"
                raise MixQuantError(
                    f"{FLAG}: {method.name} gives a row other bits in {precision} beside {ROWS - 1} rows than "
                    f"beside {part.stop - part.start - 1}: {whose} here depends on the number of rows; leave the flag "
                    "out, and report this GPU and these versions"
                )
