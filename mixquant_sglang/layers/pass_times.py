"""What is timed for ``min_tokens: auto`` (``kernels/tuning/break_even.py``): the products of the model's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.rows import GraphRows, Rows
from mixquant_sglang.kernels.tuning.break_even import Alike, Call
from mixquant_sglang.kernels.verify_experts import routes
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.fused import FusedActivation, FusedNorm
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.passes import limits
from mixquant_sglang.passes.running import PROTECTED_PASS, Pass, within
from mixquant_sglang.recipe.roles import Role

EACH = 4  # layers that one graph runs, so that its own launch does not count
LINEAR_FIELDS = ("n", "k", "cut")
EXPERT_FIELDS = ("experts", "i", "h", "top_k")


def kinds_of(
    model: torch.nn.Module,
    linears: Sequence[MixQuantLinearMethod],
    experts: Sequence[MixQuantExpertsMethod],
    *,
    protects: bool,
) -> dict[tuple[str, str], list[Alike]]:
    """("linear" or "experts", precision) -> the layers of ``model`` whose prompt rows are low, by those that are alike.

    ``protects``: a pass has a protected row. Call it after fusion."""
    forwards = [getattr(module, "_forward_method", None) for module in model.modules()]
    handed = {id(forward.linear) for forward in forwards if isinstance(forward, (FusedNorm, FusedActivation))}
    groups: dict[tuple[str, str], dict[tuple[int, ...], list[MixQuantLinearMethod]]] = {}
    for linear in linears:
        precision = linear.precision[Role.PROMPT]
        if linear.split and linear.precision[Role.PROTECTED] == "bf16":
            cut = linear.split_product.columns if linear.split_product else 0
            quantised = id(linear) in handed and linear.activation_format is not None
            sizes = (*linear.shape, cut or linear.shape[0], 1 + protects + 2 * quantised)
            groups.setdefault(("linear", precision), {}).setdefault(sizes, []).append(linear)
    found = {
        key: [
            Alike(
                f"{len(members)} linears [{sizes[0]}, {sizes[1]}]",
                sizes,
                len(members),
                min(len(members), EACH),
                partial(_linear_calls, members[:EACH], protects, sizes[-1] > 2),
            )
            for sizes, members in by_sizes.items()
        ]
        for key, by_sizes in groups.items()
    }
    layers: dict[tuple[str, tuple[int, ...]], list[MixQuantExpertsMethod]] = {}
    for method in experts:
        if method.split and method.precision[Role.PROTECTED] == "bf16":
            layers.setdefault((method.precision[Role.PROMPT], (*method.sizes, 1 + protects)), []).append(method)
    for (precision, key), alike in layers.items():
        words = f"{len(alike)} layers of {key[0]} experts [{key[1]}, {key[2]}]"
        # Of one layer, since the experts of a layer are more than any cache holds.
        one = Alike(words, key, len(alike), 1, partial(_expert_calls, alike[0], protects))
        found.setdefault(("experts", precision), []).append(one)
    return found


def _linear_calls(
    linears: Sequence[MixQuantLinearMethod], protects: bool, quantised: bool, tokens: int
) -> tuple[Call, Call]:
    first = linears[0]
    x = _activations(tokens, first.shape[1], first.master.device)
    rows = _last_row(tokens, first.master.device, limits.GRAPH_ROWS) if protects else None
    fmt = first.activation_format
    given = operands.quantize(x, fmt, rows) if quantised and fmt is not None else x

    @torch.no_grad()
    def run(running: Pass, given: torch.Tensor | operands.QuantizedActivations) -> None:
        with within(running):
            for linear in linears:
                linear.apply(linear.layer, given, linear.bias)

    return partial(run, PROTECTED_PASS, x), partial(run, Pass(Role.PROMPT, rows), given)


def _expert_calls(method: MixQuantExpertsMethod, protects: bool, tokens: int) -> tuple[Call, Call]:
    experts, _, h, k = method.sizes
    device = method.masters.w13.device
    x = _activations(tokens, h, device)
    weights, ids = (part.to(device) for part in routes(tokens, experts, k))
    rows = _last_row(tokens, device, limits.EXPERT_GRAPH_ROWS) if protects else None

    @torch.no_grad()
    def run(running: Pass) -> None:
        with within(running):
            method.run_by_itself(running.role, x, weights, ids)

    return partial(run, PROTECTED_PASS), partial(run, Pass(Role.PROMPT, rows))


def _activations(tokens: int, k: int, device: torch.device) -> torch.Tensor:
    seed = torch.Generator(device).manual_seed(0)
    return torch.randn(tokens, k, dtype=torch.bfloat16, device=device, generator=seed)


def _last_row(tokens: int, device: torch.device, slots: int) -> Rows:
    """As a captured graph has it."""
    rows = GraphRows(slots, tokens, device)
    rows.fill(((tokens - 1, tokens),))
    return rows.of(tokens)
