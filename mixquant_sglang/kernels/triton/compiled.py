"""Launches of Triton kernels that were launched before with arguments of the same kind.

Triton looks at each argument to find the compiled kernel, which takes longer than to launch it, and eager passes wait
for their launches. Who launches a kernel here knows what kind its arguments are, and names it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class Compiled:
    """The kernels that one jit function was compiled to, by the names of their kinds."""

    def __init__(self) -> None:
        self._kernels: dict[Hashable, Any] = {}

    def launch(
        self,
        function: Any,
        kind: Hashable,
        pointers: int,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> None:
        """``function[grid](*arguments, *constants, **options)``, in the order of its parameters.

        ``kind``: whatever decides what Triton compiles: device, dtypes, ``constants``, ``options``, which arguments are
        None, and of integers that it specialises whether they are 1 or multiples of 16. ``pointers``: all addresses
        ORed; where one is no multiple of 16, Triton chooses."""
        kernel = None if pointers % 16 else self._kernels.get(kind)
        if kernel is not None:
            kernel[grid](*arguments, *constants)
            return
        kernel = function[grid](*arguments, *constants, **options)
        if pointers % 16 == 0 and hasattr(kernel, "packed_metadata"):  # not where Triton interprets
            self._kernels[kind] = kernel
