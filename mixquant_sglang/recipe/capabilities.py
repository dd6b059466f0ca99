"""The low precisions, and what GPUs can do: the CUDA capability from which on one runs natively.  No torch."""

# precision -> the least (major, minor)
NATIVE_FROM = {"nvfp4": (10, 0), "fp8": (8, 9)}


def is_native(precision: str, capability: tuple[int, int] | None) -> bool:
    """Whether a GPU of ``capability``, None for no NVIDIA GPU, runs ``precision`` natively."""
    return capability is not None and capability >= NATIVE_FROM[precision]
