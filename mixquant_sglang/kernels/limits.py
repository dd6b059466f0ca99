"""Sizes that kernels are made for, and that who calls them has to know.  No torch."""

from mixquant_sglang import formats

# Protected rows for which the kernels of few BF16 rows (``triton/few_rows.py``, ``triton/expert_rows.py``) are meant:
# beyond, cuBLAS is faster. In a captured graph, where the number is known when it runs, that of linears takes more.
FEW_ROWS = 64
MANY_ROWS = 256

# Rows up to which packed weights are multiplied as they are (``triton/packed_rows.py``); for more they are unpacked to
# BF16 just in time.
WIDE = 256
# Protected rows that tiles of packed weights take at a time, where programs of few weight rows do not go over the used
# slots (``triton/packed_rows.py``): of many slots in a captured graph few are used, but fewer at a time make more
# programs that find theirs empty.
PLACED = 64

# BF16 rows up to which FP8 experts take the kernel of few rows where Triton does not suit ``triton/expert_warps.py``;
# more are faster sorted by expert (Qwen3-30B-A3B's on an H200, Triton 3.8: 4 rows 72 and 71 us a layer, 8 rows 123 and
# 105, 64 rows 408 and 211).  On GPUs that widen FP8 in registers there: others write the layer's weights as BF16 first.
FEW_UNSORTED = 4

# BF16 rows up to which experts in NVFP4 are read again for each FEW_ROWS of them, at 0.56 bytes a weight; for more the
# experts of the layer are unpacked, at 4.6. By these bytes, not timed.
PIECES = 8 * FEW_ROWS

# Prefill attention of keys and values gathered out of their pages: new rows of a request and tokens before them, of
# which it is timed at start; how many times as long attention over pages takes where it is left; bytes of the scratch,
# keys and values together, at most.
GATHERED_ROWS = (512, 1024, 2048, 4096, 8192)
GATHERED_PREFIXES = (2048, 4096, 8192, 16384, 32768)
GATHERED_GAIN = 1.02
GATHERED_BYTES = 512 * 2**20

# Norm of heads, RoPE and the write of the cache in one kernel: rows of a pass of which it is timed at start; how many
# times as long SGLang's own kernels take where it is used.
NORM_ROPE_ROWS = (256, 512, 2048, 8192)
NORM_ROPE_GAIN = 1.02

# Prefill attention in FP8 (``kernels/attention.py``): new rows of a request from which it is used; keys in a segment,
# at most; tokens at the start of a sequence that its mean and its scales come from; parts that are merged at once.
FP8_ROWS = 1024
FP8_SEGMENT = 8192
FP8_SAMPLE = 1024
FP8_PARTS = 4
FP8_BYTES = 512 * 2**20  # of keys and values together, at most

# Numbers along K that share a scale in NVFP4, and the multiple that K must be of for every kernel here.
BLOCK = formats.BLOCK

# Rows and columns of FP8 weights that share a scale in checkpoints with blocks.
TILE = formats.TILE
