"""The ranks that run a model together."""

from __future__ import annotations

from typing import Any


def rank_group() -> Any | None:
    """The CPU process group of all ranks that run this model together; None where there is none."""
    from sglang.srt.distributed import parallel_state

    world = getattr(parallel_state, "_WORLD", None)
    return None if world is None else world.cpu_group


def tensor_parallel_ranks() -> int:
    import torch.distributed
    from sglang.srt.distributed import get_tp_group

    return int(get_tp_group().world_size) if torch.distributed.is_initialized() else 1


def agree(problem: str | None) -> str | None:
    """The first rank's problem of the tensor parallel group, the same on all of its ranks."""
    if tensor_parallel_ranks() == 1:
        return problem
    import torch.distributed
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    found: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(found, problem, group=group.cpu_group)
    return next(filter(None, found), None)
