"""Runs models in this process, one after another, as a scheduler would load and run them.

    python -m tests.support.run_model '[{"model": PATH, "recipe": NAME|FILE, "past": N}, ...]'

Prints one line of JSON for each.  Without a recipe: plain SGLang.  ``past``: Qwen's MLP multiplies by the weight of
``gate_up_proj`` itself, in passes of at most N rows.  A start that ends gives ``{"refused": why}``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROMPT = [random.Random(3).randrange(10, 90) for _ in range(37)]


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _generate(one_batch: Any, runner: Any, steps: int) -> list[list[float]]:
    """Greedy: of each step the token and the log probability that it had."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    req = Req("0", "", array("q", PROMPT), SamplingParams(temperature=0, max_new_tokens=steps))
    req.full_untruncated_fill_ids = req.origin_input_ids
    req.logprob_start_len = -1
    if hasattr(req, "set_extend_range"):
        req.set_extend_range(0, len(PROMPT))
    else:
        req.extend_end = len(PROMPT)
    token, logits, batch = one_batch.extend([req], runner)
    out = []
    for _ in range(steps):
        out.append([int(token[0]), float(logits.float().log_softmax(-1)[0, int(token[0])])])
        token, logits = one_batch.decode(token, batch, runner)
    return out


@contextmanager
def _multiplied_past(rows: int) -> Iterator[None]:
    import torch
    from sglang.srt.models.qwen2 import Qwen2MLP

    forward = Qwen2MLP.forward

    def past(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.shape[0] > rows:
            return forward(self, x, *args, **kwargs)
        return self.down_proj(self.act_fn(torch.nn.functional.linear(x, self.gate_up_proj.weight)))[0]

    Qwen2MLP.forward = past
    try:
        yield
    finally:
        Qwen2MLP.forward = forward


def _server_args(case: dict[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=case["model"],
        quantization="mixquant" if case.get("recipe") else None,
        dtype="bfloat16",
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        max_total_tokens=4096,
        random_seed=1,
        skip_tokenizer_init=True,
        nccl_port=_free_port(),
    )
    if hasattr(args, "resolve_once"):  # 0.5.23
        from sglang.srt import runtime_context

        args.resolve_once()
        runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0))
    return args


def _run(case: dict[str, Any]) -> dict[str, Any]:
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs

    from mixquant_sglang.host import runtime

    log = _Lines()
    logging.getLogger("mixquant_sglang").addHandler(log)
    runtime._runtime = None
    os.environ["MIXQUANT_RECIPE"] = case.get("recipe") or "auto"
    try:
        args = _server_args(case)
        one_batch._set_envs_and_config(args)
        if hasattr(one_batch, "_init_process_global_configs"):
            one_batch._init_process_global_configs()
        with _multiplied_past(case.get("past", 0)):
            bench, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
            runner = bench.torch_runner
            pools = runner.req_to_token_pool, runner.token_to_kv_pool_allocator
            out: dict[str, Any] = {"class": type(runner.model).__name__, "free": [p.available_size() for p in pools]}
            run = runtime.current()
            out["state"] = run.state() if run else None
            out["tokens"] = _generate(one_batch, runner, 6)
            out["after"] = run.state() if run else None
    except SystemExit as refused:
        out = {"refused": str(refused)}
    finally:
        logging.getLogger("mixquant_sglang").removeHandler(log)
    return out | {"log": log.lines}


def _end_groups() -> None:
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_resources

    get_resources().expert_location_metadata = None
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def main() -> None:
    import sglang.srt.managers.scheduler  # noqa: F401  # tells the plugin that this process runs a model
    import torch
    from sglang.benchmark import one_batch

    from mixquant_sglang.host import plugin
    from mixquant_sglang.host.hooks import registry
    from mixquant_sglang.versions import machine

    torch.set_num_threads(1)
    logging.getLogger("mixquant_sglang").setLevel(logging.INFO)
    os.environ["MIXQUANT_ACTIVE"] = "1"
    plugin.register()
    registry.apply_hooks()
    plugin.offer_name()
    machine.allow_cpu()
    one_batch.get_tokenizer = lambda *_args, **_kwargs: None
    one_batch.suppress_other_loggers = lambda: None
    for case in json.loads(sys.argv[1]):
        print(json.dumps(_run(case)), flush=True)
        _end_groups()
    os._exit(0)


if __name__ == "__main__":
    main()
