"""Runs models in this process, one after another, as a scheduler would load and run them.

    python -m tests.support.run_model '[{"model": PATH, "recipe": NAME|FILE, ...}, ...]' [FIRST]

Prints one line of JSON for each, from case FIRST on.  A case may have

* ``recipe``: without one the model is plain SGLang's
* ``past``: Qwen's MLP multiplies by the weight of ``gate_up_proj`` itself, in passes of at most this many rows
* ``prompts``: the lengths of prompts that are prefilled together
* ``args``: more of SGLang's arguments; ``env``: of its environment, while this model is there
* ``image``: of the first prompt, or of the first ``prompts``, whose first tokens are the image's: ``tokens``, how many;
  ``feature``, the shape of its pixels; where the model asks for them ``grid``, or ``patches``, rows and columns whose
  places it is told.  With other pixels the bits of the first pass are ``other_image``
* ``steps``: decode steps; ``policy``: generates again, with requests that ask for BF16 prefill
* ``fp32_sums``: BF16 linears are FP32 sums, rounded once (fp32_sums.py)
* ``survive``: an error is the case's result, and the next one goes on

With ``TRITON_INTERPRET=1`` Triton kernels run on a CPU, and with them families that have no other code there.

A start that ends gives ``{"refused": why}``, an error ``{"error": why}``.  After an error of CUDA, which leaves nothing
to go on with, the process ends with status 3.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import re
import sys
import traceback
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from tests.support.fp32_sums import fp32_sums
from tests.support.processes import free_port

PROMPT = 37
STEPS = 6
BROKEN = 3
RANK = 0  # among those that run the model together (run_stages.py)
BF16 = {"mixquant": {"prefill": "bf16"}}
# What SGLang's own code raises where a model does not run.
ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, LookupError, ImportError, OSError)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _bits(tensor: Any) -> str:
    import torch

    return hashlib.sha256(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _show(req: Any, image: dict[str, Any]) -> None:
    """As SGLang's processors leave a request: pixels, and a number made from them in place of each image token."""
    import torch
    from sglang.srt.managers import mm_utils
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

    mm_utils.init_mm_embedding_cache(1 << 20)  # anew, so that each request runs the tower
    pixels = torch.randn(image["feature"], generator=torch.Generator().manual_seed(image.get("seed", 1))).to(
        torch.bfloat16
    )
    more = {"image_grid_thw": torch.tensor([image["grid"]])} if "grid" in image else {}
    if "patches" in image:
        more["image_position_ids"] = torch.cartesian_prod(*map(torch.arange, image["patches"])).flip(-1)[None]
    item = MultimodalDataItem(
        modality=Modality.IMAGE, feature=pixels, offsets=[(1, image["tokens"])], model_specific_data=more
    )
    item.set_pad_value()
    length = len(req.origin_input_ids)
    inputs = MultimodalInputs(mm_items=[item])
    if "grid" in image:
        inputs.mrope_positions = torch.arange(length).expand(3, length).clone()
        inputs.mrope_position_delta = torch.zeros(1, 1, dtype=torch.int64)
    req.multimodal_inputs = inputs
    for place in range(1, image["tokens"] + 1):
        req.origin_input_ids[place] = item.pad_value


def _requests(lengths: list[int], custom: dict[str, Any] | None, image: dict[str, Any] | None = None) -> list[Any]:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    requests = []
    for i, length in enumerate(lengths):
        ids = random.Random(3 + i)
        prompt = array("q", (ids.randrange(10, 90) for _ in range(length)))
        params = SamplingParams(temperature=0, max_new_tokens=STEPS, custom_params=custom)
        req = Req(str(i), "", prompt, params)
        if image and i < image.get("prompts", 1):
            _show(req, image)
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        if hasattr(req, "set_extend_range"):
            req.set_extend_range(0, length)
        else:
            req.extend_end = length
        requests.append(req)
    return requests


def _generate(one_batch: Any, runner: Any, requests: list[Any], steps: int) -> dict[str, Any]:
    """Greedy: of each step the first request's token with the log probability that it had, and the bits of all logits;
    of a model that generates nothing the embeddings."""
    for pool in (runner.req_to_token_pool, runner.token_to_kv_pool_allocator):
        pool.clear()
    if not runner.is_generation:
        return _embed(runner, requests)
    tokens, logits, batch = one_batch.extend(requests, runner)
    out: dict[str, Any] = {"tokens": [], "bits": []}
    for step in range(steps + 1):
        first = int(tokens[0])
        out["tokens"].append([first, float(logits.float().log_softmax(-1)[0, first])])
        out["bits"].append(_bits(logits))
        if not logits.isfinite().all():
            raise ValueError(f"logits of step {step} are not finite")
        if step < steps:
            tokens, logits = one_batch.decode(tokens, batch, runner)
    return out


def _embed(runner: Any, requests: list[Any]) -> dict[str, Any]:
    import torch

    from mixquant_sglang.versions import batches

    prompts = [(req.origin_input_ids, len(req.origin_input_ids)) for req in requests]
    with torch.no_grad():
        _, forward = batches.prefill_batch(prompts, runner)
        pooled = runner.forward(forward).logits_output.embeddings
    return {"tokens": [row[:8] for row in pooled.float().tolist()], "bits": [_bits(pooled)]}


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


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _server_args(case: dict[str, Any]) -> Any:
    import torch
    from sglang.srt.server_args import ServerArgs

    device = {"device": "cuda"} if torch.cuda.is_available() else {"device": "cpu", "attention_backend": "torch_native"}
    given = {
        **device,
        "disable_cuda_graph": True,
        "max_total_tokens": 4096,
        "max_running_requests": 8,
        **case.get("args", {}),
    }
    args = ServerArgs(
        model_path=case["model"],
        quantization="mixquant" if case.get("recipe") else None,
        dtype="bfloat16",
        random_seed=1,
        skip_tokenizer_init=True,
        nccl_port=free_port(),
        **given,
    )
    if hasattr(args, "resolve_once"):  # 0.5.23
        from sglang.srt import runtime_context

        args.resolve_once()
        if "lora_paths" in given:
            args.check_server_args()
        runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=RANK, gpu_id=0))
    elif "lora_paths" in given:  # which a launcher calls
        args.check_server_args()
    return args


def _low(model: Any) -> dict[str, dict[str, int]]:
    """Linears that are low in prefill, by precision: names with N for the numbers -> how many."""
    from mixquant_sglang.host import report
    from mixquant_sglang.recipe.roles import Role

    out: dict[str, Counter[str]] = {}
    for name, method in report.linears(model):
        precision = method.precision[Role.PROMPT]
        if precision != "bf16":
            out.setdefault(precision, Counter())[re.sub(r"\b\d+\b", "N", name)] += 1
    return {precision: dict(names) for precision, names in out.items()}


def _load_and_run(case: dict[str, Any]) -> dict[str, Any]:
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs

    from mixquant_sglang.host import runtime

    args = _server_args(case)
    one_batch._set_envs_and_config(args)
    if hasattr(one_batch, "_init_process_global_configs"):
        one_batch._init_process_global_configs()
    with _multiplied_past(case.get("past", 0)), fp32_sums(case.get("fp32_sums", False)):
        bench, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
        runner = bench.torch_runner
        pools = runner.req_to_token_pool, runner.token_to_kv_pool_allocator
        out: dict[str, Any] = {"class": type(runner.model).__name__, "free": [p.available_size() for p in pools]}
        run, lengths, steps = runtime.current(), case.get("prompts", [PROMPT]), case.get("steps", STEPS)
        image = case.get("image")
        out["state"], out["low"] = run.state() if run else None, _low(runner.model)
        out |= _generate(one_batch, runner, _requests(lengths, None, image), steps)
        out["after"] = run.state() if run else None
        if image:
            other = _requests(lengths, None, {**image, "seed": 2})
            out["other_image"] = _generate(one_batch, runner, other, 0)["bits"][0]
        if case.get("policy"):
            out["policy"] = _generate(one_batch, runner, _requests(lengths, BF16, image), steps)
    return out


def _run(case: dict[str, Any]) -> dict[str, Any]:
    from triton.errors import TritonError

    from mixquant_sglang.host import runtime

    log = _Lines()
    logging.getLogger("mixquant_sglang").addHandler(log)
    runtime._runtime = None
    try:
        with _environment({"MIXQUANT_RECIPE": case.get("recipe") or "auto", **case.get("env", {})}):
            out = _load_and_run(case)
    except SystemExit as refused:
        out = {"refused": str(refused)}
    except (*ERRORS, TritonError) as error:
        if not case.get("survive"):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        out = {"error": f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})", "trace": _trace(error)}
    finally:
        logging.getLogger("mixquant_sglang").removeHandler(log)
    return out | {"log": log.lines}


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-4000:]


def _end_groups() -> None:
    import torch
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_resources

    get_resources().expert_location_metadata = None
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_part(rank: int, first_port: int) -> None:
    """This process is one of several that run the model together, the first of which listens on the port of a case."""
    global RANK, free_port
    from sglang.srt import server_args

    RANK = rank
    ports = count(first_port)  # another one for each case: the last one may not be free yet
    free_port = lambda: next(ports)  # noqa: E731
    if rank and hasattr(server_args, "wait_port_available"):  # until nobody listens
        server_args.wait_port_available = lambda *_args, **_kwargs: True


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreted

        interpreted.prepare()
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
    for case in json.loads(sys.argv[1])[int(sys.argv[2]) if len(sys.argv) > 2 else 0 :]:
        result = _run(case)
        print(json.dumps(result), flush=True)
        if "CUDA error" in result.get("error", ""):
            sys.stderr.flush()
            os._exit(BROKEN)
        _end_groups()
    os._exit(0)


if __name__ == "__main__":
    main()
