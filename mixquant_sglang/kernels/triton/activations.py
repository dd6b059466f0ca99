"""Activations quantised where they are made: plain rows, RMSNorm, SiLU or GELU, into FP8, NVFP4 or NVFP4's BF16 values.

One kernel with five sources and three formats, and one for plain rows to NVFP4. A program makes one token row ``y``
(that one: two), rounds it to BF16 as the kernel of the source alone would, holds it in registers and quantises it. So
fused and unfused give the same bits; the numbers are those of ``formats/fp8.py`` and ``formats/nvfp4.py``. Every input
is read once and every output written once. Bytes for each element of ``y``:

    source               in         fp8    nvfp4      qdq    (outputs included)
    quantize              2           3   2.5625        4
    rmsnorm               2           3   2.5625        4
    rmsnorm, residual     4           7   6.5625        8    (2 for the new residual)
    silu_mul, gelu_mul    4           5   4.5625        6

Kept rows: ``slots`` int32 [M] and ``kept`` bfloat16 [R, K] go together. Where ``slots[m]`` is not -1, the BF16 row
``y[m]`` is also written to ``kept[slots[m]]``, 2 bytes an element; no other row of ``kept`` changes. The caller fills
the slots: they are not checked against R, and no two rows may name the same one.

Nothing of one row enters another, so a row's bits depend on nothing else. Arithmetic is FP32 without FMA contraction
(``enable_fp_fusion=False``), divisions are IEEE (``tl.div_rn``; Triton's ``/`` is not). Nothing synchronises,
everything can be captured in a CUDA graph, M = 0 is fine.

Refused (ValueError): tensors that are not contiguous CUDA tensors of the dtype and shape named, K not a positive
multiple of 16, an unknown format, "fp8" on a GPU below SM89, ``slots`` without ``kept`` or the reverse.
"""

import torch

from mixquant_sglang.kernels.triton.checks import require
from mixquant_sglang.kernels.triton.launch import launch


def quantize(
    x: torch.Tensor, fmt: str, *, slots: torch.Tensor | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Quantise token rows ``x`` bfloat16 [M, K]; bit for bit

    "fp8"    ``formats.fp8.quantize_activations(x)``: codes float8_e4m3fn [M, K], scales float32 [M, 1]
    "nvfp4"  ``formats.nvfp4.quantize_activations(x)``: codes uint8 [M, K/2]; block scales float8_e4m3fn
             [ceil(M/128)*128, ceil(K/16/4)*4] in the 128x4 layout of ``NVFP4Tensor.swizzled_scales``, padding zero;
             row scales float32 [M]
    "qdq"    ``formats.nvfp4.quantize_activations(x).dequantize()``: one bfloat16 [M, K]
    """
    require(x, "x", ("M", "K"))
    return launch("rows", fmt, x, x.shape[1], slots=slots, kept=kept)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    fmt: str,
    *,
    zero_centred: bool = False,
    residual: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """RMSNorm of ``x`` bfloat16 [M, K] with ``weight`` bfloat16 [K], then ``quantize``: results as there.
    ``zero_centred``: by ``1 + weight`` in FP32, as Gemma's norms are (``sgl_kernel.gemma_rmsnorm``,
    ``gemma_fused_add_rmsnorm``: the kernels below with 1 added to each weight).

    With ``residual`` bfloat16 [M, K], t = x + residual in FP32 takes the place of x, and ``residual`` becomes bf16(t)
    in place. As in the kernels that SGLang runs (``sgl_kernel.fused_add_rmsnorm``: flashinfer's in CuTe DSL, else its
    norm.cuh; one arithmetic), the norm is that of the unrounded t: ``y = bf16((t * r) * weight)``,
    ``r = rsqrt(sum(t^2) / K + eps)``, ``rsqrt`` approximate.

    The new residual is theirs bit for bit. ``r`` is not: the sum has another order, so r may differ by about 2^-22 of
    itself. That moves an element of y by one BF16 step where it lies so close to a rounding boundary, about one in
    10^4. Its code follows one time in ten; if it is the row's largest, so does the scale, and with it several per cent
    of the row's codes. Expect below 10^-4 of all codes and 10^-3 of all scales to differ.
    """
    require(x, "x", ("M", "K"))
    require(weight, "weight", (x.shape[1],))
    if residual is not None:
        require(residual, "residual", (*x.shape,))
    source = "zero_centred_norm" if zero_centred else "norm"
    return launch(source, fmt, x, x.shape[1], weight=weight, residual=residual, eps=eps, slots=slots, kept=kept)


def silu_mul(
    gate_up: torch.Tensor, fmt: str, *, slots: torch.Tensor | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """``y = silu(gate) * up`` of ``gate_up`` bfloat16 [M, 2*K], gate first, then ``quantize``: results as there.

    As in the kernel that SGLang runs (kernels/jit/csrc/elementwise/activation.cuh), ``y = bf16(g / (1 + e^-g) * u)`` in
    FP32 with one rounding. SGLang compiles it with --use_fast_math below SM100: then ``e^-g`` is the same approximate
    2^(-g * log2(e)) as here, and the quotient is approximate there too, here ``g * rsqrt(1 + e^-g)^2``; both are good
    to 2^-21. From SM100 on SGLang's two are accurate, and e^-g differs by up to (2 + 1.5 |g|) * 2^-24 more. So y, codes
    and scales differ as rarely as after ``rmsnorm``, somewhat more often where g is far below 0.
    """
    return _activation_mul("silu", gate_up, fmt, slots, kept)


def gelu_mul(
    gate_up: torch.Tensor, fmt: str, *, slots: torch.Tensor | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """``y = gelu(gate) * up`` of ``gate_up`` bfloat16 [M, 2*K], gate first, then ``quantize``: results as there.

    GELU's tanh approximation, ``gelu(g) = g / 2 * (1 + tanh(u))``, ``u = sqrt(2 / pi) * (g + 0.044715 g^3)``, in FP32
    with one rounding of y, as ``g * rsqrt(1 + e^(-2u))^2``, good to 2^-20 + |u| 2^-22.  SGLang's kernel (the one of
    SiLU) calls tanhf.  Where that is accurate (from SM100 on), y differs as rarely as after ``silu_mul``.  Compiled
    with --use_fast_math below, tanhf may be one instruction that is good to 2^-11: then SGLang's y is off by up to
    ``|g * up| * 2^-12``, a BF16 step of some elements in a hundred and more where g is below 0, and ours is not.
    """
    return _activation_mul("gelu", gate_up, fmt, slots, kept)


def _activation_mul(
    source: str, gate_up: torch.Tensor, fmt: str, slots: torch.Tensor | None, kept: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    require(gate_up, "gate_up", ("M", "2*K"))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have 2*K columns, got {gate_up.shape[1]}")
    return launch(source, fmt, gate_up, gate_up.shape[1] // 2, slots=slots, kept=kept)
