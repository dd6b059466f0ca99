"""The search for block scales: the E4M3 scale of least squared error for each block of 16.

With d = (value of the code) * scale - |x| * g, the error is the sum of ``d * d`` (``* w`` of the column, if weighted),
each product rounded to FP32, added in halves: 0 to 7 with 8 to 15, then 0 to 3 with 4 to 7, and so on.  A candidate
wins if its error is under (1 - 2^-14) of the best so far.  Nothing depends on the device or on a library's order of
summation: ``kernels/triton/scale_search.py`` makes the same choice to the bit.
"""

import torch

from mixquant_sglang.formats import BLOCK
from mixquant_sglang.formats.blocks import E2M1_MAX, encode_scale, round_e2m1

# E4M3 codes around the absmax one that are tried, after absmax: eight codes are a factor of two, so -2 lets the
# largest element saturate, and +4 or +5 is absmax/4. Against all 126 scales this costs at most 0.1 % of the error
# (uniform data), 0 on Gaussian, Laplace and Student-t. With column weights a scale far below absmax can be best, but
# then it gives up the columns that calibration found quiet: scripts/measure_formats has both errors.
SEARCH_OFFSETS = range(-2, 7)
# a candidate has to win by more than FP32 noise in the error, so that none makes a block worse
SEARCH_GAIN = 1 - 2.0**-14
_E4M3_LAST = 126  # the code of 448


def search(
    magnitude: torch.Tensor,
    amax: torch.Tensor,
    absmax: torch.Tensor,
    g: float,
    weights: torch.Tensor | None = None,
    offsets: range = SEARCH_OFFSETS,
) -> torch.Tensor:
    """The E4M3 scale [r, K/16] with the least squared error for each block of ``magnitude`` [16, r, K/16]; errors are
    in units of the outer scale, and weighted by ``weights`` [K] if given.

    The arithmetic is at this file's top; elements come first so that each step runs over contiguous memory.
    """
    target = magnitude * g
    weights = weights if weights is None else weights.view(-1, BLOCK).t()[:, None]

    def error(scales: torch.Tensor) -> torch.Tensor:
        value = round_e2m1((magnitude * encode_scale(amax, scales, g)).clamp_(max=E2M1_MAX))
        terms = value.mul_(scales.float()).sub_(target).square_()
        terms = terms if weights is None else terms.mul_(weights)
        for half in (8, 4, 2, 1):
            terms = terms[:half].add_(terms[half:])
        return terms[0]

    first = absmax.view(torch.uint8).to(torch.int16)
    best, best_error = absmax.view(torch.uint8).clone(), error(absmax)
    for offset in filter(None, offsets):
        candidate = (first + offset).clamp_(0, _E4M3_LAST).to(torch.uint8)
        candidate_error = error(candidate.view(torch.float8_e4m3fn))
        better = candidate_error < best_error * SEARCH_GAIN
        best, best_error = torch.where(better, candidate, best), torch.where(better, candidate_error, best_error)
    return best.view(torch.float8_e4m3fn)
