"""What the kernels here refuse, and the GPU that they look at."""

import functools

import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def require(tensor: torch.Tensor, name: str, shape: tuple[int | str, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """Sizes that are names (``"M"``) may be anything."""
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or not tensor.is_contiguous():
        wanted = f"{dtype} [{', '.join(map(str, shape))}]"
        found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous {wanted}, got {found}")
