"""Activations quantised where they are made: plain rows, RMSNorm and SiLU, each into FP8, NVFP4 or BF16 values of NVFP4.

One kernel with three sources and three formats. A program makes one token row ``y``, rounds it to BF16 as the separate
kernel would have, keeps it in registers, and quantises it, so that fused and unfused give the same bits; the numbers
are those of ``formats/fp8.py`` and ``formats/nvfp4.py``. Every input is read once and every output written once. Bytes
for each element of ``y``:

    source          read       fp8   nvfp4    qdq    (codes and scales out; + 2 for rows that are kept)
    quantize        2            3  2.5625      4
    rmsnorm         2            3  2.5625      4
      + residual    4 + 2 out    7  6.5625      8
    silu_mul        4            5  4.5625      6

Kept rows: ``slots`` int32 [M] and ``kept`` bfloat16 [R, K] go together. Where ``slots[m]`` is not -1, the BF16 row
``y[m]`` is also written to ``kept[slots[m]]``; no other row of ``kept`` changes. Slots are not checked against R, and no
slot may be named twice: the caller fills the buffer.

No program looks at another row, so a row's bits depend on nothing else. Roundings are those of IEEE FP32: ``tl.div_rn``,
``tl.sqrt_rn``, no FMA contraction (``enable_fp_fusion=False``); Triton's ``/`` is none of that. Nothing synchronises,
everything can be captured in a CUDA graph, M = 0 is fine.

Refused (ValueError): tensors that are not contiguous matrices of the dtype named, shapes that do not fit together, K not
a positive multiple of 16, an unknown format, "fp8" on a GPU below SM89, one of ``slots`` and ``kept`` without the other.
"""

import functools

import torch
import triton
import triton.language as tl

FORMATS = ("fp8", "qdq", "nvfp4")


def quantize(
    x: torch.Tensor, fmt: str, *, slots: torch.Tensor | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Quantise token rows ``x`` bfloat16 [M, K]. Bit for bit what ``formats`` makes of them:

    "fp8"    codes float8_e4m3fn [M, K] and scales float32 [M, 1]: ``fp8.quantize_activations(x)``
    "nvfp4"  codes uint8 [M, K/2], block scales float8_e4m3fn [ceil(M/128)*128, ceil(K/16/4)*4] in the 128x4 layout of
             ``nvfp4.NVFP4Tensor.swizzled_scales`` with zero padding, row scales float32 [M]:
             ``nvfp4.quantize_activations(x)``
    "qdq"    bfloat16 [M, K]: ``nvfp4.quantize_activations(x).dequantize()``
    """
    _require(x, "x", [*x.shape])
    return _launch(fmt, "rows", x, None, None, 0.0, x.shape[1], slots, kept)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    fmt: str,
    *,
    residual: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """RMSNorm of ``x`` bfloat16 [M, K] with ``weight`` bfloat16 [K], then ``quantize``; results as there.

    With ``residual`` bfloat16 [M, K], t = x + residual in FP32 is normalised and ``residual`` becomes bf16(t), in place.
    As in the kernel that SGLang runs (``sgl_kernel.fused_add_rmsnorm``: flashinfer's norm.cuh), the norm is that of the
    unrounded t, ``y = bf16((t * rms) * weight)`` with ``rms = 1/sqrt(sum(t^2)/K + eps)``. The new residual has the same
    bits. ``rms`` may differ by some 2^-22 of itself: the sum has another order, and SGLang's kernel takes approximate
    reciprocal roots where this one takes a rounded root and a rounded quotient. That moves y by one BF16 step where
    it lay that close to a rounding boundary, once in 10^4 elements, and codes and scales as that step does.
    """
    _require(x, "x", [*x.shape])
    _require(weight, "weight", [x.shape[1]])
    if residual is not None:
        _require(residual, "residual", [*x.shape])
    return _launch(fmt, "norm", x, weight, residual, eps, x.shape[1], slots, kept)


def silu_mul(
    gate_up: torch.Tensor, fmt: str, *, slots: torch.Tensor | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """``y = silu(gate) * up`` of ``gate_up`` bfloat16 [M, 2*K], the gate first, then ``quantize``; results as there.

    As in the kernel that SGLang runs (kernels/jit/csrc/elementwise/activation.cuh), ``y = bf16(g / (1 + exp(-g)) * u)``
    in FP32 with one rounding. SGLang builds it with --use_fast_math below SM100 and without from there on; here the
    exponential is the approximate one (2^-22 or better for |g| < 4) and the quotient IEEE. So y may differ by one BF16
    step where it lay that close to a rounding boundary, once in 10^4 elements, and codes and scales as that step does.
    """
    _require(gate_up, "gate_up", [*gate_up.shape])
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have 2*K columns, got {gate_up.shape[1]}")
    return _launch(fmt, "silu", gate_up, None, None, 0.0, gate_up.shape[1] // 2, slots, kept)


def _launch(
    fmt: str,
    source: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    k: int,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    m = x.shape[0]
    if k == 0 or k % 16:
        raise ValueError(f"K must be a positive multiple of 16, got {k}")
    if (slots is None) != (kept is None):
        raise ValueError("slots and kept must be given together")
    if slots is not None and kept is not None:
        _require(slots, "slots", [m], torch.int32)
        _require(kept, "kept", [kept.shape[0], k])
    results = _empty_results(fmt, m, k, x.device)
    if m:
        outputs = (*results, None, None)[:3]
        if fmt == "nvfp4":
            outputs = (results[0].view(torch.int32), results[1].view(torch.uint8), results[2])
        warps = min(max(triton.next_power_of_2(k) // 1024, 1), 16)
        _quantize_rows[(triton.cdiv(m, 128) * 128 if fmt == "nvfp4" else m,)](
            x,
            weight,
            residual,
            slots,
            kept,
            *outputs,
            m,
            eps,
            K=k,
            BLOCKS=16 * warps,
            SOURCE=source,
            FORMAT=fmt,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return results


def _empty_results(fmt: str, m: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    if fmt == "fp8":
        if device.type == "cuda" and _capability(device) < (8, 9):
            raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or newer, got {_capability(device)}")
        codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=device)
        return codes, torch.empty((m, 1), dtype=torch.float32, device=device)
    if fmt == "qdq":
        return (torch.empty((m, k), dtype=torch.bfloat16, device=device),)
    if fmt == "nvfp4":
        scales = (triton.cdiv(m, 128) * 128, triton.cdiv(k // 16, 4) * 4)
        return (
            torch.empty((m, k // 2), dtype=torch.uint8, device=device),
            torch.empty(scales, dtype=torch.float8_e4m3fn, device=device),
            torch.empty((m,), dtype=torch.float32, device=device),
        )
    raise ValueError(f"fmt must be one of {', '.join(map(repr, FORMATS))}, got {fmt!r}")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _require(tensor: torch.Tensor, name: str, shape: list[int], dtype: torch.dtype = torch.bfloat16) -> None:
    if tensor.dtype != dtype or [*tensor.shape] != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous {dtype} {shape}, got {found}")


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _quantize_rows(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
) -> None:
    """One program for each row. The row is a tuple of BF16 chunks [BLOCKS, 16], eight elements of a chunk in each
    thread: 16-byte loads, no block of 16 in more than two threads. Pointers that a case does not need are None."""
    row = tl.program_id(0).to(tl.int64)
    if FORMAT == "nvfp4":
        if row >= rows:
            for i in tl.static_range((K // 16 + 3) // 4 * 4 // BLOCKS + 1):
                _store_scales(scale_ptr, row, i, tl.zeros([BLOCKS], tl.int32), K, BLOCKS)
            return
    if SOURCE == "norm":
        if residual_ptr is not None:
            residual_ptr += row * K
        y = _norm(x_ptr + row * K, weight_ptr, residual_ptr, eps, K, BLOCKS)
    elif SOURCE == "silu":
        y = _silu(x_ptr + row * 2 * K, K, BLOCKS)
    else:
        y = _rows(x_ptr + row * K, K, BLOCKS)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot >= 0:
            for i in tl.static_range(len(y)):
                _store(kept_ptr + slot * K, i, y[i], K, BLOCKS)
    if FORMAT == "fp8":
        _store_fp8(out_ptr + row * K, scale_ptr + row, y, K, BLOCKS)
    elif FORMAT == "nvfp4":
        _store_nvfp4(out_ptr + row * (K // 8), scale_ptr, row_scale_ptr, row, y, K, BLOCKS)
    else:
        _store_qdq(out_ptr + row * K, y, K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _columns(CHUNK: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tensor:
    return CHUNK * BLOCKS * 16 + tl.arange(0, BLOCKS)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _load(row_ptr: tl.tensor, CHUNK: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tensor:
    column = _columns(CHUNK, BLOCKS)
    return tl.load(row_ptr + column, mask=column < K, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(row_ptr: tl.tensor, CHUNK: tl.constexpr, value: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    column = _columns(CHUNK, BLOCKS)
    tl.store(row_ptr + column, value, mask=column < K)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(x_ptr: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tuple:
    y = ()
    for i in tl.static_range((K - 1) // (BLOCKS * 16) + 1):
        y = y + (_load(x_ptr, i, K, BLOCKS),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _silu(gate_ptr: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tuple:
    y = ()
    for i in tl.static_range((K - 1) // (BLOCKS * 16) + 1):
        gate = _load(gate_ptr, i, K, BLOCKS).to(tl.float32)
        up = _load(gate_ptr + K, i, K, BLOCKS).to(tl.float32)
        root = tl.rsqrt(1.0 + tl.exp(-gate))
        y = y + ((gate * root * root * up).to(tl.bfloat16),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _norm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tuple:
    t = _rows(x_ptr, K, BLOCKS)
    if residual_ptr is not None:  # all loads go before the stores, which the compiler may not reorder
        t = _add(t, _rows(residual_ptr, K, BLOCKS))
        for i in tl.static_range(len(t)):
            _store(residual_ptr, i, t[i].to(tl.bfloat16), K, BLOCKS)
    squares = tl.zeros([BLOCKS, 16], tl.float32)
    for i in tl.static_range(len(t)):
        squares += t[i].to(tl.float32) * t[i].to(tl.float32)
    rms = tl.rsqrt(tl.div_rn(tl.sum(squares), K * 1.0) + eps)
    y = ()
    for i in tl.static_range(len(t)):
        weight = _load(weight_ptr, i, K, BLOCKS).to(tl.float32)
        y = y + ((t[i].to(tl.float32) * rms * weight).to(tl.bfloat16),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _add(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i].to(tl.float32) + b[i].to(tl.float32),)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _largest(y: tl.tuple) -> tl.tensor:
    """The FP32 bits of the row's largest magnitude; NaN, if there is one, is the largest."""
    largest = y[0].to(tl.int16, bitcast=True) & 0x7FFF
    for i in tl.static_range(1, len(y)):
        largest = tl.maximum(largest, y[i].to(tl.int16, bitcast=True) & 0x7FFF)
    return tl.max(largest.to(tl.int32)) << 16


@triton.jit  # type: ignore[untyped-decorator]
def _store_fp8(
    row_ptr: tl.tensor, scale_ptr: tl.tensor, y: tl.tuple, K: tl.constexpr, BLOCKS: tl.constexpr
) -> None:
    """No clamp is needed: |y| / scale exceeds 448 by two roundings at most, and E4M3 rounds that to 448."""
    scale = tl.div_rn(_largest(y).to(tl.float32, bitcast=True), 448.0).to(tl.int32, bitcast=True)
    scale = tl.maximum(scale, 0x00800000).to(tl.float32, bitcast=True)  # 2^-126; as integers, so that NaN stays
    tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(y)):
        _store(row_ptr, i, (y[i].to(tl.float32) * inverse).to(tl.float8e4nv), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_qdq(row_ptr: tl.tensor, y: tl.tuple, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    row_scale, inverse = _row_scale(_largest(y))
    for i in tl.static_range(len(y)):
        value, scale = _e2m1_blocks(y[i].to(tl.float32), inverse)
        value = value * (scale * row_scale)[:, None]
        sign = y[i].to(tl.float32).to(tl.int32, bitcast=True) & -0x80000000
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        _store(row_ptr, i, value.to(tl.bfloat16), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_nvfp4(
    row_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    row: tl.tensor,
    y: tl.tuple,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Multiplied by a power of two, a value of a small format has that format's bits on top of its FP32 fraction,
    subnormals included. Eight codes go into each 32-bit word, the first one lowest."""
    largest = _largest(y)
    row_scale, inverse = _row_scale(largest)
    tl.store(row_scale_ptr + row, row_scale)
    for i in tl.static_range(len(y)):
        finite = tl.where(largest < 0x7F800000, y[i].to(tl.float32), 0.0)
        value, scale = _e2m1_blocks(finite, inverse)
        code = (value * 1.1754943508222875e-38).to(tl.int32, bitcast=True) >> 22  # 2^-126
        code = code | ((finite.to(tl.int32, bitcast=True) >> 28) & 8)
        word = tl.sum(tl.reshape(code, [BLOCKS * 2, 8]) << (tl.arange(0, 8) * 4)[None, :], axis=1)
        column = (i * BLOCKS * 2) + tl.arange(0, BLOCKS * 2)
        tl.store(row_ptr + column, word, mask=column < K // 8)
        _store_scales(scale_ptr, row, i, (scale * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20, K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_scales(
    scale_ptr: tl.tensor,
    row: tl.tensor,
    CHUNK: tl.constexpr,
    scales: tl.tensor,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Bytes of the blocks of a chunk, of those too that pad K/16 to a multiple of four (``tl.load`` made them zero)."""
    padded: tl.constexpr = (K // 16 + 3) // 4 * 4
    block = CHUNK * BLOCKS + tl.arange(0, BLOCKS)
    offset = (row // 128 * (padded // 4) + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    tl.store(scale_ptr + offset, scales.to(tl.uint8), mask=block < padded)


@triton.jit  # type: ignore[untyped-decorator]
def _row_scale(largest: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``formats.nvfp4.row_scales`` and its inverse, from the FP32 bits of the row's largest magnitude."""
    exponent = (largest >> 23) - 138 + ((largest & 0x7FFFFF) > 0x280000).to(tl.int32)
    exponent = tl.where(largest == 0, 0, tl.maximum(exponent, -126))
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < 0x7F800000, scale, float("nan")), inverse


@triton.jit  # type: ignore[untyped-decorator]
def _e2m1_blocks(y: tl.tensor, inverse: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E2M1 magnitudes [BLOCKS, 16] and E4M3 scales [BLOCKS], both as FP32, of FP32 ``y`` times ``inverse``."""
    magnitude = tl.abs(y) * inverse
    scale = _round_to_grid(tl.minimum(tl.max(magnitude, axis=1) * 0.16666667163372040, 448.0), 3, 0.015625)
    encode = tl.minimum(tl.div_rn(1.0, scale), 3.4028234663852886e38)
    return _round_to_grid(tl.minimum(magnitude * encode[:, None], 6.0), 1, 1.0), scale


@triton.jit  # type: ignore[untyped-decorator]
def _round_to_grid(x: tl.tensor, MANTISSA_BITS: tl.constexpr, LEAST_NORMAL: tl.constexpr) -> tl.tensor:
    """x >= 0 to the nearest value with that many bits behind the leading one, ties to even; below LEAST_NORMAL the
    grid stays as wide as there. Adding and subtracting 1.5 * 2^23 grid steps rounds."""
    exponent = tl.maximum(x, LEAST_NORMAL).to(tl.int32, bitcast=True) & 0x7F800000
    shift = (exponent + (((23 - MANTISSA_BITS) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    return (x + shift) - shift
