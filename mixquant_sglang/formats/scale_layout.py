"""Block scales of NVFP4 in the layout that Blackwell's GEMMs read (cuBLAS, CUTLASS, FlashInfer): tiles of 128x4."""

import torch

from mixquant_sglang.formats import BLOCK


def swizzle_scales(block_scales: torch.Tensor) -> torch.Tensor:
    """Block scales [M, K/16] in the 128x4 layout of the Blackwell GEMMs (cuBLAS, CUTLASS, FlashInfer).

    float8_e4m3fn [ceil(M/128)*128, ceil(K/16/4)*4]; the scale of row m and block b lies at the flat offset
    ``((m//128) * ceil(KB/4) + b//4)*512 + (m%32)*16 + (m%128//32)*4 + b%4``, KB = K/16; padding is zero.
    """
    m, blocks = block_scales.shape
    rows, cols = _padded(m, blocks)
    linear = torch.zeros((rows, cols), dtype=torch.uint8, device=block_scales.device)
    linear[:m, :blocks] = block_scales.view(torch.uint8)
    tiles = linear.view(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols).view(torch.float8_e4m3fn)


def unswizzle_scales(swizzled: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Undo ``swizzle_scales``: [n, k/16] from a 1-byte tensor of any shape with the padded number of
    scales."""
    rows, cols = _padded(n, k // BLOCK)
    if k % BLOCK or swizzled.element_size() != 1 or swizzled.numel() != rows * cols:
        raise ValueError(
            f"128x4 scales of an [{n}, {k}] weight are {rows * cols} bytes (K a multiple of {BLOCK}); "
            f"got {swizzled.numel()} elements of {swizzled.dtype}"
        )
    tiles = swizzled.contiguous().view(torch.uint8).view(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols)[:n, : k // BLOCK].contiguous().view(swizzled.dtype)


def _padded(n: int, blocks: int) -> tuple[int, int]:
    return -(-n // 128) * 128, -(-blocks // 4) * 4
