"""What each choice of scales costs one NVFP4 linear: the reasons for the defaults of ``formats/nvfp4.py``.

    y = x @ w.T,   x [M, 4096] BF16 of five distributions, w [N, 4096] BF16 Gaussian

The error of a token is |y' - y| / |y| against the same BF16 inputs multiplied in FP32; the table has the root mean
square over tokens, in per cent.  The first part quantises activations alone, the second weights alone, the third both.

Then weights alone again, of four distributions, by the rule for their block scales: absmax, search, and search with
columns weighted by the mean square of another sample of the inputs, each search also over all 127 E4M3 scales (which
``mixquant`` never does).  First the squared error of the weights over absmax's, then the error of the output for inputs
with and without outlier channels, then seconds for 10^9 weights.

Synthetic data on the CPU, a minute; ``--device cuda`` takes the seconds on a GPU.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch

from mixquant_sglang.formats import BLOCK, nvfp4, scale_search
from mixquant_sglang.formats.blocks import E2M1_MAX, E4M3_MAX, encode_scale, f32, round_e2m1
from mixquant_sglang.kernels.packing import quantize_nvfp4

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


def outlier_weights(n: int) -> torch.Tensor:
    """Gaussian, with one weight in 1000 20 times as large."""
    x = torch.randn(n, K)
    return torch.where(torch.rand(n, K) < 0.001, x * 20, x)


WEIGHTS = {"Gaussian": gaussian, "Laplace": laplace, "Student t3": student, "outlier weights": outlier_weights}
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
    scaled = (x.float() / outer).reshape(x.shape[0], -1, BLOCK)
    amax = scaled.abs().amax(-1)
    best: torch.Tensor | None = None
    best_error = torch.empty(0)
    for candidate in candidates:
        scales = (amax * (1 / candidate)).clamp(max=E4M3_MAX).to(E4M3)
        encode = encode_scale(amax, scales, 1.0)[..., None]
        magnitude = round_e2m1((scaled.abs() * encode).clamp(max=E2M1_MAX))
        value = torch.copysign(magnitude * scales.float()[..., None], scaled)
        error = (value - scaled).square().sum(-1, keepdim=True)
        if best is None:
            best, best_error = value, error
        else:
            better = error < best_error
            best, best_error = torch.where(better, value, best), torch.where(better, error, best_error)
    assert best is not None, "no candidates"
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


def exhaustive(weight: torch.Tensor, energy: torch.Tensor | None = None) -> torch.Tensor:
    """FP32 values of ``weight`` with the best of all E4M3 scales for each block."""
    outer = nvfp4._outer_scale(weight, None)
    g = f32(1 / outer)
    blocks = weight.float().reshape(len(weight), -1, BLOCK)
    amax, magnitude = blocks.abs().amax(-1), blocks.abs().permute(2, 0, 1).contiguous()
    weights = None if energy is None else nvfp4._ratios(energy, "search", weight)
    scales = scale_search.search(magnitude, amax, torch.zeros_like(amax).to(E4M3), g, weights, range(127))
    encode = encode_scale(amax, scales, g)[..., None]
    value = round_e2m1((blocks.abs() * encode).clamp(max=E2M1_MAX)) * scales.float()[..., None]
    return torch.copysign(value, blocks).reshape(weight.shape) * outer


def weight_errors(tokens: int, outputs: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """By rule and distribution of the weights: squared error over absmax's, and the output's error in per cent."""
    squared: dict[str, dict[str, float]] = {}
    output: dict[str, dict[str, float]] = {}
    x, calibration = outlier_channels(tokens).bfloat16().float(), outlier_channels(tokens).bfloat16().float()
    inputs = {"outlier channels": x, "Gaussian": gaussian(tokens)}
    energy = calibration.square().mean(0)
    for name, sample in WEIGHTS.items():
        weight = (sample(outputs) * 0.02).bfloat16()
        rules = {
            "absmax": quantize_nvfp4(weight).dequantize(torch.float32),
            "search": quantize_nvfp4(weight, scales="search").dequantize(torch.float32),
            "search all 127": exhaustive(weight),
            "weighted": quantize_nvfp4(weight, scales="search", column_weights=energy).dequantize(torch.float32),
            "weighted all 127": exhaustive(weight, energy),
        }
        for rule, wq in rules.items():
            error, base = ((values - weight.float()).square().sum() for values in (wq, rules["absmax"]))
            squared.setdefault(rule, {})[name] = float(error / base)
            for kind, xs in inputs.items():
                exact = xs @ weight.float().T
                output.setdefault(f"{rule}; x: {kind}", {})[name] = token_error(xs @ wq.T, exact)
    return squared, output


def quantise_seconds(outputs: int, device: str) -> dict[str, float]:
    """For 10^9 weights, the best of five runs over [outputs, K] after one to warm up, the rules in turn."""
    weight, energy = (gaussian(outputs) * 0.02).bfloat16().to(device), torch.rand(K, device=device)
    rules: dict[str, Callable[[], object]] = {
        "absmax": lambda: quantize_nvfp4(weight),
        "search": lambda: quantize_nvfp4(weight, scales="search"),
        "weighted": lambda: quantize_nvfp4(weight, scales="search", column_weights=energy),
    }
    times: dict[str, list[float]] = {rule: [] for rule in rules}
    for _ in range(6):
        for rule, quantise in rules.items():
            start = time.perf_counter()
            quantise()
            if weight.is_cuda:
                torch.cuda.synchronize()
            times[rule].append(time.perf_counter() - start)
    return {rule: min(taken[1:]) / weight.numel() * 1e9 for rule, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="M (default: %(default)s)")
    parser.add_argument("--outputs", type=int, default=1024, help="N (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to time (default: %(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    weight = (torch.randn(args.outputs, K) * 0.02).bfloat16()
    weights = {
        "absmax": quantize_nvfp4(weight).dequantize(torch.float32),
        "search": quantize_nvfp4(weight, scales="search").dequantize(torch.float32),
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
    squared, output = weight_errors(args.tokens, args.outputs)
    each = quantise_seconds(args.outputs, args.device)
    seconds = time.perf_counter() - start

    print(f"relative RMS error of a token's output in %, [{args.tokens}, {K}] x [{args.outputs}, {K}], synthetic\n")
    print(f"{'':44}" + "".join(f"{name:>18}" for name in DISTRIBUTIONS))
    parts: list[Callable[[str], bool]] = [
        lambda c: ";" not in c and c[0] == "x",
        lambda c: c[0] == "w",
        lambda c: ";" in c,
    ]
    for part in parts:
        for choice in filter(part, errors):
            print(f"{choice:44}" + "".join(f"{error:18.3f}" for error in errors[choice].values()))
        print()
    print("weights alone: squared error over absmax's, then a token's output in %\n")
    print(f"{'':44}" + "".join(f"{name:>18}" for name in WEIGHTS))
    for table in (squared, output):
        for scales, row in table.items():
            print(f"w: {scales:41}" + "".join(f"{error:18.3f}" for error in row.values()))
        print()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"seconds for 1e9 weights, {device}: " + ", ".join(f"{rule} {value:.3f}" for rule, value in each.items()))
    where = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {seconds:.0f} s"
    print(where)
    rounded, squared, output = (
        {choice: {n: round(e, 4) for n, e in row.items()} for choice, row in table.items()}
        for table in (errors, squared, output)
    )
    settings = {"tokens": args.tokens, "outputs": args.outputs, "k": K, "seed": args.seed}
    of_weights = {"squared_over_absmax": squared, "output_percent": output, "seconds_for_1e9": each, "device": device}
    print(json.dumps(settings | {"errors": rounded, "weights": of_weights}))


def command() -> None:
    main()
