"""Activations quantised where they are made: plain rows, RMSNorm or SiLU, into FP8, NVFP4 or the BF16 values of NVFP4.

One kernel with three sources and three formats. A program makes one token row ``y``, rounds it to BF16 as the kernel
of the source alone would, holds it in registers and quantises it. So fused and unfused give the same bits; the
numbers are those of ``formats/fp8.py`` and ``formats/nvfp4.py``. Every input is read once and every output written
once. Bytes for each element of ``y``:

    source               in         fp8    nvfp4      qdq    (outputs included)
    quantize              2           3   2.5625        4
    rmsnorm               2           3   2.5625        4
    rmsnorm, residual     4           7   6.5625        8    (2 for the new residual)
    silu_mul              4           5   4.5625        6

Kept rows: ``slots`` int32 [M] and ``kept`` bfloat16 [R, K] go together. Where ``slots[m]`` is not -1, the BF16 row
``y[m]`` is also written to ``kept[slots[m]]``, 2 bytes an element; no other row of ``kept`` changes. The caller fills
the slots: they are not checked against R, and no two rows may name the same one.

No program looks at another row, so a row's bits depend on nothing else. Arithmetic is FP32 without FMA contraction
(``enable_fp_fusion=False``), divisions are IEEE (``tl.div_rn``; Triton's ``/`` is not). Nothing synchronises,
everything can be captured in a CUDA graph, M = 0 is fine.

Refused (ValueError): tensors that are not contiguous CUDA tensors of the dtype and shape named, K not a positive
multiple of 16, an unknown format, "fp8" on a GPU below SM89, ``slots`` without ``kept`` or the reverse.
"""

import functools

import torch
import triton
import triton.language as tl

FORMATS = ("fp8", "nvfp4", "qdq")

# of a row, at most, in each thread (beyond K = 32768 there are more, and not all in registers). An SM90 multiprocessor
# then holds two or three rows of 12288 at a time, seven to ten of 4096: 900 to 1500 threads.
_ELEMENTS = 32


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
    _require(x, "x", ("M", "K"))
    return _launch("rows", fmt, x, x.shape[1], slots=slots, kept=kept)


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
    """RMSNorm of ``x`` bfloat16 [M, K] with ``weight`` bfloat16 [K], then ``quantize``: results as there.

    With ``residual`` bfloat16 [M, K], t = x + residual in FP32 takes the place of x, and ``residual`` becomes bf16(t)
    in place. As in the kernels that SGLang runs (``sgl_kernel.fused_add_rmsnorm``: flashinfer's in CuTe DSL, else its
    norm.cuh; one arithmetic), the norm is that of the unrounded t: ``y = bf16((t * r) * weight)``,
    ``r = rsqrt(sum(t^2) / K + eps)``, ``rsqrt`` approximate.

    The new residual is theirs bit for bit. ``r`` is not: the sum has another order, so r may differ by about 2^-22 of
    itself. That moves an element of y by one BF16 step where it lies so close to a rounding boundary, about one in
    10^4. Its code follows one time in ten; if it is the row's largest, so does the scale, and with it several per cent
    of the row's codes. Expect below 10^-4 of all codes and 10^-3 of all scales to differ.
    """
    _require(x, "x", ("M", "K"))
    _require(weight, "weight", (x.shape[1],))
    if residual is not None:
        _require(residual, "residual", (*x.shape,))
    return _launch("norm", fmt, x, x.shape[1], weight=weight, residual=residual, eps=eps, slots=slots, kept=kept)


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
    _require(gate_up, "gate_up", ("M", "2*K"))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have 2*K columns, got {gate_up.shape[1]}")
    return _launch("silu", fmt, gate_up, gate_up.shape[1] // 2, slots=slots, kept=kept)


def _launch(
    source: str,
    fmt: str,
    x: torch.Tensor,
    k: int,
    *,
    weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    m = x.shape[0]
    if k == 0 or k % 16:
        raise ValueError(f"K must be a positive multiple of 16, got {k}")
    if slots is not None and kept is not None:
        _require(slots, "slots", (m,), torch.int32)
        _require(kept, "kept", ("R", k))
    elif slots is not None or kept is not None:
        raise ValueError("slots and kept must be given together")
    results = _empty_results(fmt, m, k, x.device)
    programs, words = m, results
    if fmt == "nvfp4":  # the programs beyond M zero the padding; eight codes are one word
        programs, words = results[1].shape[0], (results[0].view(torch.int32), results[1].view(torch.uint8), results[2])
    if m:
        warps = _warps(k)
        _quantize_rows[(programs,)](
            x,
            weight,
            residual,
            slots,
            kept,
            *(*words, None, None)[:3],
            m,
            eps,
            K=k,
            BLOCKS=16 * warps,
            SOURCE=source,
            FORMAT=fmt,
            SM=_sm(x.device),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return results


def _warps(k: int) -> int:
    warps: int = triton.next_power_of_2(triton.cdiv(k, 32 * _ELEMENTS))
    return min(warps, 32)


def _empty_results(fmt: str, m: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(map(repr, FORMATS))}, got {fmt!r}")
    if fmt == "qdq":
        return (torch.empty((m, k), dtype=torch.bfloat16, device=device),)
    if fmt == "nvfp4":
        packed = torch.empty((m, k // 2), dtype=torch.uint8, device=device)
        tiles = (triton.cdiv(m, 128) * 128, triton.cdiv(k, 64) * 4)
        scales = torch.empty(tiles, dtype=torch.float8_e4m3fn, device=device)
        return packed, scales, torch.empty((m,), dtype=torch.float32, device=device)
    if device.type == "cuda" and _capability(device) < (8, 9):
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or newer, got {_capability(device)}")
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty((m, 1), dtype=torch.float32, device=device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _sm(device: torch.device) -> int:
    """As in ``sm_90``; 0 for Triton's interpreter, which has no inline PTX."""
    major, minor = _capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def _require(
    tensor: torch.Tensor, name: str, shape: tuple[int | str, ...], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Sizes that are names (``"M"``) may be anything."""
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or not tensor.is_contiguous():
        wanted = f"{dtype} [{', '.join(map(str, shape))}]"
        found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous {wanted}, got {found}")


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
    SM: tl.constexpr,
) -> None:
    """One program for each row; pointers that a case does not need are None.

    A row is a tuple of FP32 chunks [BLOCKS, 16], all its values BF16's. BLOCKS is 16 for each warp, so that a thread
    has eight neighbours of a chunk: 16 bytes of BF16 to a load, and no block of 16 in more than two threads.
    """
    row = tl.program_id(0).to(tl.int64)
    if FORMAT == "nvfp4" and row >= rows:
        _zero_scales(scale_ptr, row, K, BLOCKS)
        return
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row).to(tl.int64)  # early: it arrives together with the row
    if SOURCE == "norm":
        if residual_ptr is not None:
            residual_ptr += row * K
        y = _norm(x_ptr + row * K, residual_ptr, weight_ptr, eps, K, BLOCKS, SM)
    elif SOURCE == "silu":
        y = _silu(x_ptr + row * 2 * K, K, BLOCKS, SM)
    else:
        y = _load_row(x_ptr + row * K, K, BLOCKS)
    if slots_ptr is not None and slot >= 0:
        _store_row(kept_ptr + slot * K, y, K, BLOCKS)
    if FORMAT == "fp8":
        _store_fp8(out_ptr + row * K, scale_ptr + row, y, K, BLOCKS)
    elif FORMAT == "nvfp4":
        _store_nvfp4(out_ptr + row * (K // 8), scale_ptr, row_scale_ptr + row, row, y, K, BLOCKS, SM)
    else:
        _store_qdq(out_ptr + row * K, y, K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _load_row(row_ptr: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tuple:
    """A BF16 row; beyond K it is zero."""
    row: tl.tuple = ()
    for start in tl.static_range(0, K, BLOCKS * 16):
        row += (_load(row_ptr, start, K, BLOCKS),)
    return row


@triton.jit  # type: ignore[untyped-decorator]
def _store_row(row_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    for i in tl.static_range(len(row)):
        _store(row_ptr, i * BLOCKS * 16, row[i].to(tl.bfloat16), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _load(row_ptr: tl.tensor, START: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tensor:
    column = START // 2 + tl.arange(0, BLOCKS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    pair_ptr = row_ptr.to(tl.pointer_type(tl.uint32)) + column
    pair = tl.load(pair_ptr) if START + BLOCKS * 16 <= K else tl.load(pair_ptr, mask=column < K // 2, other=0)
    return _halves(pair, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _halves(pair: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """FP32 [BLOCKS, 16] of the BF16 pairs in words [BLOCKS, 8], one instruction for each."""
    low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [BLOCKS, 16])


@triton.jit  # type: ignore[untyped-decorator]
def _store(row_ptr: tl.tensor, START: tl.constexpr, value: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    column = START + tl.arange(0, BLOCKS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    if START + BLOCKS * 16 <= K:
        tl.store(row_ptr + column, value)
    else:
        tl.store(row_ptr + column, value, mask=column < K)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tuple:
    t = _load_row(x_ptr, K, BLOCKS)
    if residual_ptr is not None:  # loads do not move up past stores, so all of them come first
        t = _sum(t, _load_row(residual_ptr, K, BLOCKS))
        _store_row(residual_ptr, t, K, BLOCKS)
    squares = t[0] * t[0]
    for i in tl.static_range(1, len(t)):
        squares += t[i] * t[i]
    r = tl.rsqrt(tl.div_rn(tl.sum(squares), K * 1.0) + eps)
    y: tl.tuple = ()
    for i in tl.static_range(len(t)):
        weight = _load(weight_ptr, i * BLOCKS * 16, K, BLOCKS)
        y += (_rounded(t[i] * r * weight, BLOCKS, SM),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _sum(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    total: tl.tuple = ()
    for i in tl.static_range(len(a)):
        total += (a[i] + b[i],)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _silu(gate_ptr: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr, SM: tl.constexpr) -> tl.tuple:
    """exp2 and rsqrt flush subnormals, which changes nothing here: 1 + e is at least 1, and is 1 long before e gets
    subnormal. An IEEE division for each element would take a third of the instructions that memory leaves time for."""
    y: tl.tuple = ()
    for start in tl.static_range(0, K, BLOCKS * 16):
        gate = _load(gate_ptr, start, K, BLOCKS)
        up = _load(gate_ptr + K, start, K, BLOCKS)
        root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
        y += (_rounded(gate * root * root * up, BLOCKS, SM),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _largest(y: tl.tuple) -> tl.tensor:
    """The bits of the row's largest magnitude, at least those of infinity if the row is not finite."""
    largest = tl.abs(y[0])
    for i in tl.static_range(1, len(y)):
        largest = tl.maximum(largest, tl.abs(y[i]), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(largest.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def _store_fp8(row_ptr: tl.tensor, scale_ptr: tl.tensor, y: tl.tuple, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    """No clamp is needed: |y| / scale exceeds 448 by two roundings at most, and E4M3 rounds that to 448."""
    scale = tl.div_rn(_largest(y).to(tl.float32, bitcast=True), 448.0).to(tl.int32, bitcast=True)
    scale = tl.maximum(scale, 0x00800000).to(tl.float32, bitcast=True)  # 2^-126; compared as integers, NaN stays
    tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(y)):
        _store(row_ptr, i * BLOCKS * 16, (y[i] * inverse).to(tl.float8e4nv), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_qdq(row_ptr: tl.tensor, y: tl.tuple, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    row_scale, inverse = _row_scale(_largest(y))
    for i in tl.static_range(len(y)):
        value, scale = _nvfp4_blocks(y[i], inverse)
        value = (value * (scale * row_scale)[:, None]).to(tl.int32, bitcast=True)
        value = (value | _sign(y[i])).to(tl.float32, bitcast=True)
        _store(row_ptr, i * BLOCKS * 16, value.to(tl.bfloat16), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_nvfp4(
    row_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    row: tl.tensor,
    y: tl.tuple,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """Eight codes make a 32-bit word, the first code lowest; a block's maximum serves its row too.

    Instructions are scarce: an H200 issues 17 for each element in the time that ``quantize`` needs for its bytes.
    """
    magnitudes: tl.tuple = ()
    for i in tl.static_range(len(y)):
        magnitudes += (_block_maximum(y[i], BLOCKS),)
    largest = _largest(magnitudes)
    row_scale, inverse = _row_scale(largest)
    tl.store(row_scale_ptr, row_scale)
    finite = largest < 0x7F800000
    scaled = y
    factor = inverse
    if SM >= 100:
        scaled = _times(y, inverse)
    elif largest >= 0x70000000:  # 2^97: inverse * encode would be too small for a normal float
        scaled = _times(y, 5.421010862427522e-20)  # 2^-64
        factor = inverse * 1.8446744073709552e19
    for i in tl.static_range(len(y)):
        scale = _block_scale(magnitudes[i] * inverse)
        if SM >= 100:
            word = _e2m1_words(scaled[i], tl.minimum(tl.div_rn(1.0, scale), 3.4028234663852886e38), BLOCKS)
        else:
            encode = tl.minimum(_half_encode(scale) * factor, 3.4028234663852886e38)
            word = _words(y[i], scaled[i], encode, BLOCKS, SM)
        word = tl.where(finite, word, 0)
        column = i * BLOCKS * 2 + tl.arange(0, BLOCKS * 2)
        if (i + 1) * BLOCKS * 2 <= K // 8:
            tl.store(row_ptr + column, word)
        else:
            tl.store(row_ptr + column, word, mask=column < K // 8)
        # 2^-120 makes E4M3's subnormals FP32's
        byte = (scale * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20
        _store_scales(scale_ptr, row, i * BLOCKS, tl.where(finite, byte, 0), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _times(y: tl.tuple, factor: tl.tensor) -> tl.tuple:
    product: tl.tuple = ()
    for i in tl.static_range(len(y)):
        product += (y[i] * factor,)
    return product


@triton.jit  # type: ignore[untyped-decorator]
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def _block_maximum(y: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    return tl.reduce(tl.reduce(tl.reshape(tl.abs(y), [BLOCKS, 2, 8]), 2, _larger), 1, _larger)


@triton.jit  # type: ignore[untyped-decorator]
def _half_encode(scale: tl.tensor) -> tl.tensor:
    """What to multiply magnitudes by, so that the product in FP16, rounded to one fraction bit, is the E2M1 code.

    2^-14 makes E2M1's subnormals FP16's. y has 8 bits and the scale S/8 * 2^n 4, so y/scale is either a tie of E2M1 or
    further than 1/240 from it: FP16 keeps the sides apart and swallows an approximate 1/scale, and a tie stays one. The
    reference's FP32 product leaves a tie only where 1/scale was rounded, always upwards: for S = 13 and 14 at ties that
    go up to the even code anyway, for S = 15 at all but .25, hence 2^-10 more, which FP16 swallows at .25 alone. At
    scale 0 the reference multiplies by the largest float, below 2^128: its ties go down, hence 2^-10 less.
    """
    c = tl.where((scale.to(tl.int32, bitcast=True) & 0x700000) == 0x700000, 6.109476089477539e-05, 6.103515625e-05)
    root = tl.rsqrt(scale)
    return tl.minimum(root * root * c, 2.0749025997443246e34)  # 2^114 * (1 - 2^-10)


@triton.jit  # type: ignore[untyped-decorator]
def _words(y: tl.tensor, scaled: tl.tensor, encode: tl.tensor, BLOCKS: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """Codes of ``scaled * encode`` with the signs of ``y``, which is ``scaled`` times a power of two."""
    code = tl.minimum(tl.abs(scaled) * encode[:, None], 0.0003662109375)  # 6 * 2^-14
    low, high = tl.split(tl.reshape(code, [BLOCKS * 2, 2, 2, 2]))
    pair = _pair(low, high, tl.float16, SM)
    pair += ((pair >> 9) & 0x00010001) + 0x00FF00FF  # to nearest even at bit 9
    low, high = tl.split(tl.reshape(y, [BLOCKS * 2, 2, 2, 2]))
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    pair |= ((low >> 16) | (high & 0xFFFF0000)) & 0x80008000
    # sign and code are bits 7 and 3 to 1 of each half's upper byte; gather the upper bytes of four pairs in two words
    first, second = tl.split(pair)
    first = ((first >> 8) & 0x00FF00FF) | (second & 0xFF00FF00)
    first, second = tl.split(first)
    even = (first & 0xFFFF) | (second << 16)
    odd = (first >> 16) | (second & 0xFFFF0000)
    word = ((even >> 1) & 0x07070707) | ((even >> 4) & 0x08080808)
    word |= ((odd << 3) & 0x70707070) | (odd & 0x80808080)
    return word.to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(low: tl.tensor, high: tl.tensor, FORMAT: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """Two FP32 to the halves of a word, rounded to FP16 or BF16: one instruction, where Triton's conversions take
    two slow ones and two to put the halves together."""
    if SM == 0:
        low = low.to(FORMAT).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(FORMAT).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    elif FORMAT.is_fp16():
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(y: tl.tensor, BLOCKS: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """To BF16 and back."""
    low, high = tl.split(tl.reshape(y, [BLOCKS, 8, 2]))
    return _halves(_pair(low, high, tl.bfloat16, SM), BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _e2m1_words(y: tl.tensor, encode: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """The instruction of SM100 and later; it saturates, and keeps the sign of zero."""
    a, b = tl.split(tl.reshape(y * encode[:, None], [BLOCKS * 2, 2, 2, 2]))
    word = tl.inline_asm_elementwise(
        "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, $2, $1; cvt.u32.u8 $0, c; }",
        "=r,f,f",
        [a, b],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )
    first, second = tl.split(word)
    first, second = tl.split(first | (second << 8))
    return (first | (second << 16)).to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _zero_scales(scale_ptr: tl.tensor, row: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    for start in tl.static_range(0, K // 16, BLOCKS):
        _store_scales(scale_ptr, row, start, tl.zeros([BLOCKS], tl.int32), K, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_scales(
    scale_ptr: tl.tensor,
    row: tl.tensor,
    START: tl.constexpr,
    byte: tl.tensor,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Scales of BLOCKS blocks from START on, in the 128x4 layout; those that pad K/16 to a multiple of four are zero
    because ``_load`` is zero beyond K."""
    padded: tl.constexpr = (K + 63) // 64 * 4
    twice = tl.arange(0, BLOCKS * 2)  # two threads share a block; in any other order this goes through shared memory
    block = twice // 2
    byte = tl.reshape(tl.broadcast_to(byte[:, None], [BLOCKS, 2]), [BLOCKS * 2])
    offset = row // 128 * (padded * 128) + row % 32 * 16 + row % 128 // 32 * 4  # of the row
    offset += START * 128 + (block // 4 * 512 + block % 4)  # START is a multiple of four
    tl.store(scale_ptr + offset, byte.to(tl.uint8), mask=(twice % 2 == 0) & (START + block < padded))


@triton.jit  # type: ignore[untyped-decorator]
def _row_scale(largest: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``formats.nvfp4.row_scales`` from the bits of the row's largest magnitude; and one over it, which is finite."""
    exponent = (largest >> 23) - 138 + ((largest & 0x7FFFFF) > 0x280000).to(tl.int32)
    exponent = tl.where(largest == 0, 0, tl.maximum(exponent, -126))
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < 0x7F800000, scale, float("nan")), inverse


@triton.jit  # type: ignore[untyped-decorator]
def _nvfp4_blocks(y: tl.tensor, inverse: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Magnitudes on the E2M1 grid [BLOCKS, 16] and scales on the E4M3 grid [BLOCKS], both FP32, of ``y * inverse``."""
    scaled = y * inverse
    scale = _block_scale(tl.max(tl.abs(scaled), axis=1))
    encode = tl.minimum(tl.div_rn(1.0, scale), 3.4028234663852886e38)
    return _round_to_grid(tl.minimum(tl.abs(scaled) * encode[:, None], 6.0), 1, 1.0), scale


@triton.jit  # type: ignore[untyped-decorator]
def _block_scale(largest: tl.tensor) -> tl.tensor:
    """On the E4M3 grid, in FP32, from a block's largest magnitude."""
    return _round_to_grid(tl.minimum(largest * 0.16666667163372040, 448.0), 3, 0.015625)


@triton.jit  # type: ignore[untyped-decorator]
def _round_to_grid(x: tl.tensor, FRACTION_BITS: tl.constexpr, LEAST_NORMAL: tl.constexpr) -> tl.tensor:
    """x >= 0 to the nearest float of a small format, ties to even: adding and subtracting 1.5 * 2^23 steps of its grid
    rounds to them. Below the format's least normal the steps stay as they are there."""
    exponent = tl.maximum(x, LEAST_NORMAL).to(tl.int32, bitcast=True) & 0x7F800000
    shift = (exponent + (((23 - FRACTION_BITS) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    return (x + shift) - shift


@triton.jit  # type: ignore[untyped-decorator]
def _sign(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32, bitcast=True) & -0x80000000
