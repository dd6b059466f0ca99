"""New weights before they are written: what is refused, and in which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mixquant_sglang.weights.incoming import Known

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def known() -> Known:
    made = Known()
    stored = [("a.weight", torch.zeros(4, 32).bfloat16()), ("embed.weight", torch.zeros(8, 4)), ("n", torch.zeros(3))]
    assert [name for name, _ in made.record(stored)] == ["a.weight", "embed.weight", "n"]
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, None])
def test_values(dtype: torch.dtype, bad: float | None) -> None:
    tensor = torch.randn(4, 32).to(dtype)
    if bad is not None:
        tensor[3, 31] = bad
    problem = known().problem("a.weight", tensor, CPU)
    assert problem == (None if bad is None else "a.weight holds NaN or infinity, in BF16 at least")


@pytest.mark.parametrize(("value", "fine"), [(3.3895e38, True), (3.4e38, False), (-3.4e38, False)])
def test_what_bf16_rounds_to_infinity(value: float, fine: bool) -> None:
    tensor = torch.zeros(4, 32)
    tensor[1, 1] = value
    assert (known().problem("a.weight", tensor, CPU) is None) is fine


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("b.weight", torch.zeros(4, 32), "b.weight is no tensor of this model's checkpoint"),
        ("a.weight", torch.zeros(4, 16), "a.weight has shape [4, 16], not [4, 32]"),
        ("a.weight", torch.zeros(128), "a.weight has shape [128], not [4, 32]"),
        ("a.weight", torch.zeros(4, 32, dtype=torch.uint8), "a.weight is torch.uint8, not torch.bfloat16: "),
        ("a.weight", torch.zeros(4, 32).to(torch.float8_e4m3fn), "a.weight is torch.float8_e4m3fn, not torch.bfloat16"),
        ("n", torch.zeros(3).bfloat16(), None),
    ],
)
def test_names_shapes_and_dtypes(name: str, tensor: torch.Tensor, problem: str | None) -> None:
    found = known().problem(name, tensor, CPU)
    assert found is None if problem is None else found is not None and found.startswith(problem)


def test_what_is_missing() -> None:
    assert known().missing({"a.weight", "embed.weight", "n", "more"}) is None
    assert known().missing({"embed.weight"}) == "a.weight is missing, and 1 more"


def test_names_that_a_trainer_sends_beside_those_of_the_checkpoint() -> None:
    model, made = torch.nn.Module(), known()
    model.embed, model.head, model.fused = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    model.embed.weight = model.head.weight = torch.nn.Parameter(torch.zeros(64, 4))  # padded; the head is tied
    model.fused.weight = torch.nn.Parameter(torch.zeros(6, 2))
    made.add_parameters(model, ranks=1)
    assert made.problem("head.weight", torch.zeros(8, 4), CPU) is None
    assert made.problem("head.weight", torch.zeros(64, 4), CPU) == "head.weight has shape [64, 4], not [8, 4]"
    assert made.problem("fused.weight", torch.zeros(6, 2), CPU) is None
    of_two = known()
    of_two.add_parameters(model, ranks=2)
    assert of_two.problem("fused.weight", torch.zeros(6, 2), CPU) is not None


def test_what_the_served_model_does_not_take_may_be_missing() -> None:
    model, made = torch.nn.Module(), Known()
    model.embed, model.head = torch.nn.Module(), torch.nn.Module()
    model.embed.weight = model.head.weight = torch.nn.Parameter(torch.zeros(8, 4))
    model.config = SimpleNamespace(num_hidden_layers=2)
    spare = ["mtp.fc.weight", "model.mtp.fc.weight", "model.layers.2.eh_proj.weight", "l.0.rotary_emb.inv_freq"]
    taken = ["embed.weight", "head.weight", "model.layers.1.q_proj.weight", "mtpx.weight"]
    list(made.record((name, torch.zeros(8, 4)) for name in [*spare, *taken]))
    made.add_parameters(model, ranks=2)
    assert made.missing({*taken}) is None
    assert made.missing({*taken} - {"head.weight"}) is None and made.missing({*taken} - {"embed.weight"}) is None
    assert made.missing({*taken} - {"head.weight", "embed.weight"}) == "embed.weight is missing, and 1 more"
    for name in taken[2:]:
        assert made.missing({*taken} - {name}) == f"{name} is missing"


@pytest.mark.parametrize("mark", ["output_sizes", "w13_weight"])
def test_parameters_that_loaders_fill_by_parts_are_no_names_to_send(mark: str) -> None:
    model, made = torch.nn.Module(), known()
    model.qkv = torch.nn.Module()
    model.qkv.weight, model.qkv.bias = (torch.nn.Parameter(torch.zeros(6)) for _ in range(2))
    setattr(model.qkv, mark, [2, 4])
    made.add_parameters(model, ranks=1)
    for name in ("qkv.weight", "qkv.bias"):
        assert made.problem(name, torch.zeros(6), CPU) == f"{name} is no tensor of this model's checkpoint"


def test_without_a_checkpoint_values_are_looked_at() -> None:
    assert Known().problem("anything", torch.zeros(2), CPU) is None
    assert Known().problem("anything", torch.tensor([1.0, NAN]), CPU) is not None
    assert Known().missing(set()) is None
