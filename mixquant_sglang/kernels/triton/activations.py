"""Activations quantised where they are made: plain rows, RMSNorm or SiLU, into FP8, NVFP4 or the BF16 values of NVFP4.

One kernel with three sources and three formats, and one for plain rows to NVFP4. A program makes one token row ``y``
(that one: two), rounds it to BF16 as the kernel of the source alone would, holds it in registers and quantises it. So
fused and unfused give the same bits; the numbers are those of ``formats/fp8.py`` and ``formats/nvfp4.py``. Every input
is read once and every output written once. Bytes for each element of ``y``:

    source               in         fp8    nvfp4      qdq    (outputs included)
    quantize              2           3   2.5625        4
    rmsnorm               2           3   2.5625        4
    rmsnorm, residual     4           7   6.5625        8    (2 for the new residual)
    silu_mul              4           5   4.5625        6

Kept rows: ``slots`` int32 [M] and ``kept`` bfloat16 [R, K] go together. Where ``slots[m]`` is not -1, the BF16 row
``y[m]`` is also written to ``kept[slots[m]]``, 2 bytes an element; no other row of ``kept`` changes. The caller fills
the slots: they are not checked against R, and no two rows may name the same one.

Nothing of one row enters another, so a row's bits depend on nothing else. Arithmetic is FP32 without FMA contraction
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
    if m and source == "rows" and fmt == "nvfp4":
        warps = _warps_of_pairs(k)
        _quantize_pairs[(programs // 2,)](
            x,
            slots,
            kept,
            *words,
            m,
            K=k,
            THREADS=32 * warps,
            SM=_sm(x.device),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    elif m:
        warps, split = _shape(source, fmt, k)
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
            THREADS=32 * warps,
            SPLIT=split,
            SOURCE=source,
            FORMAT=fmt,
            SM=_sm(x.device),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return results


def _shape(source: str, fmt: str, k: int) -> tuple[int, bool]:
    """Warps of a program, and whether its rows are SPLIT: the fastest on an H200 for 8192 rows of 4096 and 12288."""
    split = fmt == "nvfp4" and source == "silu"
    warps: int = triton.next_power_of_2(triton.cdiv(k, 32 * (96 if split else 32)))
    return min(warps, 32), split


def _warps_of_pairs(k: int) -> int:
    """The fastest on an H200 for 8192 rows of 4096 and 12288."""
    least, most = (int(triton.next_power_of_2(triton.cdiv(k, 32 * elements))) for elements in (96, 32))
    return max(min(most, 4), min(least, 32))


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
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """One program for each row (plain rows to NVFP4: ``_quantize_pairs``); pointers that a case does not need are None.

    A row is a tuple of pieces: BF16 pairs in uint32 [THREADS, 4], 16 bytes of each to a load. Without SPLIT the pieces
    follow each other, and two threads share a block of 16; with it the two pieces of a pair hold the halves of THREADS
    blocks, so that a thread has whole blocks and computes their scales alone.
    """
    row = tl.program_id(0).to(tl.int64)
    if FORMAT == "nvfp4" and row >= rows:
        _zero_scales(scale_ptr, row, K, THREADS)
        return
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row).to(tl.int64)  # early: it arrives together with the row
    if SOURCE == "norm":
        if residual_ptr is not None:
            residual_ptr += row * K
        y = _norm(x_ptr + row * K, residual_ptr, weight_ptr, eps, K, THREADS, SPLIT, SM)
    elif SOURCE == "silu":
        y = _silu(x_ptr + row * 2 * K, K, THREADS, SPLIT, SM)
    else:
        y = _load_row(x_ptr + row * K, K, THREADS, SPLIT, None)
    if slots_ptr is not None and slot >= 0:
        _store_row(kept_ptr + slot * K, y, K, THREADS, SPLIT)
    if FORMAT == "fp8":
        _store_fp8(out_ptr + row * K, scale_ptr + row, y, K, THREADS)
    elif FORMAT == "nvfp4":
        scales = _store_nvfp4(out_ptr + row * (K // 8), row_scale_ptr + row, y, None, K, THREADS, SPLIT, SM)
        for i in tl.static_range(len(scales)):
            _store_scales(scale_ptr, row, i, scales[i], K, THREADS, SPLIT)
    else:
        _store_qdq(out_ptr + row * K, y, K, THREADS)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _quantize_pairs(
    x_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """Plain rows to NVFP4, two to a program: r and r + 32, whose scales are neighbours in the 128x4 layout. One row's
    scales alone cost the L2 cache as many writes as its codes."""
    program = tl.program_id(0).to(tl.int64)
    row = program // 32 * 64 + program % 32
    after = row + 32
    here, there = row < rows, after < rows
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row, mask=here, other=-1).to(tl.int64)
        slot_after = tl.load(slots_ptr + after, mask=there, other=-1).to(tl.int64)
    y = _load_row(x_ptr + row * K, K, THREADS, True, here)
    z = _load_row(x_ptr + after * K, K, THREADS, True, there)
    if slots_ptr is not None:
        if slot >= 0:
            _store_row(kept_ptr + slot * K, y, K, THREADS, True)
        if slot_after >= 0:
            _store_row(kept_ptr + slot_after * K, z, K, THREADS, True)
    y_scales = _store_nvfp4(out_ptr + row * (K // 8), row_scale_ptr + row, y, here, K, THREADS, True, SM)
    z_scales = _store_nvfp4(out_ptr + after * (K // 8), row_scale_ptr + after, z, there, K, THREADS, True, SM)
    scale_ptr = _scales_of(scale_ptr, row, K)
    for i in tl.static_range(len(y_scales)):
        pair = tl.permute(tl.reshape(tl.join(y_scales[i], z_scales[i]), [THREADS // 4, 4, 2]), (0, 2, 1))
        four = tl.arange(0, THREADS // 4)[:, None] + i * (THREADS // 4)
        byte_ptr = scale_ptr + four * 512 + tl.arange(0, 8)[None, :]
        wanted = tl.broadcast_to(four < (K + 63) // 64, [THREADS // 4, 8])
        tl.store(byte_ptr, tl.reshape(pair.to(tl.uint8), [THREADS // 4, 8]), mask=wanted)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _pieces(K: int, THREADS: int, SPLIT: bool) -> int:
    return 2 * ((K + THREADS * 16 - 1) // (THREADS * 16)) if SPLIT else (K + THREADS * 8 - 1) // (THREADS * 8)


@triton.jit  # type: ignore[untyped-decorator]
def _eighth(i: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr) -> tl.tensor:
    """Where a row's i-th piece lies, in units of eight elements: int32 [THREADS]."""
    thread = tl.arange(0, THREADS)
    return thread * 2 + _begin(i, THREADS, SPLIT) if SPLIT else thread + _begin(i, THREADS, SPLIT)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _begin(i: int, THREADS: int, SPLIT: bool) -> int:
    """Where the first thread's share of a row's i-th piece lies, in units of eight elements."""
    return i // 2 * THREADS * 2 + i % 2 if SPLIT else i * THREADS


@triton.constexpr_function  # type: ignore[untyped-decorator]
def _whole(i: int, K: int, THREADS: int, SPLIT: bool) -> bool:
    """Whether a row's i-th piece ends before column K."""
    return (i // 2 + 1) * THREADS * 16 <= K if SPLIT else (i + 1) * THREADS * 8 <= K


@triton.jit  # type: ignore[untyped-decorator]
def _load_row(
    row_ptr: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, live: tl.tensor
) -> tl.tuple:
    """A BF16 row; it is zero beyond K, and where it is not ``live``, a bool or None for true."""
    row: tl.tuple = ()
    for i in tl.static_range(_pieces(K, THREADS, SPLIT)):
        row += (_load(row_ptr, i, K, THREADS, SPLIT, live),)
    return row


@triton.jit  # type: ignore[untyped-decorator]
def _store_row(row_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr) -> None:
    for i in tl.static_range(len(row)):
        word_ptr = _word_ptr(row_ptr, i, THREADS, SPLIT)
        if _whole(i, K, THREADS, SPLIT):
            tl.store(word_ptr, row[i])
        else:
            tl.store(word_ptr, row[i], mask=_eighth(i, THREADS, SPLIT)[:, None] < K // 8)


@triton.jit  # type: ignore[untyped-decorator]
def _load(
    row_ptr: tl.tensor, i: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, live: tl.tensor
) -> tl.tensor:
    word_ptr = _word_ptr(row_ptr, i, THREADS, SPLIT)
    if _whole(i, K, THREADS, SPLIT):
        return tl.load(word_ptr) if live is None else tl.load(word_ptr, mask=live, other=0)
    else:
        wanted = _and(_eighth(i, THREADS, SPLIT)[:, None] < K // 8, live)
        return tl.load(word_ptr, mask=wanted, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _and(wanted: tl.tensor, live: tl.tensor) -> tl.tensor:
    return wanted if live is None else wanted & live


@triton.jit  # type: ignore[untyped-decorator]
def _word_ptr(row_ptr: tl.tensor, i: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr) -> tl.tensor:
    """What differs between pieces comes last, as a constant: a part of the load, not an addition of 64 bits."""
    column = _eighth(0, THREADS, SPLIT)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return row_ptr.to(tl.pointer_type(tl.uint32)) + column + _begin(i, THREADS, SPLIT) * 4


@triton.jit  # type: ignore[untyped-decorator]
def _halves(words: tl.tensor, THREADS: tl.constexpr) -> tl.tensor:
    """FP32 [THREADS, 8] of the BF16 pairs in ``words`` [THREADS, 4], one instruction for each."""
    low, high = (words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [THREADS, 8])


@triton.jit  # type: ignore[untyped-decorator]
def _words(y: tl.tensor, THREADS: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """FP32 [THREADS, 8] rounded to BF16 pairs."""
    low, high = tl.split(tl.reshape(y, [THREADS, 4, 2]))
    return _pair(low, high, tl.bfloat16, SM)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tuple:
    x = _load_row(x_ptr, K, THREADS, SPLIT, None)
    t: tl.tuple = ()
    if residual_ptr is not None:  # loads do not move up past stores, so all of them come first
        residual = _load_row(residual_ptr, K, THREADS, SPLIT, None)
        added: tl.tuple = ()
        for i in tl.static_range(len(x)):
            t += (_halves(x[i], THREADS) + _halves(residual[i], THREADS),)
            added += (_words(t[i], THREADS, SM),)
        _store_row(residual_ptr, added, K, THREADS, SPLIT)
    else:
        for i in tl.static_range(len(x)):
            t += (_halves(x[i], THREADS),)
    squares = t[0] * t[0]
    for i in tl.static_range(1, len(t)):
        squares += t[i] * t[i]
    r = tl.rsqrt(tl.div_rn(tl.sum(squares), K * 1.0) + eps)
    y: tl.tuple = ()
    for i in tl.static_range(len(t)):
        weight = _halves(_load(weight_ptr, i, K, THREADS, SPLIT, None), THREADS)
        y += (_words(t[i] * r * weight, THREADS, SM),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _silu(
    gate_ptr: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, SM: tl.constexpr
) -> tl.tuple:
    """exp2 and rsqrt flush subnormals, which changes nothing here: 1 + e is at least 1, and is 1 long before e gets
    subnormal. An IEEE division for each element would take a third of the instructions that memory leaves time for."""
    y: tl.tuple = ()
    for i in tl.static_range(_pieces(K, THREADS, SPLIT)):
        gate = _halves(_load(gate_ptr, i, K, THREADS, SPLIT, None), THREADS)
        up = _halves(_load(gate_ptr + K, i, K, THREADS, SPLIT, None), THREADS)
        root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
        y += (_words(gate * root * root * up, THREADS, SM),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _largest(y: tl.tuple) -> tl.tensor:
    """The bits of the row's largest magnitude, at least those of infinity if the row is not finite."""
    largest = tl.abs(y[0])
    for i in tl.static_range(1, len(y)):
        largest = tl.maximum(largest, tl.abs(y[i]), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(largest.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def _all_halves(row: tl.tuple, THREADS: tl.constexpr) -> tl.tuple:
    y: tl.tuple = ()
    for i in tl.static_range(len(row)):
        y += (_halves(row[i], THREADS),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _store_fp8(row_ptr: tl.tensor, scale_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    """No clamp is needed: |y| / scale exceeds 448 by two roundings at most, and E4M3 rounds that to 448."""
    y = _all_halves(row, THREADS)
    scale = tl.div_rn(_largest(y).to(tl.float32, bitcast=True), 448.0).to(tl.int32, bitcast=True)
    scale = tl.maximum(scale, 0x00800000).to(tl.float32, bitcast=True)  # 2^-126; compared as integers, NaN stays
    tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(y)):
        _store(row_ptr, i, (y[i] * inverse).to(tl.float8e4nv), K, THREADS)


@triton.jit  # type: ignore[untyped-decorator]
def _store_qdq(row_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    y = _all_halves(row, THREADS)
    row_scale, inverse = _row_scale(_largest(y))
    for i in tl.static_range(len(y)):
        blocks = tl.reshape(y[i], [THREADS // 2, 16])
        value, scale = _nvfp4_blocks(blocks, inverse)
        value = (value * (scale * row_scale)[:, None]).to(tl.int32, bitcast=True)
        value = (value | _sign(blocks)).to(tl.float32, bitcast=True)
        _store(row_ptr, i, tl.reshape(value.to(tl.bfloat16), [THREADS, 8]), K, THREADS)


@triton.jit  # type: ignore[untyped-decorator]
def _store(row_ptr: tl.tensor, i: tl.constexpr, value: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    """The i-th piece [THREADS, 8] of a row that is not SPLIT."""
    column = _eighth(0, THREADS, False)[:, None] * 8 + tl.arange(0, 8)[None, :]
    value_ptr = row_ptr + column + _begin(i, THREADS, False) * 8
    if _whole(i, K, THREADS, False):
        tl.store(value_ptr, value)
    else:
        tl.store(value_ptr, value, mask=_eighth(i, THREADS, False)[:, None] < K // 8)


@triton.jit  # type: ignore[untyped-decorator]
def _store_nvfp4(
    row_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    y: tl.tuple,
    live: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tuple:
    """The codes and the row scale of a row, if it is ``live``; returns the block scales' bytes, int32 [blocks] each.

    Eight codes make a 32-bit word, the first code lowest; a block's maximum serves its row too.

    Instructions are scarce: an H200 issues 17 for each element in the time that ``quantize`` needs for its bytes, and
    half as many of those that are not multiplications or additions.
    """
    magnitudes: tl.tuple = ()
    for i in tl.static_range(0, len(y), 2 if SPLIT else 1):
        magnitudes += (_block_maximum(y[i], y[i + 1] if SPLIT else y[i], THREADS, SPLIT, SM),)
    largest = tl.max(_largest_of(magnitudes))
    row_scale, inverse = _row_scale(largest)
    tl.store(row_scale_ptr, row_scale, mask=live)
    finite = largest < 0x7F800000
    factor = inverse
    scaled = y
    if SM < 100 and largest >= 0x70000000:  # 2^97: inverse * encode would be too small for a normal float
        scaled = _times(y, 5.421010862427522e-20, THREADS, SM)  # 2^-64
        factor = inverse * 1.8446744073709552e19
    scales: tl.tuple = ()
    for block in tl.static_range(len(magnitudes)):
        scale = _block_scale(magnitudes[block].to(tl.float32, bitcast=True) * inverse)
        if SM >= 100:
            encode = tl.minimum(tl.div_rn(1.0, scale), 3.4028234663852886e38)
        else:
            encode = tl.minimum(_half_encode(scale) * factor, 3.4028234663852886e38)
        if SPLIT:
            first = _codes(scaled[block * 2], encode, inverse, THREADS, SM)
            second = _codes(scaled[block * 2 + 1], encode, inverse, THREADS, SM)
            codes = tl.where(finite, tl.join(first, second), 0).to(tl.int32, bitcast=True)
            column = tl.arange(0, THREADS)[:, None] * 2 + tl.arange(0, 2)[None, :]
            wanted = tl.broadcast_to(_eighth(block * 2, THREADS, True)[:, None] < K // 8, [THREADS, 2])
        else:
            encode = tl.reshape(tl.broadcast_to(encode[:, None], [THREADS // 2, 2]), [THREADS])
            codes = tl.where(finite, _codes(scaled[block], encode, inverse, THREADS, SM), 0).to(tl.int32, bitcast=True)
            column = tl.arange(0, THREADS)
            wanted = _eighth(block, THREADS, False) < K // 8
        code_ptr = row_ptr + column + block * THREADS * (2 if SPLIT else 1)
        if _whole(block * 2 if SPLIT else block, K, THREADS, SPLIT):
            tl.store(code_ptr, codes, mask=live)
        else:
            tl.store(code_ptr, codes, mask=_and(wanted, live))
        # 2^-120 makes E4M3's subnormals FP32's
        byte = (scale * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20
        scales += (tl.where(finite, byte, 0),)
    return scales


@triton.jit  # type: ignore[untyped-decorator]
def _times(row: tl.tuple, factor: tl.constexpr, THREADS: tl.constexpr, SM: tl.constexpr) -> tl.tuple:
    product: tl.tuple = ()
    for i in tl.static_range(len(row)):
        product += (_words(_halves(row[i], THREADS) * factor, THREADS, SM),)
    return product


@triton.jit  # type: ignore[untyped-decorator]
def _four(words: tl.tensor, THREADS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The columns of ``words`` [THREADS, 4]."""
    even, odd = tl.split(tl.reshape(words, [THREADS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit  # type: ignore[untyped-decorator]
def _block_maximum(
    first: tl.tensor, second: tl.tensor, THREADS: tl.constexpr, SPLIT: tl.constexpr, SM: tl.constexpr
) -> tl.tensor:
    """int32 [blocks]: the bits of the FP32 magnitude, at least those of infinity if one is not finite."""
    a, b, c, d = _four(first, THREADS)
    largest = _larger_pair(_larger_pair(a, b, SM), _larger_pair(c, d, SM), SM)
    if SPLIT:
        a, b, c, d = _four(second, THREADS)
        other = _larger_pair(_larger_pair(a, b, SM), _larger_pair(c, d, SM), SM)
        largest = _larger_pair(largest, other, SM)
    low, high = (largest << 16) & 0x7FFF0000, largest & 0x7FFF0000
    largest = tl.maximum(low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True))
    return largest if SPLIT else tl.max(tl.reshape(largest, [THREADS // 2, 2]), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _larger_pair(a: tl.tensor, b: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """The larger magnitudes of two BF16 pairs, with any sign; NaN is larger than anything."""
    if SM < 86:
        high = tl.maximum((a & 0x7FFF0000).to(tl.int32, bitcast=True), (b & 0x7FFF0000).to(tl.int32, bitcast=True))
        low = tl.maximum((a & 0x7FFF).to(tl.int32, bitcast=True), (b & 0x7FFF).to(tl.int32, bitcast=True))
        return (high | low).to(tl.uint32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator]
def _largest_of(magnitudes: tl.tuple) -> tl.tensor:
    largest = magnitudes[0]
    for i in tl.static_range(1, len(magnitudes)):
        largest = tl.maximum(largest, magnitudes[i])
    return largest


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
def _codes(
    words: tl.tensor, encode: tl.tensor, inverse: tl.tensor, THREADS: tl.constexpr, SM: tl.constexpr
) -> tl.tensor:
    """uint32 [THREADS]: the codes of BF16 pairs [THREADS, 4] times ``encode``, from SM100 on times ``inverse`` too."""
    a, b, c, d = _four(words, THREADS)
    if SM >= 100:
        first = _e2m1_pair(a, inverse, encode) | (_e2m1_pair(b, inverse, encode) << 8)
        second = _e2m1_pair(c, inverse, encode) | (_e2m1_pair(d, inverse, encode) << 8)
        return first | (second << 16)
    else:
        first = _bytes(_code_pair(a, encode, SM), _code_pair(b, encode, SM), 0x7351, SM)
        second = _bytes(_code_pair(c, encode, SM), _code_pair(d, encode, SM), 0x7351, SM)
        even, odd = _bytes(first, second, 0x5410, SM), _bytes(first, second, 0x7632, SM)
        return _merged(even >> 4, odd, SM)


@triton.jit  # type: ignore[untyped-decorator]
def _code_pair(word: tl.tensor, encode: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """Sign and E2M1 code of a BF16 pair, in the upper four bits of each half; below them is anything."""
    low = (word << 16).to(tl.float32, bitcast=True) * encode
    high = (word & 0xFFFF0000).to(tl.float32, bitcast=True) * encode
    pair = _clamped(_pair(low, high, tl.float16, SM), SM)
    pair += ((pair >> 9) & 0x00010001) + 0x00FF00FF  # to nearest even at bit 9
    return (pair << 3) | (word & 0x80008000)


@triton.jit  # type: ignore[untyped-decorator]
def _clamped(pair: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """FP16 magnitudes of at most 6 * 2^-14, E2M1's largest; NaN is that too. The sign is kept, or lost."""
    if SM < 86:
        low, high = pair & 0x7FFF, pair & 0x7FFF0000
        return tl.minimum(low, 0x0E00) | tl.minimum(high, 0x0E000000)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 six; mov.b32 six, 0x0E000E00; min.xorsign.abs.f16x2 $0, $1, six; }",
            "=r,r",
            [pair],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _bytes(a: tl.tensor, b: tl.tensor, SELECTOR: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """Four of the eight bytes of a and b, as PTX's prmt numbers them."""
    if SM == 0:
        result = a & 0
        for i in tl.static_range(4):
            byte: tl.constexpr = SELECTOR >> (4 * i) & 7
            result |= (((b if byte >= 4 else a) >> (byte % 4 * 8)) & 0xFF) << (8 * i)
        return result
    elif SELECTOR == 0x7351:
        return _prmt(a, b, "prmt.b32 $0, $1, $2, 0x7351;")
    elif SELECTOR == 0x5410:
        return _prmt(a, b, "prmt.b32 $0, $1, $2, 0x5410;")
    else:
        tl.static_assert(SELECTOR == 0x7632)
        return _prmt(a, b, "prmt.b32 $0, $1, $2, 0x7632;")


@triton.jit  # type: ignore[untyped-decorator]
def _prmt(a: tl.tensor, b: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _merged(low: tl.tensor, high: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """The lower four bits of each byte of ``low`` and the upper ones of ``high``."""
    if SM == 0:
        return (low & 0x0F0F0F0F) | (high & 0xF0F0F0F0)
    else:
        return _prmt(low, high, "lop3.b32 $0, $1, $2, 0x0F0F0F0F, 0xE4;")


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
def _e2m1_pair(word: tl.tensor, inverse: tl.tensor, encode: tl.tensor) -> tl.tensor:
    """The instruction of SM100 and later; it saturates, and keeps the sign of zero."""
    low = (word << 16).to(tl.float32, bitcast=True) * inverse * encode
    high = (word & 0xFFFF0000).to(tl.float32, bitcast=True) * inverse * encode
    return tl.inline_asm_elementwise(
        "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, $2, $1; cvt.u32.u8 $0, c; }",
        "=r,f,f",
        [low, high],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _zero_scales(scale_ptr: tl.tensor, row: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    for i in tl.static_range((K // 16 + THREADS - 1) // THREADS):
        _store_scales(scale_ptr, row, i, tl.zeros([THREADS], tl.int32), K, THREADS, True)


@triton.jit  # type: ignore[untyped-decorator]
def _store_scales(
    scale_ptr: tl.tensor,
    row: tl.tensor,
    i: tl.constexpr,
    byte: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Scales of the i-th THREADS blocks, or half as many where they are not SPLIT, in the 128x4 layout; those that pad
    K/16 to a multiple of four are zero because ``_load`` is zero beyond K."""
    padded: tl.constexpr = (K + 63) // 64 * 4
    thread = tl.arange(0, THREADS)
    scale_ptr = _scales_of(scale_ptr, row, K)
    blocks: tl.constexpr = THREADS if SPLIT else THREADS // 2
    if SPLIT:
        block = thread
        wanted = i * blocks + block < padded
    else:  # two threads share a block; in any other order this goes through shared memory
        block = thread // 2
        byte = tl.reshape(tl.broadcast_to(byte[:, None], [blocks, 2]), [THREADS])
        wanted = (thread % 2 == 0) & (i * blocks + block < padded)
    byte_ptr = scale_ptr + (block // 4 * 512 + block % 4) + i * blocks * 128
    if SPLIT and (i + 1) * blocks <= padded:
        tl.store(byte_ptr, byte.to(tl.uint8))
    else:
        tl.store(byte_ptr, byte.to(tl.uint8), mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def _scales_of(scale_ptr: tl.tensor, row: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Where the first block scale of ``row`` lies in the 128x4 layout."""
    return scale_ptr + row // 128 * ((K + 63) // 64 * 512) + row % 32 * 16 + row % 128 // 32 * 4


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
