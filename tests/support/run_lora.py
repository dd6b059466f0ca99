"""``run_model`` for adapters: three requests in one batch, with the first adapter, with the second, and with none.

A case has ``args`` with ``lora_paths`` (a list of NAME=FOLDER), ``prompts`` (three lists of token ids), ``steps``, and
``save``, the file that log probabilities go to: float32 [steps + 1, 3, vocabulary].

SGLang's LoRA asks for pinned memory, which there is not without a GPU: ``torch`` is told not to pin.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch

from tests.support import run_model


def _unpinned() -> None:
    def without(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return made

    for name in ("tensor", "empty", "zeros", "arange"):
        setattr(torch, name, without(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment,method-assign]


def _requests(runner: Any, case: dict[str, Any]) -> list[Any]:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    from mixquant_sglang.versions.dialect import dialect

    ids = {ref.lora_name: ref.lora_id for ref in runner.lora_manager.lora_refs.values()}
    names = [path.partition("=")[0] for path in case["args"]["lora_paths"]]
    requests = []
    for i, prompt in enumerate(case["prompts"]):
        params = SamplingParams(temperature=0, max_new_tokens=case["steps"])
        lora = {"lora_id": ids[names[i]]} if i < len(names) else {}
        req = Req(str(i), "", array("q", prompt), params, **lora)
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        dialect().set_first_chunk(req, len(prompt))
        requests.append(req)
    return requests


def _load_and_run(case: dict[str, Any]) -> dict[str, Any]:
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs

    from mixquant_sglang.host import runtime

    args = run_model._server_args(case)
    one_batch._set_envs_and_config(args)
    if hasattr(one_batch, "_init_process_global_configs"):
        one_batch._init_process_global_configs()
    bench, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    runner = bench.torch_runner
    run = runtime.current()
    before = run.state() if run else None
    tokens, logits, batch = one_batch.extend(_requests(runner, case), runner)
    kept, chosen = [logits.float().log_softmax(-1)], [[int(token) for token in tokens]]
    for _ in range(case["steps"]):
        tokens, logits = one_batch.decode(tokens, batch, runner)
        kept.append(logits.float().log_softmax(-1))
        chosen.append([int(token) for token in tokens])
    torch.save(torch.stack(kept).cpu(), case["save"])
    kinds = [type(module).__name__ for module in runner.model.modules()]
    return {
        "tokens": chosen,
        "wrapped": sum(kind.endswith("WithLoRA") for kind in kinds),
        "state": before,
        "after": run.state() if run else None,
        "keys": [req.extra_key for req in batch.reqs],
    }


if __name__ == "__main__":
    if not torch.cuda.is_available():
        _unpinned()
    run_model._load_and_run = _load_and_run
    run_model.main()
