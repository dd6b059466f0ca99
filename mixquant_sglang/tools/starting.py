"""What SGLang finds wrong only once it starts: paths, numbers, packages and devices that flags ask for.

Each line says what the server would end with.  Not looked at: what a hub holds, ports that are taken, memory, weights.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixquant_sglang.versions import v0_5_17
from mixquant_sglang.versions.dialect import dialect

_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?|\w+://.*")  # "a/b" may be a name there too
_LEAST_ONE = ("max_running_requests", "max_total_tokens")
_PORTS = ("port", "nccl_port")
# What moves keys and values of a pair: SGLang's name -> the module that it imports.
_TRANSFER = {"nixl": "nixl._api", "mooncake": "mooncake.engine", "mooncake_tcp": "mooncake.engine"}
_TRANSFER_LIMIT_S = 60


@dataclass(frozen=True)
class NotOnCpu:
    """A field of the resolved arguments that ends a server on a CPU where ``ends`` says so of its value."""

    field: str
    ends: Callable[[Any], bool]
    why: str


_GPU_ATTENTION = ("flashinfer", "fa3", "fa4", "trtllm_mha", "trtllm_mla", "cutlass_mla", "flashmla")
_NOT_ON_CPU = (
    NotOnCpu("attention_backend", lambda v: v in _GPU_ATTENTION, "its kernels need a GPU; torch_native needs none"),
    NotOnCpu("enable_hierarchical_cache", bool, "it copies keys and values between a GPU and the host"),
    NotOnCpu("page_size", lambda v: v is not None and v > 1, "pages are handed out by a kernel that needs a GPU"),
    NotOnCpu("speculative_algorithm", lambda v: v and dialect() is v0_5_17, "drafts are verified by kernels for a GPU"),
)


def no_gpu(device: str | None) -> str:
    """The line of a server that is asked to run on a GPU where torch sees none; "" if it is not, or there is one."""
    import torch

    if device is None or device.partition(":")[0] != "cuda" or torch.cuda.is_available():
        return ""
    return "SGLang: --device cuda: torch sees no GPU here (is there a driver?); --device cpu needs none"


def lines(server_args: Any, lora_paths: Sequence[Any]) -> list[str]:
    """All of them, for arguments that are resolved; ``lora_paths`` as they were given."""
    args = dialect().resolved(server_args)
    found = (_packages(args), _paths(args, lora_paths), _numbers(args), _cpu(args))
    return [f"SGLang: {line}" for each in found for line in each]


def _packages(args: Any) -> Iterator[str]:
    if args.use_ray and not args.smg_grpc_mode and find_spec("ray") is None:
        yield "Ray is required for --use-ray mode. Install it with: pip install 'sglang[ray]'"
    if args.smg_grpc_mode and find_spec("smg_grpc_servicer") is None:
        yield "--smg-grpc-mode needs a package: pip install smg-grpc-servicer"
    module = _TRANSFER.get(args.disaggregation_transfer_backend)
    if str(args.disaggregation_mode) != "null" and module is not None and (why := _fails(module)):
        yield f"--disaggregation-transfer-backend {args.disaggregation_transfer_backend}: {why}"


def _fails(module: str) -> str:
    """Why a process of this environment cannot import ``module``; "" if it can.  Found here it may lack a library."""
    try:
        if find_spec(module.partition(".")[0]) is None:
            return f"No module named '{module.partition('.')[0]}'"
        command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TRANSFER_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"import {module} takes more than {_TRANSFER_LIMIT_S} s"
    return (done.stderr.strip().splitlines() or [f"import {module} ends"])[-1] if done.returncode else ""


def _paths(args: Any, lora_paths: Sequence[Any]) -> Iterator[str]:
    from sglang.srt.parser.conversation import chat_template_exists

    template = args.chat_template
    if template is not None and not chat_template_exists(template) and not Path(template).exists():
        yield f"--chat-template {template} is neither a file here nor a template of SGLang's"
    named = [("--tokenizer-path", args.tokenizer_path)]
    named += [("--lora-paths", _lora_path(each)) for each in lora_paths]
    for flag, path in named:
        if path and not os.path.lexists(path) and _ON_HUB.fullmatch(path) is None:
            yield f"{flag} {path} does not exist"
    for field in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(args, field, None)
        if path and not Path(path).is_file():
            yield f"{_flag(field)} {path} does not exist"


def _lora_path(given: Any) -> str:
    """Of ``PATH``, ``NAME=PATH``, ``{"lora_name": ..., "lora_path": ...}`` and SGLang's record of one."""
    if isinstance(given, str):
        return given.partition("=")[2] or given
    return str(given.get("lora_path", "") if isinstance(given, dict) else getattr(given, "lora_path", ""))


def _numbers(args: Any) -> Iterator[str]:
    for field in _LEAST_ONE:
        value = getattr(args, field)
        if value is not None and value < 1:
            yield f"{_flag(field)} {value}; allowed: 1 and more"
    for field in _PORTS:
        value = getattr(args, field)
        if value is not None and not 0 <= value < 2**16:
            yield f"{_flag(field)} {value}; allowed: up to 65535"


def _cpu(args: Any) -> Iterator[str]:
    from sglang.srt.utils.common import cpu_has_amx_support

    if args.device != "cpu" or cpu_has_amx_support():  # SGLang has more for the latter
        return
    for each in _NOT_ON_CPU:
        value = getattr(args, each.field)
        if each.ends(value):
            yield f"{_flag(each.field)}{'' if value is True else f' {value}'} does not go on a CPU: {each.why}"


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
