"""``run_model`` with sums in float64, whose order does not show in BF16: rows do not depend on how many share a GEMM.

    python -m tests.support.run_blocks '[{"model": PATH, "recipe": NAME|FILE}, ...]'

Each result has ``rows`` too: of each call of the last layer's MLP or experts in prefill, where rows may be picked for
them, how many they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from tests.support import run_model


def _sum_exactly() -> None:
    linear, matmul = F.linear, torch.Tensor.__matmul__

    def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        wide = linear(x.double(), weight.double(), None if bias is None else bias.double())
        return wide.to(x.dtype)

    def exact_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return matmul(x.double(), y.double()).to(x.dtype)

    F.linear = exact_linear
    torch.Tensor.__matmul__ = exact_matmul  # type: ignore[assignment, method-assign]


@contextmanager
def _counting() -> Iterator[list[int]]:
    from mixquant_sglang.layers import last_layer
    from mixquant_sglang.passes.running import current
    from mixquant_sglang.recipe.roles import Role

    rows: list[int] = []
    plain = last_layer.ReadRowsBlock

    class Counted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, block: Any) -> None:
            super().__init__(block)
            forward = self._forward

            def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if current().role is not Role.DECODE:
                    rows.append(len(x))
                return forward(x, *args, **kwargs)

            self._forward = counted

    last_layer.ReadRowsBlock = Counted  # type: ignore[misc]
    try:
        yield rows
    finally:
        last_layer.ReadRowsBlock = plain  # type: ignore[misc]


def main() -> None:
    _sum_exactly()
    run = run_model._run

    def counted(case: dict[str, Any]) -> dict[str, Any]:
        with _counting() as rows:
            return run(case) | {"rows": rows}

    run_model._run = counted
    run_model.main()


if __name__ == "__main__":
    main()
