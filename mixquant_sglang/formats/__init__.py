"""The number formats, in plain torch: quantise, dequantise, pack, scale layouts. No SGLang, no kernels."""

BLOCK = 16  # numbers along K that share a scale in NVFP4
TILE = 128  # rows and columns of a weight that share a scale in FP8 blocks
