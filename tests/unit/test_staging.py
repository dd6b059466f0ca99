"""A BF16 weight that is not kept: gathered part by part, handed on when it is whole, and gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from mixquant_sglang.weights.incoming import Known
from mixquant_sglang.weights.staging import Staging


def loader(parameter: torch.nn.Parameter, loaded: torch.Tensor, rows: slice | None = None) -> None:
    data = parameter.data
    assert parameter.output_dim == 0  # type: ignore[attr-defined]
    if rows is None:
        for start in range(0, len(loaded), 2):  # a fused tensor comes by its parts
            loader(parameter, loaded[start : start + 2], slice(start, start + 2))
        return
    data[rows].copy_(loaded)


def staging(whole: list[torch.Tensor]) -> Staging:
    attributes = {"weight_loader": loader, "output_dim": 0}
    return Staging((4, 8), torch.bfloat16, torch.device("cpu"), attributes, lambda w: whole.append(w.clone()))


def test_it_is_handed_on_when_all_parts_are_there() -> None:
    whole: list[torch.Tensor] = []
    staged, weight = staging(whole), torch.randn(4, 8)
    parameter = staged.parameter
    assert parameter.is_meta and parameter.shape == (4, 8) and parameter.dtype is torch.bfloat16
    assert not staged.begun
    parameter.weight_loader(parameter, weight[2:], slice(2, 4))  # type: ignore[attr-defined]
    assert staged.begun and not whole
    parameter.weight_loader(parameter, weight[:2], slice(0, 2))  # type: ignore[attr-defined]
    assert not staged.begun and torch.equal(whole[0], weight.bfloat16())
    parameter.weight_loader(parameter, 2 * weight)  # type: ignore[attr-defined]
    assert torch.equal(whole[1], (2 * weight).bfloat16()) and len(whole) == 2


def test_parts_of_an_update_that_ended_are_forgotten() -> None:
    whole: list[torch.Tensor] = []
    staged, weight = staging(whole), torch.randn(4, 8)
    staged.load(staged.parameter, weight[:2], slice(0, 2))
    staged.forget()
    staged.load(staged.parameter, weight[2:], slice(2, 4))
    assert staged.begun and not whole


def test_parts_may_come_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from SGLang's loader of DeepSeek's models, which hands each part to a pool of them."""
    whole: list[torch.Tensor] = []
    staged, weight = staging(whole), torch.randn(4, 8)
    empty = torch.empty

    def slowly(*args: object, **kwargs: object) -> torch.Tensor:
        time.sleep(0.05)
        return empty(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", slowly)
    threads = [
        threading.Thread(target=staged.load, args=(staged.parameter, weight[i : i + 2], slice(i, i + 2)))
        for i in (0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not staged.begun and torch.equal(whole[0], weight.bfloat16())


def test_more_than_fits_is_an_error() -> None:
    whole: list[torch.Tensor] = []
    staged = staging(whole)

    def more(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
        parameter.data.copy_(loaded)
        parameter.data[:2].copy_(loaded[:2])

    staged._loader = more
    with pytest.raises(RuntimeError, match="16 numbers more"):
        staged.load(staged.parameter, torch.zeros(4, 8))
    assert not whole and not staged.begun


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_part_that_comes_twice_takes_the_place_of_no_other(forgotten: bool) -> None:
    """Else a weight would be packed, over the only copy of the old one, with whatever its memory held before."""
    whole: list[torch.Tensor] = []
    staged, weight = staging(whole), torch.randn(4, 8)
    staged.load(staged.parameter, torch.randn(2, 8), slice(0, 2))
    if forgotten:
        staged.forget()
    staged.load(staged.parameter, weight[:2], slice(0, 2))
    assert staged.begun and not whole
    staged.load(staged.parameter, weight[2:], slice(2, 4))
    assert not staged.begun and torch.equal(whole[0], weight.bfloat16())


def test_what_is_written_elsewhere_is_no_part() -> None:
    whole: list[torch.Tensor] = []
    staged, weight = staging(whole), torch.randn(4, 8)

    def through_a_copy(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
        parameter.data[:2].copy_(torch.empty_like(loaded).copy_(loaded))

    staged._loader = through_a_copy
    staged.load(staged.parameter, weight[:2])
    assert staged.begun and not whole


def test_what_reads_the_parameter_gets_an_error() -> None:
    """On the CPU torch multiplies by a plain meta tensor, and the result is noise."""
    weight, x = staging([]).parameter, torch.ones(1, 8, dtype=torch.bfloat16)
    read: tuple[Callable[[], object], ...] = (
        lambda: torch.nn.functional.linear(x, weight),
        lambda: torch.nn.functional.linear(x, weight.data),
        lambda: x @ weight.t(),
        lambda: torch.mm(x, weight.detach().T),
        lambda: weight.data_ptr(),
        lambda: weight.cpu(),
        lambda: weight.to("cpu"),
        lambda: weight[0],
        lambda: weight.copy_(torch.zeros(4, 8)),
    )
    for call in read:
        with pytest.raises((TypeError, NotImplementedError, RuntimeError)):
            call()
    assert (weight.shape, weight.dtype, weight.dim(), weight.numel()) == ((4, 8), torch.bfloat16, 2, 32)
    assert weight.nbytes == 64 and weight.is_meta and isinstance(weight, torch.nn.Parameter)
    module = torch.nn.Module()
    module.register_parameter("weight", weight)
    assert dict(module.named_parameters())["weight"] is weight


def test_an_update_of_some_parts_is_refused() -> None:
    known = Known(wholes={"a.qkv_proj": frozenset({"a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"})})
    assert known.torn({"norm.weight"}) is None
    assert known.torn({"a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"}) is None
    assert known.torn({"a.q_proj.weight", "norm.weight"}) == (
        "a.q_proj.weight came without a.k_proj.weight, a.v_proj.weight: this recipe keeps no BF16 weight of a.qkv_proj "
        "to put it into; send them in one update"
    )
