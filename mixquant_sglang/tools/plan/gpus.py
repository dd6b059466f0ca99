"""The GPUs that ``mixquant plan`` knows: peaks and sizes from data sheets, rates from ``rates.py``. Unknown names are
refused. Tags in the comments: as in ``rates.py``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import did_you_mean, nearest, show
from mixquant_sglang.tools.plan.rates import H100_RATES, H200_RATES, RTX5090_RATES, RTXPRO_RATES, SM100_RATES, Rates


@dataclass(frozen=True)
class Gpu:
    """``tflops``: dense peak with FP32 accumulation, by precision (none for nvfp4 before Blackwell). ``bandwidth``,
    ``link``: bytes/s, ``link`` to the other GPUs of the host, one way. ``memory``: bytes. ``chunk``: prefill tokens of
    a pass, as SGLang 0.5.17 chooses by memory (srt/server_args.py). ``origin``: one line for the user."""

    name: str
    aliases: tuple[str, ...]
    capability: tuple[int, int]
    tflops: Mapping[str, float]
    bandwidth: float
    memory: float
    link: float
    chunk: int
    rates: Rates
    origin: str


_FROM_H200 = "GEMM, attention, memory and overhead rates measured on an H200 by this project"
_CARRIED = "memory rates and overheads carried over from our H200"

# Peaks and bandwidths: [datasheet]. Links: NVLink 4 and 5, one way; the RTX cards PCIe 5.0 x16.
GPUS: tuple[Gpu, ...] = (
    Gpu(
        name="H100",
        aliases=("H100 SXM", "H100 SXM5", "H100 80GB HBM3"),
        capability=(9, 0),
        tflops={"bf16": 989.4, "fp8": 1978.9},
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        chunk=8192,
        rates=H100_RATES,
        origin="peaks from the H100 SXM data sheet; GEMM rates measured on an H100 by this project; attention, memory, "
        "expert and overhead rates on an H200 (the same chip), carried over as fractions",
    ),
    Gpu(
        name="H200",
        aliases=("H200 SXM",),
        capability=(9, 0),
        tflops={"bf16": 989.4, "fp8": 1978.9},
        bandwidth=4.8e12,
        memory=141e9,
        link=450e9,
        chunk=8192,
        rates=H200_RATES,
        origin=f"peaks from the H200 data sheet; {_FROM_H200}",
    ),
    Gpu(
        name="B200",
        aliases=("B200 SXM", "GB200"),
        capability=(10, 0),
        tflops={"bf16": 2250.0, "fp8": 4500.0, "nvfp4": 9000.0},
        bandwidth=8.0e12,
        memory=180e9,
        link=900e9,
        chunk=16384,
        rates=SM100_RATES,
        origin=f"peaks from the DGX B200 data sheet; GEMM rates published by vLLM developers; {_CARRIED}",
    ),
    Gpu(
        name="GB300",
        aliases=("B300",),
        capability=(10, 3),
        tflops={"bf16": 2500.0, "fp8": 5000.0, "nvfp4": 15000.0},  # GB300 NVL72 data sheet over 72
        bandwidth=8.0e12,
        memory=279e9,
        link=900e9,
        chunk=16384,
        rates=SM100_RATES,
        origin=f"peaks from the GB300 NVL72 data sheet; GEMM fractions assumed equal to the B200's; {_CARRIED}",
    ),
    Gpu(
        name="RTX 5090",
        aliases=("5090", "GeForce RTX 5090"),
        capability=(12, 0),
        tflops={"bf16": 209.5, "fp8": 419.0, "nvfp4": 1676.0},  # RTX Blackwell white paper, FP32 accumulation
        bandwidth=1.792e12,
        memory=32e9,
        link=64e9,
        chunk=2048,
        rates=RTX5090_RATES,
        origin="peaks from the RTX Blackwell white paper; BF16 and FP8 GEMM and attention rates published by 5090 "
        f"owners; NVFP4 GEMM rate derived from these; {_CARRIED}",
    ),
    Gpu(
        name="RTX PRO 6000",
        aliases=("RTX PRO 6000 Blackwell", "RTX PRO 6000 Blackwell Workstation Edition"),
        capability=(12, 0),
        tflops={"bf16": 503.8, "fp8": 1007.6, "nvfp4": 2015.2},  # RTX PRO Blackwell white paper
        bandwidth=1.792e12,
        memory=96e9,
        link=64e9,
        chunk=8192,
        rates=RTXPRO_RATES,
        origin=f"peaks from the RTX PRO Blackwell white paper; all GEMM and attention rates assumed; {_CARRIED}",
    ),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name or alias; case, spaces, dashes and ``NVIDIA`` do not count. MixQuantError lists them."""
    known = {_plain(alias): gpu for gpu in GPUS for alias in (gpu.name, *gpu.aliases)}
    found = known.get(_plain(name).removeprefix("nvidia"))
    if found:
        return found
    names = [gpu.name for gpu in GPUS]
    near = [known[word].name for word in nearest(_plain(name), known)]
    raise MixQuantError(f"--gpu: unknown GPU {show(name)}; known: {', '.join(names)}{did_you_mean(near)}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
