"""A real ``ModelRunner`` on the CPU with the plugin in this process: what a scheduler has, without a server.

For scripts that tests run, since the hooks stay in the process.  It is built as ``sglang.benchmark.one_batch`` does.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch


def build(model: Path, recipe: str, **more: Any) -> Any:
    os.environ.update(MIXQUANT_ACTIVE="1", MIXQUANT_RECIPE=recipe, TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
    import sglang.srt.managers.scheduler  # noqa: F401  (makes this a scheduler process for the plugin)
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, ServerArgs

    load_plugins()
    args = ServerArgs(
        model_path=str(model),
        quantization="mixquant",
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        max_total_tokens=2000,
        nccl_port=random.Random().randrange(20000, 32000),
        **more,
    )
    if hasattr(one_batch, "publish"):  # 0.5.23
        args.resolve_once()
        ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
        one_batch.publish(args, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return runner.torch_runner


def answer(runner: Any, length: int = 40) -> list[torch.Tensor]:
    """Logits after a prompt, and after one decode step."""
    from sglang.benchmark import one_batch

    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    reqs = one_batch.prepare_synthetic_inputs_for_latency_test(1, length, [list(range(20, 20 + length))])
    token, first, batch = one_batch.extend(reqs, runner)
    _, second = one_batch.decode(token, batch, runner)
    return [first.clone(), second.clone()]
