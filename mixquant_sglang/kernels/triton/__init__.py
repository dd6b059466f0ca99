"""Triton kernels of our own: what SGLang and its libraries have no kernel for, or none that runs on every GPU.

CUDA tensors only; the plain-torch counterpart of each is in ``mixquant_sglang.formats`` or is one line of indexing. FP8
and FP4 are decoded and rounded with integer and FP32 instructions, so one source compiles for SM80 to SM120.
"""
