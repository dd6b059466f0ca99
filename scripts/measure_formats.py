"""What each choice of scales costs one NVFP4 linear: the reasons for the defaults of ``formats/nvfp4.py``.

    y = x @ w.T,   x [M, 4096] BF16 of five distributions, w [N, 4096] BF16 Gaussian

The error of a token is |y' - y| / |y| against the same BF16 inputs multiplied in FP32; the table has the root mean
square over tokens, in per cent.  The first part quantises activations alone, the second weights alone, the third both.
Synthetic data on the CPU, half a minute; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch

from mixquant_sglang.formats import nvfp4

K = 4096
E4M3 = torch.float8_e4m3fn
Rule = Callable[[torch.Tensor], torch.Tensor]


def gaussian(m: int) -> torch.Tensor:
    return torch.randn(m, K)


def laplace(m: int) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((m, K))


def student(m: int) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((m, K))


def outlier_channels(m: int) -> torch.Tensor:
    """Gaussian, with eight channels 30 times as large."""
    x = torch.randn(m, K)
    x[:, :: K // 8] *= 30
    return x


def sink_tokens(m: int) -> torch.Tensor:
    """Gaussian, with one token in 64 1000 times as large, in eight channels: what the first token of a text does."""
    x = torch.randn(m, K)
    x[::64, :: K // 8] *= 1000
    return x


DISTRIBUTIONS = {
    "Gaussian": gaussian,
    "Laplace": laplace,
    "Student t3": student,
    "outlier channels": outlier_channels,
    "sink tokens": sink_tokens,
}


def quantised(x: torch.Tensor, outer: torch.Tensor, candidates: tuple[float, ...]) -> torch.Tensor:
    """FP32 values of ``x`` by ``outer`` scales [M, 1]: each block takes the scale amax/c with the least squared error.

    Arithmetic as in ``formats/nvfp4.py``, from which its parts are taken."""
    scaled = (x.float() / outer).reshape(x.shape[0], -1, nvfp4.BLOCK)
    amax = scaled.abs().amax(-1)
    best = best_error = None
    for candidate in candidates:
        scales = (amax * (1 / candidate)).clamp(max=nvfp4.E4M3_MAX).to(E4M3)
        encode = nvfp4._encode_scale(amax, scales, 1.0)[..., None]
        magnitude = nvfp4._round_e2m1((scaled.abs() * encode).clamp(max=nvfp4.E2M1_MAX))
        value = torch.copysign(magnitude * scales.float()[..., None], scaled)
        error = (value - scaled).square().sum(-1, keepdim=True)
        if best is None:
            best, best_error = value, error
        else:
            better = error < best_error
            best, best_error = torch.where(better, value, best), torch.where(better, error, best_error)
    return best.reshape(x.shape) * outer


def token_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Per cent."""
    return 100 * float(((y - exact).norm(dim=-1) / exact.norm(dim=-1)).square().mean().sqrt())


def choices(calibration: torch.Tensor) -> dict[str, Rule]:
    """What activations can be turned into; ``calibration`` is another sample of the same distribution."""
    static = (calibration.abs().max().float() / 2688).reshape(1, 1)

    def power(x: torch.Tensor) -> torch.Tensor:
        return nvfp4.row_scales(x)[:, None]

    def exact(x: torch.Tensor) -> torch.Tensor:
        return x.float().abs().amax(-1, keepdim=True) / 2688

    search = tuple(6 * 2 ** (-step / 8) for step in range(-2, 7))  # as wide as nvfp4.quantize's
    return {
        "token 2^k, amax/6 (default)": lambda x: nvfp4.quantize_activations(x).dequantize(torch.float32),
        "token 2^k, amax/6 or amax/4": lambda x: quantised(x, power(x), (6.0, 4.0)),
        "token 2^k, search": lambda x: quantised(x, power(x), search),
        "token exact, amax/6": lambda x: quantised(x, exact(x), (6.0,)),
        "token exact, amax/6 or amax/4": lambda x: quantised(x, exact(x), (6.0, 4.0)),
        "tensor static, amax/6": lambda x: quantised(x, static.expand(len(x), 1), (6.0,)),
        "tensor static, calibrated to 1/8 of it": lambda x: quantised(x, static.expand(len(x), 1) / 8, (6.0,)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="M (default: %(default)s)")
    parser.add_argument("--outputs", type=int, default=1024, help="N (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    weight = (torch.randn(args.outputs, K) * 0.02).bfloat16()
    weights = {
        "absmax": nvfp4.quantize(weight).dequantize(torch.float32),
        "search": nvfp4.quantize(weight, scales="search").dequantize(torch.float32),
    }
    errors: dict[str, dict[str, float]] = {}
    for name, sample in DISTRIBUTIONS.items():
        x, calibration = sample(args.tokens).bfloat16(), sample(args.tokens).bfloat16()
        exact = x.float() @ weight.float().T
        for choice, rule in choices(calibration).items():
            xq = rule(x)
            errors.setdefault(f"x: {choice}", {})[name] = token_error(xq @ weight.float().T, exact)
            if choice.startswith("token 2^k"):
                for scales, wq in weights.items():
                    errors.setdefault(f"x: {choice}; w: {scales}", {})[name] = token_error(xq @ wq.T, exact)
        for scales, wq in weights.items():
            errors.setdefault(f"w: {scales}", {})[name] = token_error(x.float() @ wq.T, exact)
    seconds = time.perf_counter() - start

    print(f"relative RMS error of a token's output in %, [{args.tokens}, {K}] x [{args.outputs}, {K}], synthetic\n")
    print(f"{'':44}" + "".join(f"{name:>18}" for name in DISTRIBUTIONS))
    for part in (lambda c: ";" not in c and c[0] == "x", lambda c: c[0] == "w", lambda c: ";" in c):
        for choice in filter(part, errors):
            print(f"{choice:44}" + "".join(f"{error:18.3f}" for error in errors[choice].values()))
        print()
    where = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {seconds:.0f} s"
    print(where)
    rounded = {choice: {n: round(e, 4) for n, e in row.items()} for choice, row in errors.items()}
    print(json.dumps({"tokens": args.tokens, "outputs": args.outputs, "k": K, "seed": args.seed, "errors": rounded}))


if __name__ == "__main__":
    main()
