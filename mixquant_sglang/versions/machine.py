"""The machine that SGLang runs on, the SGLang that is installed, and whether the tests ran with both."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version

from mixquant_sglang.recipe.select import Device

NAME = "mixquant"
# SGLang version -> the kinds of device on which the tests ran with it.
TESTED: dict[str, tuple[str, ...]] = {"0.5.17": ("CPU", "GPU"), "0.5.23": ("CPU", "GPU")}
# Set by the process that parsed the server arguments, inherited by the schedulers that it spawns.
ACTIVE_ENV = "MIXQUANT_ACTIVE"
# Of the same process: --disaggregation-mode of a server that has one, "prefill" or "decode".
DISAGGREGATION_ENV = "MIXQUANT_DISAGGREGATION"
# Of the same process: a digest of what its recipe asks.  A file may be another one by the time that others read it.
ASKED_ENV = "MIXQUANT_ASKED"
# Of the same process: "1" where it resolved --enable-deterministic-inference.
DETERMINISTIC_ENV = "MIXQUANT_DETERMINISTIC"
TOLD = (ACTIVE_ENV, DISAGGREGATION_ENV, ASKED_ENV, DETERMINISTIC_ENV)  # all of these


def sglang_version() -> str:
    return version("sglang")


def untested(device: Device) -> str:
    """What is to be known before one relies on this SGLang on ``device``; empty where the tests ran."""
    found, kind = sglang_version(), "CPU" if device.capability is None else "GPU"
    on_kind = [f"SGLang {version}" for version, kinds in TESTED.items() if kind in kinds]
    if found not in TESTED:
        return f"SGLang {found}: not tested; on a {kind}, tested with {' and '.join(on_kind)}"
    if kind not in TESTED[found]:
        return f"SGLang {found}: tested on {' and '.join(TESTED[found])} only; on a {kind}, {' and '.join(on_kind)}"
    return ""


def is_scheduler_process() -> bool:
    """Whether this process was spawned to run a model for a launcher that asked for mixquant."""
    return os.environ.get(ACTIVE_ENV) == "1" and "sglang.srt.managers.scheduler" in sys.modules


def disaggregation() -> str:
    """The half of a prefill/decode pair that this server is: "prefill" or "decode"; "" for one that does both."""
    return os.environ.get(DISAGGREGATION_ENV, "")


def deterministic() -> bool:
    """Whether a request's tokens are not to depend on what else is in its batch."""
    return os.environ.get(DETERMINISTIC_ENV) == "1"


def device() -> Device:
    """The GPU that this process serves from, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Device("this CPU", None)
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def repacks_weights() -> bool:
    """Whether SGLang puts weights into the layout of a CPU's matrix units (AMX) once they are loaded, as its build for
    CPUs does on some."""
    from sglang.srt.utils import cpu_has_amx_support

    return bool(cpu_has_amx_support())


def kernel_versions() -> dict[str, str]:
    """Of what SGLang ships its GEMMs in; needs a GPU."""
    import sgl_kernel

    return {"sgl_kernel": str(sgl_kernel.__version__)}


def allow_cpu() -> None:
    """Lets SGLang build rotary embeddings on a machine without an accelerator and without its CPU engine.

    ``RotaryEmbedding.__init__`` imports a vLLM kernel there that it never calls; the module constant is read at that
    one place (``layers/rotary_embedding/base.py``).
    """
    import torch

    accelerators = [torch.cuda.is_available()]
    accelerators += [getattr(torch, name).is_available() for name in ("xpu", "npu") if hasattr(torch, name)]
    if any(accelerators):
        return
    import sglang.srt.layers.rotary_embedding.base as rotary

    rotary._is_cpu = True


def hush_unknown_method_warning() -> None:
    """Drops SGLang's warning that a quantization method outside its own list "is not fully optimized yet"."""
    logging.getLogger("sglang.srt.configs.model_config").addFilter(
        lambda record: not record.getMessage().startswith(f"{NAME} quantization is not fully optimized")
    )


def memory() -> float:
    """Bytes of the machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
