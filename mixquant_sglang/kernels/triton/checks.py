"""What the kernels here refuse, and the GPU that they look at."""

import functools

import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def require(tensor: torch.Tensor, name: str, shape: tuple[int | str, ...], dtype: torch.dtype = torch.bfloat16) -> None:
    """Sizes that are names (``"M"``) may be anything."""
    found = tensor.shape
    fits = tensor.dtype is dtype and len(found) == len(shape) and tensor.is_contiguous()
    if fits:
        for want, size in zip(shape, found, strict=True):
            if want != size and not isinstance(want, str):
                fits = False
    if not fits:
        wanted = f"{dtype} [{', '.join(map(str, shape))}]"
        given = f"{tensor.dtype} {list(found)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous {wanted}, got {given}")
