"""Our Triton kernels without a GPU: they compile for every architecture, and interpreted give the right numbers."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mixquant_sglang.kernels import triton as package  # noqa: E402
from mixquant_sglang.kernels.triton import (  # noqa: E402
    activations,
    attention,
    block_rows,
    expert_rows,
    expert_units,
    expert_warps,
    few_rows,
    grouped,
    invariant,
    launch,
    norm_rope,
    packed_rows,
    packed_tiles,
    packed_warps,
    row_kernels,
    rows,
    scale_search,
    unpack,
)

Case = tuple[Any, dict[str, str], dict[str, Any], int]


def activations_case(source: str, fmt: str, k: int, residual: bool = False, kept: bool = False) -> Case:
    types = {
        "x_ptr": "*bf16",
        "weight_ptr": "*bf16" if "norm" in source else None,
        "residual_ptr": "*bf16" if residual else None,
        "slots_ptr": "*i32" if kept else None,
        "kept_ptr": "*bf16" if kept else None,
        "out_ptr": {"fp8": "*fp8e4nv", "nvfp4": "*i32", "qdq": "*bf16"}[fmt],
        "scale_ptr": {"fp8": "*fp32", "nvfp4": "*u8", "qdq": None}[fmt],
        "row_scale_ptr": "*fp32" if fmt == "nvfp4" else None,
        "rows": "i32",
        "eps": "fp32",
    }
    warps, split = launch.shape_of(source, fmt, k)
    constants = {"K": k, "THREADS": 32 * warps, "SPLIT": split, "SOURCE": source, "FORMAT": fmt}
    constants |= {name: None for name, kind in types.items() if kind is None}
    return row_kernels.quantize_rows, {name: kind for name, kind in types.items() if kind}, constants, warps


def pairs_case(k: int, kept: bool = False) -> Case:
    types = {"x_ptr": "*bf16", "out_ptr": "*i32", "scale_ptr": "*u8", "row_scale_ptr": "*fp32", "rows": "i32"}
    types |= {"slots_ptr": "*i32", "kept_ptr": "*bf16"} if kept else {}
    warps = launch.warps_of_pairs(k)
    constants: dict[str, Any] = {"K": k, "THREADS": 32 * warps} | (
        {} if kept else {"slots_ptr": None, "kept_ptr": None}
    )
    return row_kernels.quantize_pairs, types, constants, warps


def search_case(dtype: str, weighted: bool = False, strided: bool = False) -> Case:
    types = {"x_ptr": dtype, "weight_ptr": "*fp32", "packed_ptr": "*i32", "scale_ptr": "*u8"}
    types |= dict.fromkeys(("blocks", "row_blocks", "row_stride", "column_stride"), "i32")
    types |= dict.fromkeys(("g", "g_sixth", "g_inverse"), "fp32")
    constants: dict[str, Any] = {"FIRST": -2, "LAST": 6, "GAIN": 1 - 2.0**-14, "BLOCKS": 128}
    constants |= {} if weighted else {"weight_ptr": None}
    constants |= {} if strided else {"column_stride": 1}
    kept = {name: kind for name, kind in types.items() if name not in constants}
    return scale_search._search_scales, kept, constants, 4


def grouped_case(x: str, weight: str, act: str, *, tma: bool, bias: bool = False) -> Case:
    """The tiles of 64 rows; ``tma``: the weight is a descriptor, which only SM90 and newer have."""
    types = {
        "x_ptr": f"*{x}",
        "weight": f"tensordesc<{weight}[64, 128]>" if tma else f"*{weight}",
        "out_ptr": "*bf16",
        "x_scale_ptr": "*fp32" if x != "bf16" or weight != "bf16" else None,
        "weight_scale_ptr": "*fp32",
        "bias_ptr": "*fp32" if bias else None,
        "route_weight_ptr": None if act else "*fp32",
        **dict.fromkeys(("order_ptr", "expert_ptr", "used_ptr"), "*i32"),
        "routes": "i32",
        **dict.fromkeys(("alpha", "limit"), "fp32"),
    }
    constants: dict[str, Any] = {"N": 1536, "K": 2048, "SHARE": 8, "ACT": act, "TMA": tma}
    constants |= {"BM": 64, "BN": 64, "BK": 128, "GROUP": 16, "HALVES": False}
    constants |= {name: None for name, kind in types.items() if kind is None}
    return grouped.grouped_matmul, {name: kind for name, kind in types.items() if kind}, constants, 4


def halved(case: Case) -> Case:
    kernel, types, constants, warps = case
    types = types | {"weight": types["weight"].replace("[64,", "[128,")}
    return kernel, types, constants | {"HALVES": True, "BM": 128, "BN": 128}, 2 * warps


def expert_rows_case(kernel: str, act: str = "", interleaved: bool = False, fmt: str = "bf16") -> Case:
    packed = {"fp8": ("scale_ptr",), "nvfp4": ("scale_ptr", "block_scale_ptr")}.get(fmt, ())
    pointers = {"x_ptr": "*i32" if fmt == "nvfp4" else "*bf16", "weight_ptr": "*u8" if packed else "*bf16"}
    pointers |= {"out_ptr": "*bf16"} | dict.fromkeys(packed, "*fp32")
    pointers |= {"block_scale_ptr": "*u8"} if fmt == "nvfp4" else {}
    pointers |= {"route_weight_ptr": "*fp32", "index_ptr": "*i64", "ids_ptr": "*i32", "slots": "i32"}
    constants: dict[str, Any] = {"bias_ptr": None, "TOP_K": 8, "PAIRS": 512, "SLOTS": 64, "MEMBERS": 16, "LANES": 32}
    constants |= {"I": 768, "H": 2048, "BK": 128, "FORMAT": fmt}
    constants |= {name: None for name in ("scale_ptr", "block_scale_ptr") if name not in pointers}
    if kernel == "_up":
        scalars = dict.fromkeys(("alpha", "limit"), "fp32")
        constants |= {"ACT": act, "INTERLEAVED": interleaved, "BN": 32}
        return expert_rows._up, pointers | scalars, constants, 4
    return expert_rows._down, pointers, constants | {"BN": 64}, 4


def expert_warps_case(fmt: str, act: str, one: bool) -> Case:
    tiles, (n, k) = expert_warps.TILES[fmt, one], (768, 2048) if act else (2048, 768)
    size = k if fmt == "fp8" else k // 2
    tile = packed_tiles._fitting_warps(tiles[0 if act else 1], size)
    types = {
        **{"x_ptr": "*bf16" if fmt == "fp8" else "*i32", "codes_ptr": "*i32", "scale_ptr": "*fp32"},
        "block_scale_ptr": None if fmt == "fp8" else "*u8",
        "bias_ptr": None,
        **{"route_weight_ptr": None if act else "*fp32", "out_ptr": "*bf16", "list_ptr": None if one else "*i32"},
        **{"index_ptr": "*i64", "ids_ptr": "*i32", "lanes": "i32", "alpha": "fp32", "limit": "fp32"},
    }
    constants: dict[str, Any] = {"TOP_K": 8, "MEMBERS": expert_units.MEMBERS, "RECORD": expert_units.RECORD}
    constants |= {"N": n, "K": k, "ACT": act, "BN": tile.n, "PIECES": tile.pieces, "WARPS": tile.warps}
    constants |= {"WHOLE_N": n % tile.n == 0, "WHOLE_K": size % (64 * tile.pieces * tile.warps) == 0}
    constants |= {name: None for name, kind in types.items() if kind is None}
    return expert_warps._expert_warps, {name: kind for name, kind in types.items() if kind}, constants, tile.warps


def norm_rope_case(size: int, tile: norm_rope.Tile, norm: bool = True) -> Case:
    types = dict.fromkeys((f"{x}_ptr" for x in ("q", "out", "k", "v", "keys", "values")), "*bf16")
    types |= dict.fromkeys(("q_weight_ptr", "k_weight_ptr"), "*bf16") if norm else {}
    types |= {"cos_sin_ptr": "*fp32", "positions_ptr": "*i64", "slots_ptr": "*i64"}
    types |= dict.fromkeys((f"{x}_stride" for x in ("q", "out", "k", "v", "keys", "values")), "i32") | {"eps": "fp32"}
    constants: dict[str, Any] = {"QUERIES": 32, "KEYS": 8, "SIZE": size, "HEADS": tile.heads}
    constants |= {} if norm else {"q_weight_ptr": None, "k_weight_ptr": None}
    return norm_rope._norm_rope_write, types, constants, tile.warps


def invariant_case(codes: str, *, scaled: bool, bias: bool, whole: bool) -> Case:
    types = {
        **dict.fromkeys(("x_ptr", "weight_ptr"), f"*{codes}"),
        "out_ptr": "*bf16",
        "x_scale_ptr": "*fp32" if scaled else None,
        "scale_ptr": "*fp32",
        "bias_ptr": "*bf16" if bias else None,
        **dict.fromkeys(("rows", "N", "K", "scale_stride", "out_stride"), "i32"),
    }
    depth = invariant.DEPTH[torch.bfloat16 if codes == "bf16" else torch.float8_e4m3fn]
    constants: dict[str, Any] = dict(zip(("BM", "BN"), invariant.TILE, strict=True))
    constants |= {"BK": depth, "GROUP": 8, "WHOLE": whole} | {name: None for name, kind in types.items() if not kind}
    return invariant._scaled_matmul, {name: kind for name, kind in types.items() if kind}, constants, invariant.WARPS


def packed_rows_case(fp4: bool, tiles: packed_tiles.Tiles, rows: int, placed: bool = False) -> Case:
    types = {
        **dict.fromkeys(("out_ptr", "rest_ptr"), "*bf16"),
        "index_ptr": "*i64" if placed else None,
        "rows_ptr": "*i32" if fp4 else "*bf16",
        "codes_ptr": "*u8",
        "scale_ptr": "*fp32",
        "block_scale_ptr": "*u8" if fp4 else None,
        "bias_ptr": "*bf16" if placed else None,
        "partial_ptr": "*fp32" if tiles.split > 1 else None,
        "lock_ptr": "*i32",
        **dict.fromkeys(("rows", "N", "K", "cut", "out_stride", "rest_stride", "rows_stride"), "i32"),
    }
    constants: dict[str, Any] = {"ROWS": rows, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "SPLIT": tiles.split}
    constants |= {"WHOLE": not placed} | {name: None for name, kind in types.items() if kind is None}
    kept = {name: kind for name, kind in types.items() if kind}
    return packed_rows._packed_rows, kept, constants, tiles.warps


def packed_warps_case(
    fp4: bool,
    tiles: packed_tiles.Warps,
    rows: int,
    placed: bool = False,
    walk: bool = False,
) -> Case:
    types = {
        **dict.fromkeys(("out_ptr", "rest_ptr"), "*bf16"),
        "index_ptr": "*i64" if placed else None,
        "rows_ptr": "*i32" if fp4 else "*bf16",
        "codes_ptr": "*i32",
        "scale_ptr": "*fp32",
        "block_scale_ptr": "*u8" if fp4 else None,
        "bias_ptr": "*bf16" if placed else None,
        **dict.fromkeys(("rows", "N", "units", "cut", "out_stride", "rest_stride", "rows_stride"), "i32"),
    }
    constants: dict[str, Any] = {"ROWS": rows, "BLOCK_N": tiles.n, "PIECES": tiles.pieces, "WARPS": tiles.warps}
    whole = walk or not placed
    constants |= {"UNIT": 4, "WHOLE_N": whole, "WHOLE_K": whole, "WALK": walk}
    constants |= {name: None for name, kind in types.items() if kind is None}
    kept = {name: kind for name, kind in types.items() if kind}
    return packed_warps._packed_warps, kept, constants, tiles.warps


def block_rows_case(rows: int, placed: bool) -> Case:
    types = {
        **dict.fromkeys(("out_ptr", "rest_ptr", "rows_ptr"), "*bf16"),
        "index_ptr": "*i64" if placed else None,
        "codes_ptr": "*u8",
        "scale_ptr": "*fp32",
        "bias_ptr": "*bf16" if placed else None,
        **dict.fromkeys(("rows", "N", "K", "cut", "out_stride", "rest_stride", "rows_stride"), "i32"),
    }
    constants: dict[str, Any] = {"ROWS": rows, "BLOCK_N": block_rows.BLOCK_N, "TILE": 128, "WHOLE": not placed}
    constants |= {name: None for name, kind in types.items() if kind is None}
    return block_rows._block_rows, {name: kind for name, kind in types.items() if kind}, constants, 4


DEEP = {"SOME_K": 128, "MANY_K": 64}

# kernel, types of its arguments, constants, warps: what the launches in the package pass
CASES: dict[str, Case] = {
    "activations_rows_fp8": activations_case("rows", "fp8", 4096),
    "activations_pairs_nvfp4": pairs_case(4096),
    "activations_pairs_kept_nvfp4": pairs_case(208, kept=True),
    "activations_rows_qdq": activations_case("rows", "qdq", 48),
    "activations_norm_fp8": activations_case("norm", "fp8", 4096, residual=True, kept=True),
    "activations_norm_nvfp4": activations_case("norm", "nvfp4", 3584),
    "activations_norm_qdq": activations_case("norm", "qdq", 4096, residual=True),
    "activations_silu_fp8": activations_case("silu", "fp8", 12288, kept=True),
    "activations_silu_nvfp4": activations_case("silu", "nvfp4", 4096),
    "activations_silu_qdq": activations_case("silu", "qdq", 11008),
    "activations_zero_centred_norm_fp8": activations_case("zero_centred_norm", "fp8", 5376, residual=True, kept=True),
    "activations_zero_centred_norm_nvfp4": activations_case("zero_centred_norm", "nvfp4", 3840),
    "activations_zero_centred_norm_qdq": activations_case("zero_centred_norm", "qdq", 2048, residual=True),
    "activations_gelu_fp8": activations_case("gelu", "fp8", 15360, kept=True),
    "activations_gelu_nvfp4": activations_case("gelu", "nvfp4", 21504),
    "activations_gelu_qdq": activations_case("gelu", "qdq", 2112),
    "scale_search": search_case("*bf16"),
    "scale_search_weighted": search_case("*bf16", weighted=True),
    "scale_search_float": search_case("*fp32", strided=True),
    "unpack_weights": (
        unpack._unpack_weights,
        {"packed_ptr": "*u8", "scale_ptr": "*u8", "out_ptr": "*i32", "blocks": "i32"},
        {"BLOCKS": 256},
        4,
    ),
    "gather": (
        rows._gather,
        {"x_ptr": "*bf16", "index_ptr": "*i64", "out_ptr": "*bf16", "columns": "i32", "x_stride": "i32"},
        {"COLUMNS": 2048},
        4,
    ),
    "scatter": (
        rows._scatter,
        {
            "out_ptr": "*bf16",
            "rows_ptr": "*bf16",
            "index_ptr": "*i32",
            "columns": "i32",
            "out_stride": "i32",
            "rows_stride": "i32",
        },
        {"COLUMNS": 2048},
        4,
    ),
    "scale": (
        rows._scale,
        {"out_ptr": "*bf16", "scale_ptr": "*fp32", "columns": "i32", "out_stride": "i32"},
        {"COLUMNS": 2048},
        4,
    ),
    "grouped_tma_up_fp8": grouped_case("fp8e4nv", "fp8e4nv", "silu", tma=True),
    "grouped_tma_down_fp8": grouped_case("fp8e4nv", "fp8e4nv", "", tma=True, bias=True),
    "grouped_tma_halves_fp8": halved(grouped_case("fp8e4nv", "fp8e4nv", "silu", tma=True)),
    "grouped_gelu_fp8": grouped_case("fp8e4nv", "fp8e4nv", "gelu", tma=False),
    "grouped_widened_fp8": grouped_case("bf16", "fp8e4nv", "swiglu_oai", tma=False, bias=True),
    "grouped_bf16": grouped_case("bf16", "bf16", "silu", tma=False),
    "invariant_fp8": invariant_case("fp8e4nv", scaled=True, bias=False, whole=True),
    "invariant_bias_fp8": invariant_case("fp8e4nv", scaled=True, bias=True, whole=False),
    "invariant_bf16": invariant_case("bf16", scaled=False, bias=False, whole=False),
    "expert_rows_up": expert_rows_case("_up", "silu"),
    "expert_rows_up_interleaved": expert_rows_case("_up", "swiglu_oai", interleaved=True),
    "expert_rows_down": expert_rows_case("_down"),
    "expert_rows_up_of_w8": expert_rows_case("_up", "silu", fmt="fp8"),
    "expert_rows_down_of_w8": expert_rows_case("_down", fmt="fp8"),
    "expert_rows_up_of_w4": expert_rows_case("_up", "silu", fmt="nvfp4"),
    "expert_rows_down_of_w4": expert_rows_case("_down", fmt="nvfp4"),
    "expert_units_list": (
        expert_units._list_units,
        {"list_ptr": "*i32", "index_ptr": "*i64", "ids_ptr": "*i32", "slots": "i32"},
        {"TOP_K": 8, "PAIRS": 512, "MEMBERS": expert_units.MEMBERS, "RECORD": expert_units.RECORD, "BINS": 256},
        4,
    ),
    "attention_sample": (
        attention._sample,
        {"k_ptr": "*bf16", "v_ptr": "*bf16", "slots_ptr": "*i32", "out_ptr": "*fp32", "tokens": "i32", "width": "i32"},
        {"TOKENS": 256, "COLUMNS": 32},
        4,
    ),
    "attention_cache_fp8": (
        attention._quantize_cache,
        dict.fromkeys(("k_ptr", "v_ptr"), "*bf16")
        | dict.fromkeys(("low_k_ptr", "low_v_ptr"), "*fp8e4nv")
        | {"slots_ptr": "*i32", "statistics_ptr": "*fp32", "scales_ptr": "*fp32", "count": "i32"},
        {"HEADS": 8, "SIZE": 128, "TOKENS": 64, "LARGEST": 56.0},
        4,
    ),
    "attention_queries_fp8": (
        attention._quantize_queries,
        {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "width": "i32", "stride": "i32"},
        {"COLUMNS": 4096},
        4,
    ),
    "attention_merge": (
        attention._merge,
        dict.fromkeys(("parts_ptr", "out_ptr"), "*bf16")
        | dict.fromkeys(("sums_ptr", "out_sums_ptr"), "*fp32")
        | dict.fromkeys(("rows", "most"), "i32"),
        {"HEADS": 32, "SIZE": 128, "COUNT": 4, "ROWS": 32},
        4,
    ),
    "expert_rows_combine": (
        expert_units._combine,
        {"parts_ptr": "*bf16", "out_ptr": "*bf16", "index_ptr": "*i64", "ids_ptr": "*i32", "scaling": "fp32"},
        {"H": 2048, "TOP_K": 8, "BN": 1024},
        4,
    ),
} | {
    f"few_rows_{name}": (
        few_rows._linear_rows,
        dict.fromkeys(("out_ptr", "rest_ptr", "rows_ptr", "weight_ptr", "bias_ptr"), "*bf16")
        | {"index_ptr": "*i64"}
        | dict.fromkeys(("slots", "N", "cut", "out_stride", "rest_stride", "rows_stride", "weight_stride"), "i32"),
        {"FEW": 16, "GROUP": 128, "HAS_BIAS": 1, "PREFETCH": True, **constants},
        4,
    )
    for name, constants in {
        "4096_of_4096": {"K": 4096, "MANY": 256, "BLOCK_N": 32, "FEW_K": 256, **DEEP, "WHOLE": True},
        "6144_of_4096": {"K": 4096, "MANY": 64, "BLOCK_N": 32, "FEW_K": 128, **DEEP, "WHOLE": True},
        "24576_of_4096": {"K": 4096, "MANY": 256, "BLOCK_N": 64, "FEW_K": 128, **DEEP, "WHOLE": True},
        "one_of_48": {"K": 48, "MANY": 16, "BLOCK_N": 32, "FEW_K": 16, "SOME_K": 16, "MANY_K": 16, "WHOLE": False},
    }.items()
}
CASES |= {f"block_rows_{rows}": block_rows_case(rows, rows > 16) for rows in block_rows.BUCKETS}
CASES |= {
    f"norm_rope_{size}_{i}": norm_rope_case(size, tile)
    for size in (64, 128, 256)
    for i, tile in enumerate(norm_rope.TILES)
}
CASES |= {"rope": norm_rope_case(128, norm_rope.TILES[1], norm=False)}
CASES |= {
    f"packed_rows_{rows}_of_{'w4' if fp4 else 'w8'}{'_placed' if placed else ''}": packed_rows_case(
        fp4, packed_tiles.choose(n, 4096, rows, fp4), rows, placed
    )
    for fp4 in (False, True)
    for n, rows, placed in ((4096, 32, False), (4096, 64, True), (24576, 128, False))
}
CASES |= {
    f"packed_warps_{rows}_of_{n}_{'w4' if fp4 else 'w8'}{'_placed' if placed else ''}": packed_warps_case(
        fp4, packed_tiles.CHOICES[fp4, 8, n >= packed_tiles.WIDE].tiles, rows, placed
    )
    for fp4 in (False, True)
    for n, rows, placed in ((4096, 8, True), (24576, 16, False))
}
CASES |= {
    f"packed_warps_walk_{rows}_of_{n}_{'w4' if fp4 else 'w8'}": packed_warps_case(
        fp4, packed_tiles.CHOICES[fp4, 8, n >= packed_tiles.WIDE].tiles, rows, placed=True, walk=True
    )
    for fp4 in (False, True)
    for n in (4096, 24576)
    for rows in (8, 16, 32)
}


CASES |= {
    f"expert_warps_{'up' if act else 'down'}_of_{fmt}_{'one' if one else 'more'}": expert_warps_case(fmt, act, one)
    for fmt in ("fp8", "nvfp4")
    for act in ("silu", "")
    for one in (False, True)
}


# exp2 and rsqrt of the SiLU and the norm flush subnormals, of which neither has one that matters
# and a product plus minus zero is the product
FLUSHING = ("fma.rn.bf16x2", "ex2.approx.ftz.f32", "rsqrt.approx.ftz.f32")


def test_every_kernel_is_in_the_table() -> None:
    """A kernel is a jit function that no other one calls; device functions are compiled as parts of those."""
    functions = {
        name: value
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        for name, value in vars(importlib.import_module(found.name)).items()
        if isinstance(value, triton.runtime.JITFunction)
    }
    called = {
        node.func.id
        for function in functions.values()
        for node in ast.walk(ast.parse(inspect.getsource(function.fn)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert called >= {"load_row", "store_nvfp4", "_error"}
    assert {kernel.fn.__name__ for kernel, *_ in CASES.values()} == functions.keys() - called


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("case", CASES)
def test_compiles(case: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.endswith("fp8") and capability == 80:
        capability = 89  # the first that has E4M3
    if "tma" in case and capability < 90:
        return  # no such instruction: the package passes a pointer there
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments, constants, warps = CASES[case]
    if case.startswith(("activations", "packed", "block_rows", "expert_rows_up", "expert_rows_down", "expert_warps")):
        constants = constants | {"SM": capability}
    if "EARLY" in kernel.arg_names:
        constants = constants | {"EARLY": capability >= 90}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in arguments.items()
            if kind[0] == "*" or ("warps" in case and name.endswith("_stride"))
        },
    )
    options = {"num_warps": warps, "enable_fp_fusion": False} | ({"num_stages": 1} if "warps" in case else {})
    options |= {"maxnreg": 128} if "walk" in case else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    for instruction in FLUSHING:
        ptx = ptx.replace(instruction, "")
    if "rope" in case:  # which has SGLang's fma, and a row of 128 in loads of 16 bytes
        assert "fma.rn.f32" in ptx and ".ftz" not in ptx
        assert case != "norm_rope_128_1" or ptx.count("ld.global.v4.b32") == 18
    elif "gelu" not in case and "merge" not in case:  # whose erf is libdevice's, and whose logarithm a polynomial
        assert "fma." not in ptx and ".ftz" not in ptx and "div.full" not in ptx  # each would change the numbers
    if "warps" in case:  # weights go from memory to tensor cores; shared memory adds the warps' sums, no more
        # the instruction that sums have, and so their bits, is one for all numbers of rows
        assert set(re.findall(r"mma\.sync\.aligned\.(\w+)", ptx)) == {"m16n8k16"} and "wgmma" not in ptx
        experts = case.startswith("expert_warps")
        rows = constants["BN"] * (2 if constants["ACT"] else 1) if experts else constants["BLOCK_N"]
        sums = 4 * warps * rows * constants["MEMBERS" if experts else "ROWS"]
        products = ptx[: ptx.rindex("mma.sync")]  # behind them sums may be read so
        straight = "ldmatrix" not in products and "cp.async" not in ptx and compiled.metadata.shared <= sums
        assert straight == packed_tiles.STRAIGHT
        served = case.startswith("packed_warps_walk_16") and "w8" in case  # narrow NVFP4 spills, and was timed so
        if (served or experts) and capability == 90 and straight:
            cubin = tmp_path / "cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
            usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
            assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
        loads = rows // 8 * constants["PIECES"]  # 16 bytes of each are read ahead, and before the loop
        assert len(re.findall(r"ld\.global\S*evict_first\S*\.v4\.b32|ld\.global\S*v4\.b32", ptx)) >= 2 * loads
    if case.startswith("activations"):
        e2m1 = "nvfp4" in case and capability >= 100  # has the instruction, and needs the exact quotient
        assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == e2m1
        assert ("div.rn.f32" in ptx) == ("nvfp4" not in case or "norm" in case or e2m1)
        if "nvfp4" in case and not e2m1:
            assert "cvt.rn.f16x2.f32" in ptx and "cvt.rn.f16.f32" not in ptx
        loads = ptx.count("ld.global.v4.b32")  # 16 bytes: eight elements for each thread of 32 * warps
        row = triton.cdiv(constants["K"], 256 * warps)
        if constants.get("SPLIT", True):  # halves of blocks, in pairs
            row = 2 * triton.cdiv(constants["K"], 512 * warps)
        row *= 1 + ("pairs" in case)
        gated = "silu" in case or "gelu" in case
        assert loads == row * (1 + ("weight_ptr" in arguments) + ("residual_ptr" in arguments) + gated)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(4, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    slots, kept = torch.zeros(4, dtype=torch.int32), torch.zeros(9, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "capability", lambda device: (8, 6))
    for call in (
        lambda: activations.quantize(x, "fp4"),
        lambda: activations.quantize(x.float(), "qdq"),
        lambda: activations.quantize(x[0], "qdq"),
        lambda: activations.quantize(x.t(), "qdq"),
        lambda: activations.quantize(x[:, :24].contiguous(), "fp8"),
        lambda: activations.quantize(x[:, :0], "fp8"),
        lambda: activations.quantize(x, "qdq", slots=slots),
        lambda: activations.quantize(x, "qdq", kept=kept),
        lambda: activations.quantize(x, "qdq", slots=slots.long(), kept=kept),
        lambda: activations.quantize(x, "qdq", slots=slots[:3], kept=kept),
        lambda: activations.quantize(x, "qdq", slots=slots, kept=kept[:, :16]),
        lambda: activations.rmsnorm(x, weight[:16], 1e-6, "qdq"),
        lambda: activations.rmsnorm(x, weight.float(), 1e-6, "qdq"),
        lambda: activations.rmsnorm(x, weight, 1e-6, "qdq", residual=x[:2]),
        lambda: activations.rmsnorm(x, weight, 1e-6, "qdq", residual=x.t()),
        lambda: activations.silu_mul(x[:, :31].contiguous(), "qdq"),
        lambda: activations.silu_mul(x[:, :16].contiguous(), "qdq"),
        lambda: activations.gelu_mul(x[:, :31].contiguous(), "qdq"),
        lambda: activations.rmsnorm(x, weight[:16], 1e-6, "qdq", zero_centred=True),
        lambda: launch.empty_results("fp8", 4, 32, torch.device("cuda")),
    ):
        with pytest.raises(ValueError, match=r"must|needs"):
            call()


PREPARE = """
import itertools
import torch
import triton.language as tl
from triton.runtime import interpreter
from mixquant_sglang.formats import fp8
from mixquant_sglang.formats import nvfp4 as reference
from mixquant_sglang.kernels.triton import activations, rows, unpack
from mixquant_sglang.kernels.triton.launch import FORMATS

torch.manual_seed(0)
TYPES = {
    tl.float32: (torch.float32, torch.int32),
    tl.bfloat16: (torch.bfloat16, torch.int16),
    tl.float16: (torch.float16, torch.int16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
}


def convert(values, source, target, rounding_mode):
    bits = torch.from_numpy(values.copy()).view(TYPES[source][0])
    return bits.to(TYPES[target][0]).view(TYPES[target][1]).numpy()


interpreter._convert_float = convert  # Triton's own truncates to BF16, and gets subnormals wrong


def same(got, want):
    assert torch.equal(got.isnan(), want.isnan()) and got.dtype == want.dtype and got.shape == want.shape
    real = ~want.isnan()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.view(integer)[real], want.view(integer)[real]), (got, want)
"""

INTERPRETED = """
for m, k in ((0, 16), (1, 16), (9, 48), (5, 208), (2, 4096), (3, 11008)):
    x = torch.randn(m, k) * torch.exp2(torch.linspace(-100, 120, m))[:, None]
    x[:, 3] *= 50
    x[::2, :16] = -0.0
    x[3:4] = 0
    x[4:5, 7] = float("inf")
    x[5:6, 7] = float("nan")
    x = x.bfloat16()
    same(activations.quantize(x, "qdq")[0], reference.quantize_activations(x).dequantize())

for n, k in ((1, 16), (33, 48), (7, 1040)):
    x = torch.randn(n, k) * torch.exp2(torch.randint(-20, 6, (n, k // 16)).float()).repeat_interleave(16, 1)
    w = reference.quantize(x)
    out = torch.full((n, k), float("nan"), dtype=torch.bfloat16)
    assert unpack.unscaled(w.packed, w.block_scales, out) is out
    same(out, w.unscaled())
everything = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
scales = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
same(unpack.unscaled(everything, scales), reference.NVFP4Tensor(everything, scales, torch.tensor(1.0)).unscaled())

x = torch.randn(7, 2500).bfloat16()
for dtype in (torch.int32, torch.int64):
    index = torch.tensor([3, -1, 6, -1, 0], dtype=dtype)
    got = rows.gather_rows(x, index)
    same(got, torch.where(index[:, None] < 0, torch.zeros_like(got), x[index.clamp(min=0).long()]))
    out = x.clone()
    rows.scatter_rows_(out, -got, index)
    same(out, x * torch.tensor([-1, 1, 1, -1, 1, 1, -1], dtype=torch.bfloat16)[:, None])
scales = torch.tensor([1, 2, 0.5, 2.0**100, 2.0**-100, 0, float("nan")])
out = x.clone()
rows.scale_rows_(out, scales)
same(out, (x.float() * scales[:, None]).bfloat16())
"""


ACTIVATIONS = """
def oracle(y, fmt):
    if fmt == "fp8":
        quantised = fp8.quantize_activations(y)
        return quantised.data, quantised.scales[:, None]
    quantised = reference.quantize_activations(y)
    if fmt == "qdq":
        return (quantised.dequantize(),)
    weight = reference.NVFP4Tensor(quantised.packed, quantised.block_scales, torch.tensor(1.0))
    return quantised.packed, weight.swizzled_scales(), quantised.row_scales


def check(produce, exact, m, k, fmt, error=2**-20):
    # The numbers are the oracle's for the BF16 rows that the kernel keeps; those are exact to half a step and an error.
    kept = torch.full((m + 2, k), 7.0).bfloat16()
    quantised = produce(fmt, slots=torch.arange(m, dtype=torch.int32).flip(0), kept=kept)
    y = kept[:m].flip(0)
    assert ((y.double() - exact).abs() <= exact.abs() * (2**-8 + error)).all() and (kept[m:] == 7).all()
    for got, want in zip(quantised, oracle(y, fmt), strict=True):
        same(got, want)
    slots = torch.where(torch.arange(m) % 3 == 1, torch.arange(m) // 3, -1).int()
    kept.fill_(7)
    for again in (produce(fmt, slots=slots, kept=kept), produce(fmt)):
        for got, want in zip(again, quantised, strict=True):
            same(got, want)
    count = len(range(1, m, 3))
    same(kept[:count], y[1::3])
    assert (kept[count:] == 7).all()


for (m, k), fmt in itertools.product([(0, 16), (1, 16), (7, 48), (3, 1040)], FORMATS):
    x = torch.randn(m, k) * torch.exp2(torch.linspace(-120, 120, m))[:, None]
    x[:, 3] *= 50
    x[::2, :16] = -0.0
    x[3:4] = 0
    x[4:5, 7] = float("inf")
    x[6:7, 7] = float("nan")
    x = x.bfloat16()
    for got, want in zip(activations.quantize(x, fmt), oracle(x, fmt), strict=True):
        same(got, want)

    x, before, weight = torch.randn(m, k).bfloat16(), torch.randn(m, k).bfloat16() * 3, torch.rand(k).bfloat16()

    def norm(fmt, **options):
        residual = before.clone()
        results = activations.rmsnorm(x, weight, 1e-6, fmt, residual=residual, **options)
        same(residual, x + before)
        return results

    for t, produce in (
        (x.double() + before.double(), norm),
        (x.double(), lambda fmt, **options: activations.rmsnorm(x, weight, 1e-6, fmt, **options)),
    ):
        normed = t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        check(produce, normed * weight.double(), m, k, fmt)
        zero_centred = lambda fmt, **options: produce(fmt, zero_centred=True, **options)
        check(zero_centred, normed * (1 + weight.double()), m, k, fmt)

    gate_up = torch.randn(m, 2 * k).bfloat16() * 5
    gate, up = gate_up.double().chunk(2, dim=-1)
    produce = lambda fmt, **options: activations.silu_mul(gate_up, fmt, **options)
    check(produce, torch.nn.functional.silu(gate) * up, m, k, fmt)

    gate_up = torch.randn(m, 2 * k).bfloat16() * 1.5
    gate, up = gate_up.double().chunk(2, dim=-1)
    produce = lambda fmt, **options: activations.gelu_mul(gate_up, fmt, **options)
    check(produce, torch.nn.functional.gelu(gate, approximate="tanh") * up, m, k, fmt, error=2**-16)

# every block scale with every significand in the binades below its largest magnitude, and scale 0 around 2^-128 too
scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().clamp(min=2.0**-11)
units = torch.cat([scales, torch.tensor([2.0**-127])])[:, None]
values = torch.cat([torch.arange(128.0, 256.0) * 2.0**-e for e in range(5, 12)]) * units
values = torch.nn.functional.pad(values.minimum(6 * units), (0, 4)).reshape(-1, 15)
table = torch.cat([values, (6 * units).repeat_interleave(60, 0)], dim=1).reshape(32, 3840)
table = torch.nn.functional.pad(table, (0, 16), value=2688.0).copysign(torch.arange(3856) % 2 - 0.5)
x = torch.cat([table * 2.0**exponent for exponent in (-120, 12, 116)]).bfloat16()
for got, want in zip(activations.quantize(x, "nvfp4"), oracle(x, "nvfp4"), strict=True):
    same(got, want)

x = torch.randn(130, 80).bfloat16()  # two tiles of scales, padded both ways
for got, want in zip(activations.quantize(x, "nvfp4"), oracle(x, "nvfp4"), strict=True):
    same(got, want)
"""


BF16_DOT = """
import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def floats(handle):
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.data.dtype == np.uint16 else handle.data


def dot(self, a, b, total, *_):  # Triton's own multiplies the bits of BF16
    return TensorHandle(np.matmul(floats(a), floats(b)) + total.data, total.dtype.scalar)


InterpreterBuilder.create_dot = dot
"""


FEW_ROWS = """
from mixquant_sglang.kernels.triton import few_rows

few_rows._shared_memory = lambda device: 232448

few = [(5, 0), (5, 5), (16, 1), (16, 16), (64, 1), (64, 20), (64, 40), (256, 64), (256, 200)]
for (n, k), (slots, used) in itertools.product([(96, 64), (200, 48)], few):
    index = torch.full((slots,), -1)
    index[:used] = torch.randperm(300)[:used]
    rows, weight, bias = torch.randn(slots, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.randn(n).bfloat16()
    for b in (None, bias):
        out = torch.full((300, n), 7.0).bfloat16()
        few_rows.linear_rows_(out, index, rows, weight, b)
        exact = rows[:used].double() @ weight.double().t() + (0 if b is None else b.double())
        assert torch.allclose(out[index[:used]].double(), exact, rtol=2**-8, atol=1e-5)
        out[index[:used]] = 7
        assert (out == 7).all()
    out, rest = torch.zeros(300, 64).bfloat16(), torch.zeros(300, n - 64).bfloat16()
    few_rows.linear_rows_(out, index, rows, weight, rest=rest)
    together = torch.cat([out, rest], dim=1)
    whole = torch.zeros(300, n).bfloat16()
    few_rows.linear_rows_(whole, index, rows, weight)
    same(together, whole)
"""


PACKED_ROWS = """
from mixquant_sglang.kernels.triton import packed_rows, packed_tiles, widen

codes = torch.arange(256).to(torch.uint8)
values = codes.view(torch.float8_e4m3fn).float()
torch.manual_seed(1)
for (n, k), m, split in itertools.product([(96, 64), (40, 48), (256, 256)], [1, 16, 33, 130], [1, 2]):
    weight, rows, bias = torch.randn(n, k).bfloat16(), torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16()
    locks = torch.zeros(packed_tiles.LOCKS, dtype=torch.int32)
    q8, q4 = fp8.quantize(weight), reference.quantize(weight)
    if n == 256:  # all codes, save those of NaN
        q8.data.view(torch.uint8)[:] = torch.where(codes & 0x7F == 0x7F, 0, codes)
        q4.packed[:, :] = codes[:, None]
    for packed, exact in (
        (packed_rows.Packed(q8.data, q8.scales, locks), q8.data.double() * q8.scales[:, None].double()),
        (
            packed_rows.Packed(q4.packed, q4.tensor_scale, locks, q4.block_scales),
            q4.unscaled(torch.float64) * q4.tensor_scale.double(),
        ),
    ):
        tiles = packed_tiles.Tiles(32, 64, split, 2, 4)
        want = rows.double() @ exact.t()
        size = 2**-22 * (rows.double().abs() @ exact.t().abs())  # of what FP32 sums may be off
        for b in (None, bias):
            out = packed_rows.linear_rows(rows, packed, b, tiles=tiles)
            wanted = want if b is None else want + b.double()
            assert ((out.double() - wanted).abs() <= wanted.abs() * 2**-8 + size).all(), (n, k, m, split)
            assert not locks.any()
        one = packed_rows.linear_rows(rows[:1].contiguous(), packed, bias, tiles=tiles)
        if m <= 16:
            same(one, out[:1])
        used = (m + 1) // 2
        index = torch.full((m,), -1)
        index[:used] = torch.randperm(100)[:used]
        first, rest = torch.full((100, 64), 7.0).bfloat16(), torch.full((100, max(n - 64, 0)), 7.0).bfloat16()
        split_in_two = n > 64
        placed = first if split_in_two else torch.full((100, n), 7.0).bfloat16()
        packed_rows.linear_rows(
            rows, packed, bias, out=placed, index=index, rest=rest if split_in_two else None, tiles=tiles
        )
        whole = torch.cat([placed, rest], dim=1) if split_in_two else placed
        same(whole[index[:used]], out[:used])
        whole[index[:used]] = 7
        assert (whole == 7).all()
"""


SEARCH = """
from mixquant_sglang.kernels.triton.scale_search import quantize_

reference._empty_codes = lambda x: (
    torch.full((x.shape[0], x.shape[1] // 2), 0xA5, dtype=torch.uint8),
    torch.full((x.shape[0], x.shape[1] // 16), float("nan")).to(torch.float8_e4m3fn),
)


def check(x, **options):
    results = []
    for kernel in (quantize_, None):
        quantised = reference.quantize(x, scales="search", kernel=kernel, **options)
        results.append((quantised.packed, quantised.block_scales.view(torch.uint8), quantised.tensor_scale))
    for got, want in zip(*results, strict=True):
        same(got, want)


student = torch.distributions.StudentT(3.0)
for n, k in ((0, 16), (1, 16), (33, 48), (3, 1040)):
    for sample in (torch.randn(n, k), torch.distributions.Laplace(0.0, 1.0).sample((n, k)), student.sample((n, k))):
        check(sample.bfloat16())
x = torch.randn(32, 64)
check((x * 4).round() / 4, tensor_scale=0.25)  # ties
check(x.half())
check(x.t())
check(x[::3, 16:48].bfloat16())
x = torch.cat([torch.full((2, 32), 0.3), torch.zeros(2, 32), -torch.zeros(2, 32), torch.tensor([[1.0, -0.0] * 16])])
check(x)
check(torch.zeros(2, 32))
wide = torch.randn(1, 64, 16) * torch.exp2(torch.linspace(-148, 125, 64))[:, None]  # FP32 subnormals to its largest
wide = wide.reshape(8, 128)
check(wide)
check(wide.bfloat16())
for outer in (2.0**-126, 2.0**-20, 0.000731, 1.0, 2.0**126):
    check(wide, tensor_scale=outer)
x = student.sample((16, 96)).bfloat16()
energy = (torch.randn(96) * 3).exp2().square()
energy[16:32] = 0
energy[32:48:2] = 0
energy[50] = 1e30
check(x, column_weights=energy)
check(x[:, :48].float().t(), column_weights=torch.ones(16))

# one weight of each block where the choice changes, to the last bit of it: nothing but the same errors choose alike
torch.manual_seed(0)
x = student.sample((1, 4096))
energy = torch.rand(4096) * 0.2
energy[::16] = 1  # the largest, so that the ratios stay as they are
low, high = torch.full((256,), 2.0**-20), torch.full((256,), 1.0)


def choice(weight):
    energy[15::16] = weight
    return reference.quantize(x, scales="search", column_weights=energy).block_scales.view(torch.uint8)[0]


changes = choice(low) != choice(high)
assert changes.sum() > 100
before = choice(low)
for _ in range(50):
    middle = (low + high) / 2
    same_as_low = choice(middle) == before
    low, high = torch.where(same_as_low, middle, low), torch.where(same_as_low, high, middle)
for step in range(-6, 7):
    energy[15::16] = (high.view(torch.int32) + step).view(torch.float32).clamp(max=1)
    check(x, column_weights=energy)
"""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [INTERPRETED, ACTIVATIONS, BF16_DOT + FEW_ROWS, BF16_DOT + PACKED_ROWS, SEARCH],
    ids=["weights_and_rows", "activations", "few_rows", "packed_rows", "scale_search"],
)
def test_interpreted_kernels_equal_torch(script: str) -> None:
    """In a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined."""
    run = subprocess.run(
        [sys.executable, "-c", PREPARE + script],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
