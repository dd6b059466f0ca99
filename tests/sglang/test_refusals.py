"""What is refused of SGLang's arguments, against the installed ServerArgs, and against the table in docs/support.md."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import server_args as sglang_args

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import compact, refusals, refused
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions import environment, machine
from mixquant_sglang.versions.dialect import dialect
from scripts.tools import support

# Fields that one of the tested versions alone has.
ONLY: dict[str, str] = support.data()["only"]["fields"]
# A value that is refused, of fields for which 2 is not.
REFUSED_VALUES: dict[str, Any] = {
    "cuda_graph_backend_prefill": "full",
    "cuda_graph_config": {"prefill": {"backend": "full"}},
    "device": "npu",
    "model_impl": "transformers",
    "load_format": "sharded_state",
    "speculative_draft_model_quantization": "mixquant",
    "disable_radix_cache": False,
}
GATHERED_VALUES: dict[str, Any] = {
    "cuda_graph_config": {"prefill": {"backend": "breakable"}},
    "speculative_algorithm": "NGRAM",
}

DETERMINISTIC_VALUES: dict[str, Any] = {
    "device": "cpu",
    "disable_radix_cache": False,
    "speculative_algorithm": "NGRAM",
}


def fields() -> set[str]:
    return {*sglang_args.ServerArgs.__annotations__} | {*getattr(sglang_args.ServerArgs, "__struct_fields__", ())}


def unresolved(**given: Any) -> Any:
    """ServerArgs before any resolution: 0.5.17 resolves as it constructs."""
    if hasattr(sglang_args.ServerArgs, "__struct_fields__"):
        return sglang_args.ServerArgs(**given)
    args = sglang_args.ServerArgs.__new__(sglang_args.ServerArgs)
    for name in fields():
        object.__setattr__(args, name, given.get(name, getattr(sglang_args.ServerArgs, name, None)))
    return args


def plain() -> Any:
    return SimpleNamespace(tokenizer_worker_num=1, disaggregation_mode="null", torchao_config="", device="cuda")


@pytest.mark.parametrize("field", sorted({r.field.partition(".")[0] for r in refused.REFUSALS} | {*refusals.WATCHING}))
def test_the_fields_exist(field: str) -> None:
    assert machine.sglang_version() in machine.TESTED, "say in ONLY what this version lacks"
    assert (field in fields()) == (ONLY.get(field, machine.sglang_version()) == machine.sglang_version())


@pytest.mark.parametrize("refusal", refused.REFUSALS, ids=lambda refusal: refusal.flag)
def test_each_is_refused_with_reason_and_way_out(refusal: refused.Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals.check_server_args(plain())
    monkeypatch.setattr(dialect(), "stored_pages_are_named", lambda: False)  # as in 0.5.17
    monkeypatch.setattr(dialect(), "tree_ignores_keys", lambda: True)
    monkeypatch.setattr(environment, "serves_by_rust", lambda: refusal.flag == "SGLANG_RUST_SERVER")
    interleaved = refusal.flag == "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"
    monkeypatch.setattr(environment, "interleaves_experts", lambda: interleaved)
    monkeypatch.setattr(environment, "has_own_http_app", lambda: True)
    monkeypatch.setattr(dialect(), "multiplexes", lambda: refusal.flag != "--enable-pdmux")
    asked = recipe.load("nvfp4-everywhere") if refusal.decodes_low else None
    bad, field = plain(), refusal.field.partition(".")[0]
    setattr(bad, field, REFUSED_VALUES.get(field, 2))
    if refusal.gathered:
        setattr(bad, field, GATHERED_VALUES.get(field, 2))
        refusals.check_server_args(bad)
        bad.enable_dp_attention = True
    if refusal.deterministic:
        setattr(bad, field, DETERMINISTIC_VALUES.get(field, 2))
        monkeypatch.setattr(dialect(), "tree_ignores_keys", lambda: False)
        refusals.check_server_args(bad)
        bad.enable_deterministic_inference = True
    if refusal.beside or refusal.decodes_low:
        setattr(bad, field, GATHERED_VALUES.get(field, 2))
        refusals.check_server_args(bad, recipe.load("fp8"))
        setattr(bad, refusal.beside or field, True)
    with pytest.raises(MixQuantError) as error:
        refusals.check_server_args(bad, asked)
    assert f"does not go with {refusal.flag}: {refusal.why}; {refusal.instead}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", support.data()["only"]["refused"])
def test_what_goes_with_one_version_goes_there(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of docs/support.md that are not "refused", against this SGLang as it is."""
    (refusal,) = [refusal for refusal in refused.REFUSALS if refusal.flag == flag]
    bad, field = plain(), refusal.field.partition(".")[0]
    if flag.startswith("SGLANG_"):
        monkeypatch.setenv(flag.split()[0], "1")
    setattr(bad, field, REFUSED_VALUES.get(field, 2))
    try:
        refusals.check_server_args(bad)
    except MixQuantError as error:
        said = str(error)
    else:
        said = ""
    cell = support.where(refusal, machine.sglang_version(), support.data()["only"])
    assert (f"does not go with {flag}: " in said) == (cell == "refused"), said


def test_a_server_in_rust_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of SGLang's HTTP server and tokenizer manager, where policies are read."""
    args = unresolved(model_path=str(tiny_model))
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(MixQuantError, match=r"SGLANG_RUST_SERVER: .*; unset it"):
        refusals.check_server_args(args)
    monkeypatch.setenv("SGLANG_RUST_SERVER", "0")
    refusals.check_server_args(args)


def test_interleaved_experts_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.environ import envs

    if not hasattr(envs, "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"):  # 0.5.17 does not read it
        monkeypatch.setenv("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", "1")
        assert not environment.interleaves_experts()
        return
    args = unresolved(model_path=str(tiny_model))
    monkeypatch.setenv("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", "1")
    with pytest.raises(MixQuantError, match=r"SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED: .*; unset it"):
        refusals.check_server_args(args)
    monkeypatch.setenv("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", "0")
    refusals.check_server_args(args)


@pytest.mark.parametrize(
    "backend", ["triton_kernel", "flashinfer_cutlass", "flashinfer_trtllm", "deep_gemm", "cutlass"]
)
def test_other_kernels_for_experts_are_refused(backend: str, tiny_model: Path) -> None:
    for allowed in ("auto", "triton"):
        refusals.check_server_args(unresolved(model_path=str(tiny_model), moe_runner_backend=allowed))
    with pytest.raises(MixQuantError, match="--moe-runner-backend other than auto and triton"):
        refusals.check_server_args(unresolved(model_path=str(tiny_model), moe_runner_backend=backend))


def test_the_port_of_the_other_grpc_server_is_not_refused() -> None:
    args = plain()
    args.grpc_port, args.smg_grpc_mode = 40000, True
    refusals.check_server_args(args)


def test_the_defaults_of_this_sglang_are_not_refused(tiny_model: Path) -> None:
    refusals.check_server_args(unresolved(model_path=str(tiny_model)))


def test_why_sglangs_multiplexing_does_not_start() -> None:
    """Its mixin reads of the scheduler what that keeps elsewhere by now, before the model is loaded."""
    import inspect

    from sglang.srt.managers import scheduler
    from sglang.srt.multiplex.multiplexing_mixin import SchedulerMultiplexMixin as Mixin

    text = inspect.getsource(scheduler.Scheduler)
    for name, method in (("gpu_id", Mixin.init_pdmux), ("tp_size", Mixin.event_loop_pdmux)):
        has = re.search(rf"self\.{name}\b.* = |def {name}\b", text) is not None
        assert dialect().multiplexes() == (has or f"self.{name}" not in inspect.getsource(method)), name


def test_prefill_graphs_of_the_resolved_config() -> None:
    args = plain()
    for backend in ("breakable", "disabled"):
        args.cuda_graph_config = SimpleNamespace(prefill=SimpleNamespace(backend=backend))
        refusals.check_server_args(args)
    args.cuda_graph_config = SimpleNamespace(prefill=SimpleNamespace(backend="tc_piecewise"))
    with pytest.raises(MixQuantError, match="--disable-prefill-cuda-graph"):
        refusals.check_server_args(args)
    args.device = "cpu"  # where SGLang 0.5.17 resolves to tc_piecewise and captures nothing
    refusals.check_server_args(args)


def test_all_lines_are_given_where_all_are_asked_for() -> None:
    args = plain()
    args.enable_two_batch_overlap, args.cpu_offload_gb, args.enable_paged_experts = True, 4, True
    lines = [*refusals.refused_lines(args)]
    flags = ["--enable-paged-experts", "--enable-two-batch-overlap", "--cpu-offload-gb"]
    assert [line.partition(" does not go with ")[2].partition(":")[0] for line in lines] == flags
    with pytest.raises(MixQuantError) as first:
        refusals.check_server_args(args)
    assert str(first.value) == lines[0]
    assert not [*refusals.refused_lines(plain())]


def test_what_sglang_turned_on_by_itself_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--rl-on-policy-target turns deterministic inference on; 0.5.23 writes that beside the record."""
    from sglang.srt.environ import envs

    for env in (envs.SGLANG_VLM_CACHE_SIZE_MB, envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE):
        monkeypatch.setenv(env.name, "0")  # the handler sets them
    args = unresolved(model_path=str(tiny_model), rl_on_policy_target="fsdp", attention_backend="triton", device="cuda")
    refusals.check_server_args(args)
    if hasattr(args, "_handle_deterministic_inference"):
        args._handle_deterministic_inference()
    else:
        from sglang.srt.arg_groups.attention_hook import handle_deterministic_inference

        handle_deterministic_inference(args)
        assert not args.enable_deterministic_inference
    with pytest.raises(MixQuantError, match=r"a radix cache with .*--rl-on-policy-target, which turns it on"):
        refusals.check_server_args(args)
    args.disable_radix_cache = True
    refusals.check_server_args(args)


def test_deterministic_inference_goes_without_a_radix_cache(tmp_path: Path) -> None:
    """And with one, where the recipe is BF16 throughout."""
    args = plain()
    args.enable_deterministic_inference, args.disable_radix_cache = True, False
    refusals.check_server_args(args, recipe.load("bf16"))
    rules = "layers:\n  - {match: '*down_proj', prefill: fp8}\n"
    (tmp_path / "some.yaml").write_text(f"version: 1\nprefill: {{precision: bf16}}\n{rules}")
    for low in (None, recipe.load("auto"), recipe.load("fp8"), recipe.load(str(tmp_path / "some.yaml"))):
        args.disable_radix_cache = False
        with pytest.raises(MixQuantError, match=r"a radix cache with .*; pass --disable-radix-cache; or use recipe"):
            refusals.check_server_args(args, low)
        args.disable_radix_cache = True
        refusals.check_server_args(args, low)


def test_on_a_cpu_it_is_sglangs_alone(tiny_model: Path) -> None:
    """Which has no products for it there, and no attention back end either."""
    for device in ("cpu", "cpu:0"):
        args = unresolved(
            model_path=str(tiny_model), device=device, enable_deterministic_inference=True, disable_radix_cache=True
        )
        with pytest.raises(MixQuantError, match="--device cpu with deterministic inference: SGLang's own products"):
            refusals.check_server_args(args)
        refusals.check_server_args(args, recipe.load("bf16"))


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("fp8", (9, 0), ""),
        ("nvfp4", (9, 0), ""),
        ("auto", (8, 0), ""),
        ("fp8", (10, 0), ""),
        ("nvfp4-emulated", (12, 0), ""),
        ("bf16", (10, 0), ""),
        ("nvfp4-everywhere", (9, 0), ""),
        ("auto", (10, 0), "recipe auto comes to native nvfp4 here, .*; use recipe fp8"),
        ("nvfp4-fp8", (12, 0), "comes to native nvfp4 here"),
        ("fp8-attention", (9, 0), "has attention in fp8, "),
        ("fp8-compact", (9, 0), "decodes in w8a16, "),
    ],
)
def test_recipes_with_deterministic_inference(
    name: str, device: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe.load(name)
    selection = select(asked, Device("a GPU", device))
    monkeypatch.delenv(machine.DETERMINISTIC_ENV, raising=False)
    refusals.check_recipe(asked, selection)
    monkeypatch.setenv(machine.DETERMINISTIC_ENV, "1")
    if not said:
        refusals.check_recipe(asked, selection)
        return
    with pytest.raises(MixQuantError, match=f"{said}.*--enable-deterministic-inference"):
        refusals.check_recipe(asked, selection)


def test_as_given_counts_too() -> None:
    """0.5.23 resolves --enable-dp-attention to False, and says so in --attn-dp-size."""
    args = plain()
    args.enable_dp_attention, args._resolved_overrides = True, [("a hook", {"enable_dp_attention": False})]
    refusals.check_server_args(args)
    args.pp_size = 2
    with pytest.raises(MixQuantError, match="--pp-size > 1 with DP attention"):
        refusals.check_server_args(args)
    args.enable_dp_attention, args.attn_dp_size = False, 2  # 0.5.23
    with pytest.raises(MixQuantError, match="--pp-size > 1 with DP attention"):
        refusals.check_server_args(args)
    args.attn_dp_size = 1
    refusals.check_server_args(args)


def test_dp_attention_is_stocks_where_all_is_bf16() -> None:
    """But in a pair, of which halves compare what they are."""
    args = plain()
    args.enable_dp_attention, args.pp_size, args.speculative_algorithm = True, 2, "NGRAM"
    args.cuda_graph_config = {"prefill": {"backend": "breakable"}}
    refusals.check_server_args(args, recipe.load("bf16"))
    args.disaggregation_mode = "prefill"
    with pytest.raises(MixQuantError, match="--disaggregation-mode with DP attention"):
        refusals.check_server_args(args, recipe.load("bf16"))


def test_the_resolved_value_counts_and_the_last_one_wins() -> None:
    args = plain()
    args._resolved_overrides = [("a", {"moe_a2a_backend": "deepep"}), ("b", {"moe_a2a_backend": "none"})]
    refusals.check_server_args(args)
    args._resolved_overrides.append(("c", {"moe_a2a_backend": "megamoe"}))
    with pytest.raises(MixQuantError, match="--moe-a2a-backend"):
        refusals.check_server_args(args)


@pytest.mark.parametrize("field", refusals.WATCHING)
def test_who_looks_at_modules_is_found(field: str) -> None:
    args = plain()
    assert refusals.watching(args) == []
    setattr(args, field, "something")
    assert refusals.watching(args) == ["--" + field.replace("_", "-")]


def test_sglangs_dumper_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.debug_utils import dumper

    monkeypatch.setattr(dumper, "dumper", SimpleNamespace(may_enable=True))
    assert refusals.watching(plain()) == ["DUMPER_ENABLE"]


def test_nothing_is_fused_where_somebody_looks(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from collections import Counter

    from mixquant_sglang.host import lifecycle

    called: list[object] = []
    schedule = SimpleNamespace(split=True, prunes=False, local=False)
    run = SimpleNamespace(
        schedule=schedule,
        recipe=SimpleNamespace(fuse=True),
        environment=Environment(),
        selection=SimpleNamespace(kernels={}),
    )
    made = lifecycle.LoadSteps(run, SimpleNamespace(ready=None))
    monkeypatch.setattr(lifecycle.fused, "fuse", lambda model: called.append(model) or Counter())
    monkeypatch.setattr(lifecycle.last_layer, "prune_last_layer", lambda model: True)
    runner = SimpleNamespace(
        model="a model", is_generation=True, server_args=plain(), spec_algorithm=SimpleNamespace(name="NONE")
    )
    runner.server_args.forward_hooks = [{"name": "a"}]
    with caplog.at_level(logging.INFO):
        made._fuse(runner)
    assert not called and not schedule.prunes
    assert "nothing fused and no row left out, so that --forward-hooks sees all" in caplog.text
    runner.server_args.forward_hooks = None
    made._fuse(runner)
    assert called == ["a model"] and schedule.prunes


def test_a_cpu_whose_sglang_repacks_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("this CPU", None)
    monkeypatch.setattr(machine, "device", lambda: cpu)
    low, plain = recipe.load("nvfp4"), recipe.load("bf16")
    refusals.check_recipe(low, select(low, cpu))
    monkeypatch.setattr(machine, "repacks_weights", lambda: True)
    refusals.check_recipe(plain, select(plain, cpu))
    with pytest.raises(MixQuantError, match=r"repacks BF16 weights for AMX.*recipe nvfp4 has nvfp4"):
        refusals.check_recipe(low, select(low, cpu))


@pytest.mark.parametrize("refusal", compact.REFUSALS, ids=lambda refusal: refusal.flag)
def test_what_does_not_go_without_bf16_weights(refusal: refused.Refusal) -> None:
    """Of such recipes alone, and the page says so."""
    args = plain()
    setattr(args, refusal.field, 2)
    lines = [*refusals.refused_lines(args, recipe.load("fp8-compact"))]
    assert [line for line in lines if refusal.why in line] and refusal.instead in lines[-1]
    for name in ("fp8", "nvfp4-everywhere"):
        assert not [line for line in refusals.refused_lines(args, recipe.load(name)) if refusal.why in line]
    flag = refusal.flag.split()[0]
    assert f"`{flag}`" in (Path(__file__).parents[2] / "docs" / "compact.md").read_text()


def test_recipes_that_need_bf16_weights_and_keep_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    device = Device("a GPU", (9, 0))

    def refusal(text: str) -> str:
        file.write_text("version: 1\n" + text)
        asked = recipe.load(str(file))
        with pytest.raises(MixQuantError) as caught:
            refusals.check_recipe(asked, select(asked, device))
        return str(caught.value)

    said = refusal("prefill: {precision: fp8, min_tokens: 16}\ndecode: {precision: w8a16}\n")
    assert "shorter passes stay bf16" in said and said.endswith("the recipe decodes them in w8a16")
    assert said.startswith(f"{file} prefill.min_tokens: ")
    by_flag = recipe.with_min_tokens(recipe.load("fp8-compact"), "512")  # whose file has no such line
    with pytest.raises(MixQuantError, match=r"^MIXQUANT_MIN_TOKENS \(--mixquant-min-tokens\): shorter passes"):
        refusals.check_recipe(by_flag, select(by_flag, device))
    said = refusal("prefill: {precision: nvfp4, weights: some/model}\ndecode: {precision: w4a16}\n")
    assert said.endswith("decode: w4a16 packs the model's own weights; leave 'prefill: {weights: ...}' out")
    monkeypatch.setenv(machine.DISAGGREGATION_ENV, "decode")
    said = refusal("layers:\n  - {match: 're:.*down_proj', prefill: fp8, decode: w8a16}\n")
    assert "decode: w8a16 has not been tested in a prefill/decode pair" in said
