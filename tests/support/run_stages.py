"""Runs models as one stage of a pipeline of two, as ``run_model`` does alone; the other process is the other stage.

    python -m tests.support.run_stages '[CASE, ...]' RANK PORT

Both print one line of JSON for each case.  Tokens and bits of the last stage are the model's, those of the first are of
zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from tests.support import run_model

STAGES = 2


def _staged(forward: Callable[..., Any], vocabulary: int, forward_batch: Any, **kwargs: Any) -> Any:
    """Awaits what the stage before this one gives, and hands on what this one does."""
    from mixquant_sglang.versions import groups

    result = forward(forward_batch, pp_proxy_tensors=groups.from_previous_stage(), **kwargs)
    groups.to_next_stage(result)
    if run_model.RANK == STAGES - 1:
        return result
    none = torch.zeros(len(forward_batch.seq_lens), vocabulary)
    return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=none))


def _sampled(logits_output: Any, _forward_batch: Any) -> torch.Tensor:
    """The likeliest tokens of the last stage, in all."""
    from mixquant_sglang.versions import groups

    tokens: list[int] = groups.over_stages(logits_output.next_token_logits.argmax(-1).tolist())[-1]
    return torch.tensor(tokens)


def _loaded(load: Callable[..., Any], *args: Any) -> Any:
    bench, tokenizer = load(*args)
    runner = bench.torch_runner
    runner.forward = partial(_staged, runner.forward, runner.model_config.vocab_size)
    runner.sample = _sampled
    return bench, tokenizer


def main() -> None:
    rank, port = int(sys.argv[2]), int(sys.argv[3])
    run_model.take_part(rank, port)
    from sglang.benchmark import one_batch
    from sglang.srt.distributed import parallel_state

    # gloo alone: SGLang builds NCCL's communicator of stages on a CPU too, where it cannot be
    make_group = parallel_state.init_model_parallel_group
    parallel_state.init_model_parallel_group = partial(make_group, use_pynccl=False)
    one_batch.load_model = partial(_loaded, one_batch.load_model)
    if hasattr(one_batch, "ParallelState"):  # 0.5.17 hands ranks to the model runner
        state = one_batch.ParallelState
        one_batch.ParallelState = lambda **given: state(**{**given, "pp_rank": rank, "pp_size": STAGES})
    sys.argv = sys.argv[:2]
    run_model.main()


if __name__ == "__main__":
    main()
