"""LoRA on SGLang's own model runner: two adapters and none in one batch, against transformers and plain torch.

One process runs all of it, about 45 s of one core.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import lifecycle
from mixquant_sglang.host.lifecycle import LoadSteps
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.versions import lora
from tests.support import adapters, model_runs

pytestmark = [pytest.mark.timeout(1800)]

STEPS = 4
WHO = ("first", "second", "none")
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"recipe": "bf16"},
    "low": {"recipe": "low"},
    "low, attention alone": {"recipe": "low", "attention": True},
}


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lora")
    recipe = folder / "low.yaml"
    recipe.write_text("version: 1\nprefill: {precision: nvfp4}\nweights: {scales: absmax}\n")
    # The second has fewer targets: what SGLang multiplies together has adapters on some of its parts.
    everywhere = adapters.make(tiny_model, folder / "everywhere", seed=1, strength=0.05)
    attention = adapters.make(tiny_model, folder / "attention", seed=2, targets=adapters.ATTENTION, strength=0.08)
    some = adapters.make(tiny_model, folder / "some", seed=3, targets=("q_proj", "v_proj"), strength=0.08)
    prompts = adapters.prompts(3, 60)
    cases, used = [], {}
    for i, (name, about) in enumerate(CASES.items()):
        first = attention if about.get("attention") else everywhere
        used[name] = (first, some, None)
        args: dict[str, Any] = {"lora_paths": [f"first={first}", f"second={some}"], "lora_backend": "torch_native"}
        args |= {"max_loras_per_batch": 4, "disable_radix_cache": True}
        if about.get("attention"):
            args["lora_target_modules"] = [*adapters.ATTENTION]
        which = str(recipe) if about["recipe"] == "low" else about["recipe"]
        save = str(folder / f"{i}.pt")
        cases.append(
            {"model": str(tiny_model), "recipe": which, "args": args, "prompts": prompts, "steps": STEPS, "save": save}
        )
    done = model_runs.run(cases, folder, model_runs.CPU, 900, "tests.support.run_lora")
    for name, result, case in zip(CASES, done, cases, strict=True):
        assert "error" not in result and "refused" not in result, (name, result)
        result |= {"log_probs": torch.load(case["save"]), "adapters": used[name]}
    return {"cases": dict(zip(CASES, done, strict=True)), "prompts": prompts, "model": tiny_model}


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> adapters.Reference:
    return adapters.Reference(tiny_model)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean absolute difference of the log probabilities of the 50 tokens that are likeliest to the reference."""
    top = theirs.topk(50, dim=-1).indices
    return float((ours.gather(-1, top) - theirs.gather(-1, top)).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_request_gets_its_own_adapter(case: str, ran: dict[str, Any], reference: adapters.Reference) -> None:
    result = ran["cases"][case]
    low = None if CASES[case]["recipe"] == "bf16" else "nvfp4"
    for i, who in enumerate(WHO):
        prompt = ran["prompts"][i]
        ids = [*prompt, *(step[i] for step in result["tokens"][:-1])]
        found = {
            (whose, form): distance(
                result["log_probs"][:, i], reference.log_probs(ids, len(prompt), adapter=folder, low=form)
            )
            for whose, folder in zip(WHO, result["adapters"], strict=True)
            for form in {None, low}
        }
        print(case, who, {f"{whose} {form or 'bf16'}": round(value, 4) for (whose, form), value in found.items()})
        own = found[who, low]
        # Of two codes the nearer one depends on the last bit of a BF16 product, hence the distance in NVFP4.
        assert own < (0.25 if low else 0.06)
        assert all(value > (1.8 if low else 4) * own for (whose, _), value in found.items() if whose != who), found
        if low:  # it is the low prompt that it follows, not the BF16 one
            assert found[who, None] > 1.15 * own, found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_was_counted_and_said(case: str, ran: dict[str, Any]) -> None:
    result, rows = ran["cases"][case], sum(map(len, ran["prompts"]))
    low = CASES[case]["recipe"] != "bf16"
    split = {"nvfp4": rows - 3, "bf16": 3} if low else {"bf16": rows}
    assert result["after"]["tokens"] == {"prefill": split, "decode": {"bf16": 3 * STEPS}}
    assert result["after"]["protected_rows"] == (3 if low else 0)
    said = " ".join(result["log"])
    if CASES[case].get("attention"):
        assert result["wrapped"] == 16 and re.search(r"fused in prefill: 8 RMSNorm, 8 SiLU(?!.*left out)", said), said
        assert "adapters (LoRA) may be for o_proj, qkv_proj" in said
    else:
        assert result["wrapped"] == 32 and "fused in prefill" not in said
    assert result["state"]["layers"] == result["after"]["layers"]


@pytest.mark.slow
def test_keys_and_values_of_adapters_are_apart(ran: dict[str, Any]) -> None:
    keys = ran["cases"]["low"]["keys"]
    assert len({*keys}) == 3 and all(key.startswith("mixquant:") for key in keys)


def test_an_adapter_on_a_fused_linear_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    method = MixQuantLinearMethod.__new__(MixQuantLinearMethod)
    monkeypatch.setattr(lora, "wrapped", lambda _: [("a.qkv_proj", SimpleNamespace(quant_method=method))])
    with pytest.raises(MixQuantError, match=r"adapters on a\.qkv_proj, which --lora-target-modules does not name"):
        LoadSteps._check_wrapped(torch.nn.Module())
    method.whole = True
    LoadSteps._check_wrapped(torch.nn.Module())


@pytest.mark.parametrize("named, whole", [(None, [True, True]), (["q_proj"], [True, False])])
def test_what_is_left_to_adapters(named: Any, whole: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    linears = [SimpleNamespace(whole=False), SimpleNamespace(whole=False)]
    names = ("model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj")
    experts = [("a", SimpleNamespace(low=("fp8",), stay_bf16=said.append)), ("b", SimpleNamespace(low=()))]
    monkeypatch.setattr(lifecycle.report, "linears", lambda _: zip(names, linears, strict=True))
    monkeypatch.setattr(lifecycle.report, "experts", lambda _: experts)
    schedule = SimpleNamespace(split=True, prunes=False, local=False)
    steps = LoadSteps(
        SimpleNamespace(
            schedule=schedule,
            recipe=SimpleNamespace(fuse=True),
            environment=Environment(),
            selection=SimpleNamespace(kernels={}),
        ),
        SimpleNamespace(ready=None),
    )
    args = SimpleNamespace(enable_lora=True, lora_paths=None, lora_target_modules=named)
    runner = SimpleNamespace(model=None, is_generation=True, server_args=args)
    runner.spec_algorithm = SimpleNamespace(name="NGRAM")
    steps._leave_to_adapters(runner)
    assert [linear.whole for linear in linears] == whole
    assert said == ["LoRA: SGLang runs experts with adapters by kernels of its own"]
    monkeypatch.setattr(lifecycle.fused, "fuse", lambda _: Counter())
    monkeypatch.setattr(lifecycle.last_layer, "prune_last_layer", lambda _: True)
    steps._fuse(runner)
    assert not schedule.prunes


@pytest.mark.parametrize(
    "named, expected",
    [
        (None, None),
        ({"all"}, None),
        ({"q_proj", "up_proj"}, {"qkv_proj", "gate_up_proj"}),
        (["o_proj"], {"o_proj"}),
    ],
)
def test_the_targets_of_adapters(named: Any, expected: set[str] | None) -> None:
    args = SimpleNamespace(enable_lora=True, lora_paths=None, lora_target_modules=named)
    assert lora.takes_adapters(args) and lora.targets(args) == expected
    assert not lora.takes_adapters(SimpleNamespace(enable_lora=None, lora_paths=None))
