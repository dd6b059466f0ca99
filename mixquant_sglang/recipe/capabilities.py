"""The low precisions, and what GPUs can do: the CUDA capability from which on one runs natively.  No torch.

``w8a16`` and ``w4a16`` multiply BF16 activations by the packed weights of ``fp8`` and ``nvfp4``: the same bytes, of
which there is one copy."""

# precision -> the least (major, minor)
NATIVE_FROM = {"nvfp4": (10, 0), "fp8": (8, 9), "w8a16": (8, 0), "w4a16": (8, 0)}

# precision of weights alone -> the one whose packed weights it reads
WEIGHT_ONLY = {"w8a16": "fp8", "w4a16": "nvfp4"}


def stored(precision: str) -> str:
    """The precision in whose packed weights ``precision`` finds its own."""
    return WEIGHT_ONLY.get(precision, precision)


def keeps_master(prefill: str, decode: str) -> bool:
    """Whether a layer with these precisions keeps its BF16 weight: not if decode reads packed weights in BF16
    activations, and nothing else reads BF16."""
    return decode not in WEIGHT_ONLY or prefill == "bf16"


def in_words(precision: str) -> str:
    """What comes of weights and activations."""
    weights = {"w8a16": "FP8", "w4a16": "NVFP4"}.get(precision)
    return f"{weights} weights, BF16 activations" if weights else precision.upper()


def is_native(precision: str, capability: tuple[int, int] | None) -> bool:
    """Whether a GPU of ``capability``, None for no NVIDIA GPU, runs ``precision`` natively."""
    return capability is not None and capability >= NATIVE_FROM[precision]
