"""Which of SGLang's own linears are made BF16 at load, by name and by place, and what the report calls them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import probe, report, runtime, stock
from mixquant_sglang.host.hooks import architecture, launcher, observe, registry
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.passes import running
from mixquant_sglang.recipe import LayerRule
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import A_GATE, NEVER, OUTSIDE, TIED
from mixquant_sglang.recipe.roles import Kind, Role, by_role
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions import batches, machine

CPU = Device("this CPU", None)
B200 = Device("B200", (10, 0))


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "check_hooks_took_effect", lambda *_: None)
    monkeypatch.setattr(machine, "device", lambda: CPU)
    monkeypatch.setattr(runtime, "_runtime", None)
    yield


def model(monkeypatch: pytest.MonkeyPatch, asked: str, **prefixes: str) -> tuple[Any, torch.nn.Module]:
    """A config of recipe ``asked`` and a model of linears: path (dots as __) -> the prefix that SGLang gave each."""
    from sglang.srt.layers.linear import ReplicatedLinear

    from mixquant_sglang.host.config import MixQuantConfig

    monkeypatch.setenv(recipe.RECIPE_ENV, asked)
    config, root = MixQuantConfig(), torch.nn.Module()
    for path, prefix in prefixes.items():
        *parents, leaf = path.split("__")
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        linear = ReplicatedLinear(
            64, 32, bias=False, params_dtype=torch.bfloat16, quant_config=config if prefix else None, prefix=prefix
        )
        linear.weight.data.normal_()
        linear.quant_method.process_weights_after_loading(linear)
        at.add_module(leaf, linear)
    return config, root


def finish(config: Any, root: torch.nn.Module) -> Runtime:
    runner = SimpleNamespace(model=root, device="cpu", is_generation=True, server_args=SimpleNamespace())
    runner.spec_algorithm = SimpleNamespace(name="NONE")
    config._runtime.lifecycle.finish_load(runner)
    return config._runtime  # type: ignore[no-any-return]


def test_what_is_built_as_if_it_were_the_model_stays_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = model(
        monkeypatch,
        "nvfp4",
        language_model__model__layers__0__fc="model.layers.0.fc",
        eyes__layers__0__fc="layers.0.fc",  # SigLIP-2, RADIO, InternVL build their towers without a prefix
        language_model__model__layers__0__in_proj_ba="x.in_proj_qkvz",
        language_model__model__layers__0__alone="",
    )
    tower = root.get_submodule("eyes.layers.0.fc")
    assert tower.quant_method.extra_bytes > 0
    run = finish(config, root)
    assert tower.quant_method.extra_bytes == 0 and tower.quant_method.refusal == OUTSIDE
    assert run.stays_bf16 == {
        OUTSIDE: ["eyes.layers.0.fc"],
        A_GATE: ["language_model.model.layers.0.in_proj_ba"],
        "SGLang gives it no quantization config": ["language_model.model.layers.0.alone"],
    }
    assert run.precisions == {"nvfp4": 1, "bf16": 3} and run.schedule.table[Role.PROMPT, Kind.LINEAR] == "nvfp4"
    assert run.state()["stays_bf16"][OUTSIDE] == "eyes.layers.0.fc"


def test_the_language_model_of_a_wrapper() -> None:
    def tree(**parts: torch.nn.Module) -> torch.nn.Module:
        root = torch.nn.Module()
        for name, part in parts.items():
            root.add_module(name, part)
        return root

    text = torch.nn.Module()
    assert report.language_model(tree(model=text)) is text
    assert report.language_model(tree(visual=torch.nn.Module(), language_model=tree(model=text))) is text
    assert report.language_model(tree(talker=torch.nn.Module(), thinker=tree(model=text))) is text
    assert report.language_model(tree(model=tree(visual=torch.nn.Module(), language_model=text))) is text
    plain = tree(transformer=torch.nn.Module())
    assert report.language_model(plain) is plain


def moe_block(config: Any, **linears: int) -> torch.nn.Module:
    """Linears of as many outputs, as SGLang's MoE blocks hold them."""
    from sglang.srt.layers.linear import ReplicatedLinear

    block = torch.nn.Module()
    for name, outputs in linears.items():
        linear = ReplicatedLinear(
            64, outputs, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=f"model.mlp.{name}"
        )
        linear.weight.data.normal_()
        linear.quant_method.process_weights_after_loading(linear)
        block.add_module(name, linear)
    return block


def experts_of(config: Any, name: str) -> torch.nn.Module:
    from mixquant_sglang.layers.experts import MixQuantExpertsMethod

    class Experts(report.FusedMoE):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    layer: Any = Experts()
    layer.num_experts, layer.num_fused_shared_experts = 48, 0
    layer.quant_method = MixQuantExpertsMethod(config._runtime, name, "fp8", "bf16", flags=(False, False, False))
    return layer  # type: ignore[no-any-return]


def test_a_router_is_known_by_its_place_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = model(monkeypatch, "fp8")
    block = moe_block(config, chooser=48, latent_proj=64)
    block.add_module("experts", experts_of(config, "model.mlp.experts"))
    root.add_module("mlp", block)
    assert block.chooser.quant_method.low
    report.keep_outside_bf16(root)
    assert not block.chooser.quant_method.low and block.chooser.quant_method.refusal == NEVER
    assert block.latent_proj.quant_method.low and block.experts.quant_method.low


def test_experts_that_share_the_rows_of_a_pass_stay_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ernie 4.5 VL has experts for rows of texts and others for those of images: none knows the protected rows."""
    config, root = model(monkeypatch, "fp8")
    block = moe_block(config, up_proj=64)
    for name in ("text_experts", "vision_experts"):
        block.add_module(name, experts_of(config, f"model.mlp.{name}"))
    root.add_module("mlp", block)
    report.keep_outside_bf16(root)
    for experts in (block.text_experts, block.vision_experts):
        assert not experts.quant_method.low and experts.quant_method.refusal == report.PART_OF_ROWS
    assert block.up_proj.quant_method.low


def test_a_weight_that_is_not_bf16_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang builds some routers in float32, and gives them rows of it."""
    from sglang.srt.layers.linear import ReplicatedLinear

    config, root = model(monkeypatch, "fp8", model__layers__0__fc="model.layers.0.fc")
    linear = ReplicatedLinear(
        64, 32, bias=False, params_dtype=torch.float32, quant_config=config, prefix="model.layers.0.text_experts_gate"
    )
    linear.weight.data.normal_()
    linear.quant_method.process_weights_after_loading(linear)
    root.get_submodule("model.layers.0").add_module("text_experts_gate", linear)
    run = finish(config, root)
    assert run.stays_bf16["its weight is float32, not bfloat16"] == ["model.layers.0.text_experts_gate"]
    x = torch.randn(5, 64)
    with running.scope(running.Pass(Role.PROMPT)):
        assert torch.equal(linear(x)[0], x @ linear.weight.t())


def test_two_linears_of_one_prefix_cannot_take_ready_made_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = model(monkeypatch, "nvfp4", model__a__fc="a.fc", model__b__fc="a.fc")
    steps = config._runtime.lifecycle
    steps._check_prefixes(root)
    steps._ready = object()
    with pytest.raises(MixQuantError, match=r"model\.a\.fc and model\.b\.fc are both a\.fc to SGLang"):
        steps._check_prefixes(root)


def test_nor_can_two_moe_layers_of_one_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.layers.experts import MixQuantExpertsMethod

    config, root = model(monkeypatch, "nvfp4")
    for name in ("one", "other"):
        method = MixQuantExpertsMethod(config._runtime, "a.experts", "nvfp4", "bf16", flags=(False, False, False))
        layer = torch.nn.Module()
        layer.quant_method = method
        root.add_module(name, layer)
    config._runtime.lifecycle._ready = object()
    with pytest.raises(MixQuantError, match=r"one and other are both a\.experts to SGLang"):
        config._runtime.lifecycle._check_prefixes(root)


def test_experts_a_token_takes_are_asked_of_the_router_where_the_layer_was_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama-4 builds its experts without top_k."""
    from mixquant_sglang.layers import expert_config, experts

    class Router(torch.nn.Module):
        def __init__(self, top_k: int) -> None:
            super().__init__()
            self.topk_config = SimpleNamespace(top_k=top_k)

    monkeypatch.setattr(expert_config, "TopK", Router)
    config, _ = model(monkeypatch, "nvfp4")

    def block(told: int | None, *beside: torch.nn.Module) -> tuple[torch.nn.Module, Any]:
        method = experts.MixQuantExpertsMethod(config._runtime, "a", "nvfp4", "bf16", flags=(False, False, False))
        layer, parent = torch.nn.Module(), torch.nn.Module()
        layer.moe_runner_config = SimpleNamespace(top_k=told)
        method._layers = [layer]
        for at, child in enumerate((*beside, layer)):
            parent.add_module(str(at), child)
        return parent, method

    blocks = [block(8, Router(2)), block(None, Router(1)), block(None)]
    whole = torch.nn.ModuleList(parent for parent, _ in blocks)
    for _, method in blocks:
        method.find_choices(whole)
    assert [method._choices for _, method in blocks] == [8, 1, None]
    assert [method.low for _, method in blocks] == [{"nvfp4"}, {"nvfp4"}, set()]
    assert blocks[2][1].refusal == "neither it nor a router beside it says how many experts a token takes"


def test_subclasses_of_fused_moe_are_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = model(monkeypatch, "nvfp4", model__layers__0__fc="model.layers.0.fc")

    class Special(report.FusedMoE):  # type: ignore[misc]
        num_experts, num_fused_shared_experts = 8, 0

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    root.get_submodule("model.layers.0").add_module("experts", Special())
    run = finish(config, root)
    assert run.experts == {"bf16": 1} and run.stays_bf16[report.NOT_OFFERED] == ["model.layers.0.experts"]
    assert run.state()["experts"] == {"bf16": 1}


def test_a_tied_head_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    class Logits(report.LogitsProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    class Table(report.VocabParallelEmbedding):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    class Head(report.ParallelLMHead):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    def kept(**parts: torch.nn.Module) -> dict[str, list[str]]:
        config, root = model(monkeypatch, "nvfp4", model__layers__0__fc="model.layers.0.fc")
        root.get_submodule("model").add_module("embed_tokens", Table())
        for name, part in parts.items():
            root.add_module(name, part)
        return finish(config, root).stays_bf16

    assert kept(logits_processor=Logits()) == {TIED: ["model.embed_tokens"]}
    assert kept(logits_processor=Logits(), lm_head=Head()) == {NEVER: ["lm_head"]}
    assert kept() == {}  # it makes no logits
    assert kept(logits_processor=Logits(), lm_head=report.PPMissingLayer()) == {}  # another stage does


def test_a_config_built_after_load_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mixquant_sglang.host.config import MixQuantConfig

    config, root = model(monkeypatch, "nvfp4", model__layers__0__fc="model.layers.0.fc")
    run = finish(config, root)
    steps = run.lifecycle
    assert steps is not None and steps.unproved
    with caplog.at_level(logging.WARNING):
        MixQuantConfig()
    assert run.lifecycle is steps and steps.unproved and "after the model was loaded: not used" in caplog.text


# -- labels ---


def labels(asked: str, *layers: tuple[str, str], **changes: object) -> tuple[str, str]:
    made = replace(recipe.load(asked), **changes)
    run = Runtime(made, select(made, CPU))
    run.schedule.label([SimpleNamespace(kind=Kind.LINEAR, precision=by_role(*each), shape=(64, 64)) for each in layers])
    table = run.schedule.table
    assert table[Role.PROTECTED, Kind.LINEAR] == table[Role.DECODE, Kind.LINEAR] == table[Role.VERIFY, Kind.LINEAR]
    return table[Role.PROMPT, Kind.LINEAR], table[Role.DECODE, Kind.LINEAR]


def test_a_column_goes_by_what_its_layers_run() -> None:
    assert labels("auto", ("nvfp4", "bf16"), ("fp8", "bf16")) == ("nvfp4+fp8", "bf16")
    assert labels("auto", ("nvfp4", "bf16"), ("bf16", "bf16")) == ("nvfp4", "bf16")
    assert labels("auto", ("fp8", "bf16"), ("bf16", "bf16")) == ("fp8", "bf16")
    assert labels("nvfp4", ("bf16", "bf16")) == ("bf16", "bf16") == labels("bf16")
    assert labels("bf16", ("nvfp4", "bf16"), ("fp8", "bf16")) == ("fp8+nvfp4", "bf16")
    assert labels("nvfp4", ("nvfp4", "fp8"), ("nvfp4", "bf16")) == ("nvfp4", "fp8")
    assert labels("nvfp4-everywhere", ("nvfp4", "nvfp4")) == ("nvfp4", "nvfp4")


def test_passes_and_tokens_are_counted_under_the_label() -> None:
    from mixquant_sglang.passes.rows import RequestRows

    made = recipe.load("bf16")
    run = Runtime(made, select(made, CPU))
    run.schedule.split = True
    run.schedule.label([SimpleNamespace(kind=Kind.LINEAR, precision=by_role("fp8", "bf16"), shape=(64, 64))])
    plan = run.schedule.prefill([RequestRows(9, 0, 9)], torch.device("cpu"))
    assert plan.precision == "fp8"
    assert {key: n for key, n in plan.tokens.items() if n} == {("prefill", "fp8"): 8, ("prefill", "bf16"): 1}


def test_which_rules_ask_for_low_precision() -> None:
    rules = [
        LayerRule("re:.*q_proj", "fp8", None, "r.yaml:1"),
        LayerRule("a.down_proj", "bf16", None, "r.yaml:2"),
        LayerRule("re:.*", "nvfp4", None, "r.yaml:3", optional=True),
    ]
    matcher = RuleMatcher(rules, {"qk": ("q_proj", "k_proj")})
    assert matcher.asking("a.q_proj") == (rules[0],) == matcher.asking("a.qk")
    assert matcher.asking("a.down_proj") == () == matcher.asking("a.up_proj")


# -- the probe ---


def test_a_model_that_cannot_be_run_without_a_scheduler_is_served_unproved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, root = model(monkeypatch, "nvfp4", model__layers__0__fc="model.layers.0.fc")
    run = finish(config, root)
    assert run.lifecycle is not None and run.lifecycle.unproved

    def cannot(*_: object) -> None:
        raise AttributeError("a pool of its own kind")

    runner = SimpleNamespace(
        model=root,
        device="cpu",
        is_generation=True,
        model_config=SimpleNamespace(context_len=4096, vocab_size=99),
        server_args=SimpleNamespace(chunked_prefill_size=512),
        req_to_token_pool=SimpleNamespace(available_size=lambda: 8, clear=lambda: None),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 999, clear=lambda: None),
    )
    monkeypatch.setattr(batches, "prefill_batch", cannot)
    before = vars(root.get_submodule("model.layers.0.fc").quant_method).copy()
    counters = run.counters
    with caplog.at_level(logging.WARNING):
        run.lifecycle.prove(runner, object())
    assert "not proved by running: AttributeError: a pool of its own kind" in caplog.text
    assert not run.lifecycle.unproved and run.counters is counters and not hasattr(runner, "eager_runner")
    assert vars(root.get_submodule("model.layers.0.fc").quant_method) == before
    assert run.state()["unproven"] == "AttributeError: a pool of its own kind"


def test_a_model_that_cannot_run_ends_the_start(caplog: pytest.LogCaptureFixture) -> None:
    def cannot(_: object) -> None:
        raise RuntimeError("mat1 and mat2")

    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), forward=cannot)
    with pytest.raises(RuntimeError, match="mat1"), caplog.at_level(logging.ERROR):
        probe._forward(runner, SimpleNamespace(input_ids=[1, 2, 3]))
    assert "Linear cannot run a pass of 3 tokens, so it cannot serve" in caplog.text


def test_pools_that_do_not_come_back_are_an_error() -> None:
    sizes = iter([8, 8, 8, 7])
    pool = SimpleNamespace(available_size=lambda: next(sizes), clear=lambda: None)
    pools = batches.Pools(SimpleNamespace(req_to_token_pool=pool, token_to_kv_pool_allocator=pool))
    with pytest.raises(RuntimeError, match=r"\[8, 7\] free instead of \[8, 8\]"), pools.borrowed():
        pass


def test_metrics_wait_for_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe.load("nvfp4")
    run = Runtime(made, select(made, CPU))
    run.lifecycle = SimpleNamespace(loading=False, unproved=True)  # type: ignore[assignment]
    monkeypatch.setattr(runtime, "_runtime", run)
    monkeypatch.setattr(observe, "_labels", {"model_name": "m"})
    observe.publish_metrics()
    assert observe._labels is not None


# -- models that SGLang runs by other code ---


def config_of(name: str, **text: int) -> Any:
    return SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[name]), hf_text_config=SimpleNamespace(**text), model_path="M"
    )


@pytest.mark.parametrize(
    "name", ["KimiLinearForCausalLM", "Glm5NextForConditionalGeneration", "BeamForCausalLM", "MuseGlimmerForCausalLM"]
)
def test_models_whose_bf16_code_depends_on_the_name_are_refused(name: str) -> None:
    with pytest.raises(MixQuantError, match=f"M is {name}: .* would not be that of stock"):
        stock.check_model(config_of(name), lambda: CPU, None)


def test_encoder_decoders_are_refused() -> None:
    wanted = config_of("MllamaForConditionalGeneration")
    wanted.is_encoder_decoder = True
    with pytest.raises(MixQuantError, match="encoder rows are not rows of the prompt"):
        stock.check_model(wanted, lambda: CPU, "auto")


def test_moe_back_ends_that_sglang_picks_for_unnamed_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = config_of("Qwen3MoeForCausalLM", num_experts=8)
    with pytest.raises(MixQuantError, match=r"picks the MoE back end flashinfer_trtllm .*--moe-runner-backend triton"):
        stock.check_model(moe, lambda: B200, "auto")
    for device, backend in ((B200, "triton"), (Device("H200", (9, 0)), "auto"), (CPU, "auto"), (B200, None)):
        stock.check_model(moe, lambda device=device: device, backend)
    stock.check_model(config_of("Qwen3_5ForConditionalGeneration"), lambda: B200, "auto")  # the dense one
    gpt = config_of("GptOssForCausalLM", num_local_experts=8)
    stock.check_model(gpt, lambda: CPU, "auto")
    with pytest.raises(MixQuantError, match="picks the MoE back end triton_kernel"):
        stock.check_model(gpt, lambda: Device("H200", (9, 0)), "auto")
    with pytest.raises(MixQuantError, match="another form of top-k"):
        stock.check_model(config_of("DeepseekV3ForCausalLM", n_routed_experts=8), lambda: CPU, "triton_kernel")


def test_the_launcher_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(dtype=torch.bfloat16)
    asked = SimpleNamespace(
        quantization="mixquant",
        hf_config=SimpleNamespace(architectures=["KimiLinearForCausalLM"]),
        hf_text_config=text,
        model_path="M",
        dtype=torch.bfloat16,
    )
    with pytest.raises(MixQuantError, match="M is KimiLinearForCausalLM"):
        launcher.check_checkpoint(asked)


def test_the_name_is_set_aside_while_the_class_is_chosen_and_comes_back() -> None:
    seen = []

    def original(config: Any) -> str:
        seen.append(config.quantization)
        if len(seen) == 2:
            raise ValueError("no such class")
        return "class"

    config = SimpleNamespace(quantization="mixquant")
    assert architecture.choose_architecture(original, config) == "class"
    with pytest.raises(ValueError, match="no such class"):
        architecture.choose_architecture(original, config)
    assert seen == [None, None] and config.quantization == "mixquant"
    other = SimpleNamespace(quantization="fp8")
    architecture.choose_architecture(original, other)
    assert seen[-1] == "fp8"


@pytest.mark.parametrize("error", [RuntimeError("a kernel"), SystemExit("a refusal")])
def test_a_model_that_cannot_run_is_named_before_its_own_error(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(_batch: Any) -> None:
        raise error

    runner = SimpleNamespace(model=torch.nn.Module(), forward=forward)
    batch = SimpleNamespace(input_ids=[1] * 12)
    with caplog.at_level(logging.ERROR), pytest.raises(type(error), match=r"a kernel|a refusal"):
        probe._forward(runner, batch)
    assert "Module cannot run a pass of 12 tokens, so it cannot serve" in caplog.text
    caplog.clear()
    runner.forward = lambda _batch: None
    probe._forward(runner, batch)
    assert caplog.text == ""
