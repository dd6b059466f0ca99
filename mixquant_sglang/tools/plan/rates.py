"""What kernels reach, as fractions of datasheet peaks, so that a GPU without a measurement can borrow one; each with
its source. Tags in the comments:

- [datasheet] NVIDIA's data sheet or architecture white paper, dense (no sparsity) figures;
- [H200], [H100] measured by this project on one: SGLang 0.5.17, torch 2.11.0, Qwen3-8B's dimensions if none are named,
  FA3, CUDA graphs on; servers, passes, protected rows and our kernels anew on 2026-11-21, the rest in an earlier run;
- [public] measured by others and published, named beside it;
- [assumed] nobody measured it for us: carried over from the GPU named, or a guess that says so.

Nothing here was chosen by looking at Mix-Quant's RTX 5090 figures; they are a test of the planner, not its input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

Curve = tuple[tuple[int, float], ...]  # (rows M, fraction of peak), M rising; between them linear in log M


@dataclass(frozen=True)
class Sourced:
    """A curve and where it comes from, in words for the user: "measured ..." or "predicted: ..."."""

    curve: Curve
    source: str


@dataclass(frozen=True)
class ExpertRates:
    """Of mixtures of experts: ``gemm`` of our kernels by precision, ``stock`` where SGLang's own server runs another,
    both over rows for each expert. ``read``: share of the bandwidth at which few rows read the weights of a precision.
    ``move``: of the bandwidth, for the caches of a row for each token and expert. ``block_us``: launches beyond
    those, for each block in a pass of its own (protected rows) or in a decode step."""

    gemm: Mapping[str, Sourced]
    stock: Mapping[str, Sourced]
    read: Mapping[str, float]
    move: float
    block_us: float


@dataclass(frozen=True)
class Rates:
    """Fractions of datasheet peaks (``gemm`` and ``attention``: of FLOP/s; others: of bytes/s) and microseconds."""

    gemm: Mapping[str, Curve]  # precision -> curve; attention and what is emulated run at BF16, NVFP4 at "qdq" if there
    stock_gemm: Mapping[str, Curve]  # where SGLang's own server runs another GEMM than ours
    attention: float  # over pages of one token
    gathered: Curve  # over keys and values gathered out of them, by the mean keys of a query; empty: nothing is
    gather_us: float  # ... and in each layer of such a pass, beside the bytes that are copied
    windowed: float  # attention with a window
    wide: float  # all attention of a model with heads wider than 256
    recurrent: float  # the gated delta rule, of BF16's FLOP/s
    copy: float  # elementwise kernels and the operands of a GEMM
    weights: float  # weights read by a decode step
    q_copy: float  # q copied out of the result of qkv_proj before attention
    protected: tuple[int, tuple[float, float]]  # (R, ...) weights read for up to R protected rows of a pass, for more
    idle_linear_us: float  # per linear: the same kernel in a pass without protected rows
    packed: Mapping[str, Curve]  # w8a16, w4a16: packed weights read for that many BF16 rows
    placed: Mapping[str, tuple[float, float]]  # ... for up to 8 protected rows of a prefill pass; for each 16 of more
    kv: float  # KV cache read by decode attention
    # Our kernels: "alone", or the "norm" or "silu" that quantises what it writes -> format ("qdq": emulated) -> curve
    quantise: Mapping[str, Mapping[str, Curve]]
    stock_quantise: Mapping[str, float]  # others' quantisers, always alone
    dequantise: float  # emulated: packed weights to BF16, just in time
    pass_us: float  # prefill, per pass: embedding, sampling, the gaps around its graph
    layer_us: float  # prefill, per layer and pass: launches, graph breaks around attention
    decode_layer_us: float  # decode, per layer: what a step takes beyond reading weights and KV
    decode_doubling_us: float  # decode, per layer, for each doubling of the batch
    low_linear_us: float  # decode in low precision, per linear: the activation's quantiser
    experts: ExpertRates


# [H200] SGLang 0.5.17 as shipped, Qwen3-30B-A3B's dimensions (dummy weights, no tuned configurations), passes of 512,
# 2048, 8192 and 32768 tokens: BF16 21.6, 35.9, 145.3 and 1132 ms; --quantization fp8 1.35x, 1.33x, 1.25x and 1.13x.
# The curves are what is left of the passes when all else that is planned is subtracted, over the FLOPs of the experts,
# at 32, 128 and 512 rows for each: 17.4, 21.0, 53.7 ms in BF16, 11.9, 12.4, 27.5 in FP8. "move" and the quantisers are
# apart. ``read``: BF16's from 512 tokens, which reach all experts; FP8's so that a decode step of 32 requests is 1.4
# times as fast, measured 1.46.
_MEASURED = "measured on an H200 (SGLang 0.5.17, Triton, Qwen3-30B-A3B's dimensions)"
_BF16 = Sourced(((32, 0.108), (128, 0.358), (512, 0.550)), _MEASURED)
_FP8 = ((32, 0.079), (128, 0.303), (512, 0.550))
# [H200] our own, row x channel scales: recipe fp8 without protected rows, means of two runs of 48 layers, 14.58, 24.59
# and 104.8 ms of 512, 2048 and 8192 tokens; 11.1, 12.0 and 25.1 ms of them are left for the experts.
_OURS = Sourced(
    ((32, 0.085), (128, 0.311), (512, 0.597)),
    "measured on an H200 (SGLang 0.5.17, this project's Triton kernels, Qwen3-30B-A3B's dimensions)",
)
H200_EXPERTS = ExpertRates(
    gemm={
        "bf16": _BF16,
        "fp8": _OURS,
        "qdq": Sourced(_BF16.curve, "predicted: BF16's rate, after the weights are written out in BF16"),
    },
    stock={"fp8": Sourced(_FP8, _MEASURED)},
    read={"bf16": 0.69, "fp8": 0.57, "nvfp4": 0.57},
    move=0.89,
    block_us=12.0,  # [assumed] sorting by expert, two GEMMs, SiLU, sum: five launches from a graph
)
_CARRIED = "predicted: the fraction of the peak that an H200 reaches"
# [public] NVFP4 on a B200: flashinfer-ai/flashinfer#5301, trtllm, a DeepSeek-shaped layer (256 experts, 8 a token):
# 1.2, 1.9 and 2.3 PFLOP/s at 4096, 8192 and 16384 tokens. [assumed] BF16 and FP8: the H200's fractions.
SM100_EXPERTS = replace(
    H200_EXPERTS,
    gemm={
        "bf16": Sourced(_BF16.curve, _CARRIED),
        "fp8": Sourced(_OURS.curve, _CARRIED),
        "nvfp4": Sourced(((128, 0.133), (256, 0.211), (512, 0.256)), "predicted: published for a B200, other shapes"),
        "qdq": H200_EXPERTS.gemm["qdq"],
    },
    stock={},
)
# [assumed] NVFP4 on SM120: FP8's fraction of the peak. No measurement at all.
SM120_EXPERTS = replace(
    SM100_EXPERTS,
    gemm={**SM100_EXPERTS.gemm, "nvfp4": Sourced(_OURS.curve, "predicted: FP8's fraction of the peak, a guess")},
)

H200_RATES = Rates(
    gemm={
        # [H200] the four linears of a layer, medians on random data (GEMM table of the project's notes): 0.282, 1.074,
        # 4.651 and 9.17 ms at M = 512, 2048, 8192, 16384, over 989.4 TFLOP/s
        "bf16": ((512, 0.708), (2048, 0.744), (8192, 0.687), (16384, 0.697)),
        # [H200] the faster of CUTLASS and cuBLAS for each shape: 0.178, 0.583 (qkv in one GEMM) and 2.169 ms (q apart)
        # for a layer at M = 512, 2048, 8192, over 1978.9 TFLOP/s; at 16384 4.78 ms, cuBLAS for all shapes
        "fp8": ((512, 0.561), (2048, 0.685), (8192, 0.737), (16384, 0.668)),
        # [H200] emulated NVFP4: BF16's, times what its passes took less than BF16's of the same run (2026-11-22) when
        # all but the linears is subtracted: 1.066 at 2048 and 1.10 at 8192 rows. Operands of few significant bits draw
        # less power, so the clock stays higher (inferred). [assumed] 512 as BF16, 16384 as 8192.
        "qdq": ((512, 0.708), (2048, 0.793), (8192, 0.756), (16384, 0.767)),
    },
    # [H200] sgl_kernel.fp8_scaled_mm (CUTLASS): 0.169, 0.587, 2.373, 5.15 ms
    stock_gemm={"fp8": ((512, 0.591), (2048, 0.680), (8192, 0.673), (16384, 0.620))},
    # [H200] FA3, causal: 33 ms for 36 layers at 8192 tokens (0.61); what is left of bench_one_batch at 32768 says 0.57
    attention=0.59,
    # [H200] FA3 as shipped with SGLang 0.5.17 and 0.5.23, 8192 rows of 32 heads of queries and 8 of keys behind 24576,
    # 57344 and 122880 tokens: 5.45 and 5.32, 12.1 and 13.2, 26.0 and 27.2 ms, mean of both (pages: 6.28 and 6.48, 13.8
    # and 13.8, 31.3 and 28.9, that is 0.61, 0.60 and 0.57). [assumed] From 3072 keys on, about the shortest that a
    # server times, the same; of so few that nobody timed them, as over pages.
    gathered=((1024, 0.590), (3072, 0.724), (28672, 0.724), (61440, 0.660), (126976, 0.648)),
    # [H200] a server with 32 heads of queries and 4 of keys saw gathering pay from 512 rows behind 16384 tokens, 1024
    # behind 4096 and 2048 behind 2048, not behind half as many: 11.8 to 17.1 us, at these rates
    gather_us=14.5,
    windowed=0.45,  # [assumed] between FA3's and Triton's
    # [H200] 12 layers of Gemma-4-26B-A4B, whose heads of 512 take Triton's attention for the whole model: 9.8 and
    # 85.5 ms of 2048 and 8192 tokens when all else that is planned is subtracted, 43 and 42 TFLOP/s
    wide=0.043,
    # [H200] 12 layers of Qwen3.5-35B-A3B, 8192 tokens, all else subtracted: 0.023 in BF16, 0.033 in fp8
    recurrent=0.028,
    copy=0.89,  # [H200] copy bandwidth 4.27 of 4.8 TB/s
    weights=0.81,  # [H200] cuBLAS at M = 1 reads 3.2 to 3.9 TB/s; 0.81 is its best, the step's rest is decode_layer_us
    q_copy=0.31,  # [H200] 90 us for 8192 rows of 4096 (20 us for 2048: 0.35), 4 bytes an element
    # [H200] 3.75 ms for 13.9 GB with up to 16 rows, 5.5 ms with 17 to 64; 0.2 ms for 144 linears without any
    protected=(16, (0.772, 0.526)),
    idle_linear_us=1.4,
    # [H200] decode steps of fp8-compact and nvfp4-compact at batch 1, 8, 32, 64, 128: 3.66, 3.82, 5.45, 6.70, 9.17 and
    # 3.36, 3.66, 5.99, 8.34, 13.05 ms; BF16's of that run (2026-11-28) 5.11, 5.36, 5.65, 6.15, 7.38. The rest, with
    # BF16's linears at ``weights``. [assumed] 256: two tiles of 128 rows, each of which reads all weights
    packed={
        "w8a16": ((1, 0.681), (8, 0.710), (32, 0.428), (64, 0.352), (128, 0.270), (256, 0.135)),
        "w4a16": ((1, 0.447), (8, 0.434), (32, 0.208), (64, 0.141), (128, 0.088), (256, 0.044)),
    },
    # [H200] the kernel alone, 36 layers, 8 and 16 used slots: 3.06 and 3.89 ms, 2.58 and 3.86 (SGLang 0.5.17, without
    # --enable-mixed-chunk; tiles else: some 5.5 and 6.7 ms for up to 64)
    placed={"w8a16": (0.473, 0.372), "w4a16": (0.316, 0.211)},
    kv=0.79,  # [H200] slope of the decode step between contexts of 2k and 32k tokens: 3.8 TB/s
    # [H200] fp8 and qdq: our Triton kernels. fp8 at 2048 and 8192 rows: alone 8.1 and 26.4 us for K = 4096, 3 bytes an
    # element (K = 12288: 20.3 and 72.0); norm with residual 18.4 and 60.9 us, 7 bytes; SiLU 33.2 and 117.6 us, 5 bytes.
    # qdq at 8192: 35.6, 71.0 and 147.4 us for 4, 8 and 6 bytes.
    # [assumed] nvfp4: as qdq, which does the same arithmetic; our kernels have not run on Blackwell.
    quantise={
        "alone": {"fp8": ((2048, 0.647), (8192, 0.794)), "qdq": ((8192, 0.785),), "nvfp4": ((8192, 0.785),)},
        "norm": {"fp8": ((2048, 0.665), (8192, 0.803)), "qdq": ((8192, 0.788),), "nvfp4": ((8192, 0.788),)},
        "silu": {"fp8": ((2048, 0.790), (8192, 0.892)), "qdq": ((8192, 0.854),), "nvfp4": ((8192, 0.854),)},
    },
    # [H200] fp8: sgl_per_token_quant_fp8, 0.278 ms for a layer at M = 8192, 2.2 TB/s at 3 bytes an element. With
    # ``copy`` that makes 110 and 281 us of norm then FP8 and SiLU then FP8 at 8192 rows; measured 111.9 and 271.8.
    # [assumed] nvfp4: no Blackwell GPU at hand; the rate of our first qdq kernel on the H200, which fused nothing
    stock_quantise={"fp8": 0.45, "nvfp4": 0.72},
    dequantise=0.77,  # [H200] our Triton kernel, 3.7 TB/s at 2.5625 bytes a weight
    # [H200] what passes of 512 tokens take beyond the kernels above: 0.69 to 0.93 ms for 36 layers, two runs and three
    # servers (BF16, FP8 unprotected, SGLang's FP8). Of that 0.6 to 0.9 ms come once a pass: what 12 layers of
    # Qwen3-30B-A3B take beyond a quarter of 48 layers' passes of 512 and 2048 tokens, lm_head subtracted.
    pass_us=600.0,
    layer_us=5.3,
    decode_layer_us=31.6,  # [H200] 5.05 ms at batch 1, less weights and KV, over 36 layers
    decode_doubling_us=3.0,  # [H200] 5.51 and 6.95 ms at batch 8 and 64, less KV: 0.32 and 0.65 ms, so 0.107 a doubling
    low_linear_us=3.1,  # [H200] SGLang's FP8 server: 3.71 ms at batch 1, less weights and the rest, over 144 linears
    experts=H200_EXPERTS,
)

# [H100] an H100 80GB HBM3, same software and dimensions, 2026-11-27, one run: what is left for the linears of passes of
# 512, 1024, 2048 and 8192 tokens when all else that is planned is subtracted; the protected row counts as on the H200,
# by bandwidth. [assumed] 16384 rows: by the H200's from 8192 on; all else: the H200's fractions and overheads, which
# give back its decode steps within 6%.
H100_RATES = replace(
    H200_RATES,
    gemm={
        "bf16": ((512, 0.673), (1024, 0.777), (2048, 0.801), (8192, 0.753), (16384, 0.764)),
        "fp8": ((512, 0.502), (1024, 0.626), (2048, 0.704), (8192, 0.746), (16384, 0.676)),
        # [assumed] times BF16's, as on the H200
        "qdq": ((512, 0.673), (1024, 0.802), (2048, 0.854), (8192, 0.829), (16384, 0.841)),
    },
    stock_gemm={"fp8": ((512, 0.446), (1024, 0.678), (2048, 0.713), (8192, 0.676), (16384, 0.623))},
)

# [public] B200, Llama-3.1-8B's N=6144 K=4096: BF16 and NVFP4 ("noquant") from vllm-project/vllm#20646, before its
# tuning, so NVFP4 is on the safe side (sgl-project/sglang#22091 shows 0.57 to 0.65 at M=44100, if that is a B200); FP8
# from #19566 (M=512 and 16384) and #18778 (M=1024).
# [public] NVFP4 quantiser, not ours: the same table with and without it, 27 us for 86 MB at M=8192, so 0.40 of 8 TB/s.
# [assumed] Everything else: the H200's fractions and overheads.
SM100_RATES = replace(
    H200_RATES,
    gathered=(),
    gemm={
        "bf16": ((512, 0.571), (2048, 0.602), (8192, 0.632), (16384, 0.605)),
        "fp8": ((512, 0.420), (1024, 0.574), (16384, 0.544)),
        "nvfp4": ((512, 0.243), (1024, 0.322), (2048, 0.379), (4096, 0.405), (8192, 0.420), (16384, 0.434)),
    },
    stock_gemm={},
    stock_quantise={"fp8": 0.45, "nvfp4": 0.40},
    experts=SM100_EXPERTS,
)

# RTX 5090. GeForce halves the BF16 rate with FP32 accumulation, so that neither power nor memory holds BF16 GEMMs back
# and the boost clock exceeds the white paper's 2.41 GHz: fractions above 1.
# [public] BF16: vllm-project/vllm#38338, M=4096: 221 (N=6144 K=4096), 185 (4096, 4096), 233 (28672, 4096), and 215
#   (8192, 28672) for a down projection; weighted by the FLOPs of a Qwen3-8B layer: 221.6 of 209.5. At M=2048 there is
#   only #34424's 181 for N=6144, a seventh of a layer's FLOPs, so the curve is flat.
# [public] FP8: pytorch/pytorch#155991, CUTLASS row-wise, N=K=4096: 266.6, 339.3, 388.9 at M=256, 1024, 4096 of 419.
# [assumed] NVFP4: raw MMA rate of a 5090 (mmapeak, main-horse.github.io/posts/5090-mm-perf: 1474 of 1676, 0.88) times
#   the fraction that CUTLASS reaches in FP8 at the same M (0.81 and 0.93).
# [public] attention: FlashAttention-2 on a 5090, 190.6 TFLOP/s (gau-nernst, "Speed-of-Light Flash Attention for 5090"),
#   0.91; not causal, at 400 W.
# [assumed] Everything else: the H200's fractions and overheads.
RTX5090_RATES = replace(
    H200_RATES,
    gathered=(),
    gemm={
        "bf16": ((4096, 1.058),),
        "fp8": ((256, 0.636), (1024, 0.810), (4096, 0.928)),
        "nvfp4": ((1024, 0.712), (4096, 0.817)),
    },
    stock_gemm={},
    attention=0.91,
    experts=SM120_EXPERTS,
)

# RTX PRO 6000: the same silicon and power as an RTX 5090 with BF16 and FP8 at full rate, so that power does limit them.
# [assumed] BF16 and FP8 0.80, attention 0.75: between the 5090 and the H200; NVFP4: as the 5090. No measurement at all.
RTXPRO_RATES = replace(
    RTX5090_RATES,
    gemm={"bf16": ((4096, 0.80),), "fp8": ((1024, 0.70), (4096, 0.80)), "nvfp4": ((1024, 0.712), (4096, 0.817))},
    attention=0.75,
)

LINK = 0.75  # [assumed] share of the link's peak that an all-reduce gets
ALL_REDUCE_US = 12.0  # [assumed] latency of one all-reduce, two per layer under tensor parallelism
ATTENTION_TILE = 128  # keys by which a causal kernel overshoots the diagonal, on average half a tile of rows each way


def at(curve: Curve, rows: int) -> float:
    """The fraction at ``rows``: linear in log(rows) between the points, constant beyond them."""
    if rows <= curve[0][0]:
        return curve[0][1]
    for (low, left), (high, right) in pairwise(curve):
        if rows <= high:
            return left + (right - left) * math.log(rows / low) / math.log(high / low)
    return curve[-1][1]
