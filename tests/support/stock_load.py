"""``python -m tests.support.stock_load FOLDER ...``: the installed SGLang, without the plugin, loads NVFP4 checkpoints
on the CPU as far as its weight loaders go, each in a process of its own, and prints a line for each: digests of the
parameters of its MoE layers.

NVFP4 experts want a Blackwell GPU: the script says that there is one. What SGLang does with the weights after they are
loaded, for its kernels, is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch


class Loaded(BaseException):
    """Carries the model out of SGLang's loader."""


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(data.tolist())).hexdigest()[:16]


def pretend_blackwell() -> None:
    from sglang.srt.layers.quantization import modelopt_quant
    from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors
    from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4_moe as moe

    for module in (modelopt_quant, moe, compressed_tensors):
        for name in ("is_blackwell_supported", "is_sm100_supported"):
            if hasattr(module, name):
                setattr(module, name, lambda *_args: True)
        if hasattr(module, "get_platform"):
            module.get_platform = lambda: SimpleNamespace(is_blackwell=True, is_sm100=True)
    compressed_tensors.CompressedTensorsConfig._check_scheme_supported = lambda *_args, **_kwargs: True
    modelopt_quant.swizzle_blockscale = lambda scale: scale.data  # for its kernels


def stop_after_loading() -> None:
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_loader import loader

    # of SGLang's CPU engine, which is not meant here
    model_runner.adjust_config_with_unaligned_cpu_tp = lambda config, *_: config

    def load(model: Any, weights: Any, *_: Any, **__: Any) -> None:
        model.load_weights(weights)
        raise Loaded(model)

    loader.DefaultModelLoader.load_weights_and_postprocess = staticmethod(load)


def load(folder: str) -> Any:
    os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", SGLANG_PLUGINS="")
    import sglang.srt.managers.scheduler  # noqa: F401
    from sglang.benchmark import one_batch
    from sglang.srt.layers.rotary_embedding import base as rotary
    from sglang.srt.server_args import PortArgs, ServerArgs

    rotary._is_cpu = True
    pretend_blackwell()
    stop_after_loading()
    args = ServerArgs(
        model_path=folder,
        device="cpu",
        attention_backend="triton",
        disable_cuda_graph=True,
        max_total_tokens=2000,
        skip_tokenizer_init=True,
        disable_radix_cache=True,  # of hybrid models it wants a GPU
        nccl_port=random.Random().randrange(20000, 32000),
    )
    torch.set_num_threads(1)
    if hasattr(one_batch, "publish"):  # 0.5.23
        args.resolve_once()
        ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
        one_batch.publish(args, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
    try:
        one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    except Loaded as done:
        return done.args[0]
    raise RuntimeError("SGLang did not load the weights")


def main() -> None:
    """Imports SGLang once: that takes longer than the loading."""
    import sglang.benchmark.one_batch
    import sglang.srt.managers.scheduler  # noqa: F401

    for folder in sys.argv[1:]:
        child = os.fork()
        if not child:
            show(folder)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(f"FAILED {folder}", flush=True)


def show(folder: str) -> None:
    model = load(folder)
    found = {
        name: [
            type(module.quant_method).__name__,
            {n: [list(p.shape), digest(p)] for n, p in module.named_parameters()},
        ]
        for name, module in model.named_modules()
        if hasattr(module, "moe_runner_config") and hasattr(module, "num_local_experts")
    }
    print("LOADED " + json.dumps(found))


if __name__ == "__main__":
    main()
