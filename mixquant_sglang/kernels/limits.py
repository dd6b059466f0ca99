"""Sizes that kernels are made for, and that who calls them has to know.  No torch."""

from mixquant_sglang import formats

# Rows that the kernel of few BF16 rows (``triton/few_rows.py``) takes at most, and captured prefill
# graphs with it.
FEW_ROWS = 64

# Numbers along K that share a scale in NVFP4, and the multiple that K must be of for every kernel here.
BLOCK = formats.BLOCK
