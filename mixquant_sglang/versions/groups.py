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


def gathers_rows() -> bool:
    """Whether ranks attend to batches of their own, and gather the rows of all for the layers in between (DP
    attention)."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled

    return bool(is_dp_attention_enabled())


def attention_ranks() -> int:
    """Over how many ranks the linears of attention are sharded."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_tp_size)


def over_ranks(value: Any) -> list[Any]:
    """``value`` of each rank that runs a part of the model, in their order: a collective."""
    import torch.distributed

    group = rank_group()
    if group is None or torch.distributed.get_world_size(group) == 1:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def stage_group() -> Any | None:
    """SGLang's GroupCoordinator of the pipeline's stages; None where the model has one."""
    from sglang.srt.distributed import parallel_state

    group = getattr(parallel_state, "_PP", None)
    return None if group is None or group.world_size == 1 else group


def stages() -> int:
    """Of the pipeline that runs the model."""
    group = stage_group()
    return 1 if group is None else int(group.world_size)


def over_stages(value: Any) -> list[Any]:
    """``value`` of each stage of the pipeline, in their order: a collective."""
    import torch.distributed

    group = stage_group()
    if group is None:
        return [value]
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, value, group=group.cpu_group)
    return found


def from_previous_stage() -> Any | None:
    """What a forward pass of this stage takes from the one before it, which is awaited; None in the first stage."""
    group = stage_group()
    if group is None or group.is_first_rank:
        return None
    from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

    return PPProxyTensors(group.recv_tensor_dict())


def to_next_stage(result: Any) -> None:
    """Sends on what ``ModelRunner.forward`` gave in a stage that is not the last."""
    group = stage_group()
    if group is not None and not group.is_last_rank:
        group.send_tensor_dict(result.logits_output.tensors)


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
