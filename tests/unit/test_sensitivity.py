"""`mixquant sensitivity`: exact emulation, exact zeros, and whether the layer that was spoilt on purpose is found."""

from __future__ import annotations

import argparse
import io
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED
from mixquant_sglang.tools import cli
from mixquant_sglang.tools.plan.gpus import find_gpu
from mixquant_sglang.tools.plan.models import find_model
from mixquant_sglang.tools.plan.predict import predict
from mixquant_sglang.tools.plan.recipes import make_plan
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.tools.progress import Bar
from mixquant_sglang.tools.quantize import calibration
from mixquant_sglang.tools.sensitivity import measure as sensitivity
from mixquant_sglang.tools.sensitivity.choice import Measured, Prices, choose, floor_of, groups_of
from mixquant_sglang.tools.sensitivity.kl import KL, Group, Measurement, kl_divergence
from mixquant_sglang.tools.sensitivity.report import as_yaml, patterns
from mixquant_sglang.tools.sensitivity.report import comments as sensitivity_comments

LAYERS, HIDDEN, INNER, WORDS = 2, 64, 96, 128
KINDS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]
SHARDS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w1 w2{% endif %}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_model(folder: Path, spoilt: str | None = None, bias: bool = False, layers: int = LAYERS) -> Path:
    """A tiny Qwen3. ``spoilt``: a qkv or gate_up whose weight gets one huge column in each block of 16, and the norm
    before it the inverse: nothing changes but what NVFP4 makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE).save_pretrained(folder)
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=WORDS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            attention_bias=bias,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight *= 3
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(std=0.1)
            if spoilt:
                block, kind = spoilt.rsplit(".", 2)[0], spoilt.rsplit(".", 2)[1] + "." + spoilt.rsplit(".", 1)[1]
                norm = "input_layernorm" if kind == KINDS[0] else "post_attention_layernorm"
                model.get_submodule(f"{block}.{norm}").weight[::16] /= 256
                for shard in SHARDS[kind]:
                    model.get_submodule(f"{block}.{kind.rpartition('.')[0]}.{shard}").weight[:, ::16] *= 256
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = torch.Generator().manual_seed(1)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(WORDS, (n,), generator=random).tolist())

    lines: list[dict[str, Any]] = [{"text": words(n)} for n in (40, 25, 2)]
    lines.append({"messages": [{"role": "user", "content": words(20)}, {"role": "assistant", "content": words(9)}]})
    lines.append({"messages": [{"role": "user", "content": words(20)}]})
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def arguments(model: Path, data: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sensitivity.add_arguments(parser)
    base = (str(model), "--data", str(data), "--gpu", "B200", "--priced-as", "Qwen3-8B", "--device", "cpu")
    return parser.parse_args([*base, "--answer-tokens", "8", *more])


def measurement(folder: Path, data: Path, groups: list[Group], **changes: Any) -> Measurement:
    options = {"scales": "search", "device": "cpu", "max_tokens": 64, "answer_tokens": 8, "protect": True}
    samples = calibration.read_samples(data)
    return Measurement(folder, samples, groups, **{**options, **changes}, tick=lambda: None)


def group(name: str, precision: str = "nvfp4") -> Group:
    _, _, layer, block, leaf = name.split(".")
    kind = f"{block}.{leaf}"
    parent = name.rpartition(".")[0]
    return Group(name, kind, int(layer), tuple(f"{parent}.{shard}" for shard in SHARDS.get(kind, (leaf,))), precision)


# The measurement.


@pytest.mark.parametrize(("precision", "kernel"), [("nvfp4", EmulatedNVFP4), ("fp8", EmulatedFP8)])
@pytest.mark.parametrize("bias", [False, True])
def test_emulation_is_that_of_the_kernel(
    tmp_path: Path, data: Path, precision: str, kernel: type[EmulatedNVFP4 | EmulatedFP8], bias: bool
) -> None:
    qkv = group(NAMES[0], precision)
    measured = measurement(write_model(tmp_path / "model", bias=bias), data, [qkv])
    linears = [measured._linears[name] for name in qkv.members]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with measured._running(qkv, measured.pack(qkv)), torch.inference_mode():
        handles = [
            linear.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0][0], y[0])}))
            for name, linear in zip(qkv.members, linears, strict=True)
        ]
        measured._hidden(measured._prompts[0])
    for handle in handles:
        handle.remove()
    x = seen[qkv.members[0]][0]
    fused = kernel(torch.cat([linear.weight.detach() for linear in linears]).bfloat16(), scales="search")
    biases = torch.cat([m.bias for m in linears]).detach().bfloat16() if bias else None
    expected = fused.matmul(x[:32].bfloat16().contiguous(), biases).float()
    got = torch.cat([seen[name][1] for name in qkv.members], dim=1)
    with torch.inference_mode():
        bf16 = torch.cat([linear(x) for linear in linears], dim=1)
    assert torch.equal(got[:32], expected) and torch.equal(got[32:], bf16[32:])
    assert not torch.equal(expected, bf16[:32])
    assert all(not linear._forward_hooks for linear in linears)


def test_zeros_are_exact(model: Path, data: Path) -> None:
    groups = [group(name) for name in NAMES]
    measured = measurement(model, data, groups)
    assert measured.kl({}) == KL(0.0, 0.0)
    for one in groups:
        kl = measured.kl({one: measured.pack(one)})
        # of the last layer, a BF16 row reads the others' keys and values alone
        assert (kl.answer > 0) == (one.layer < LAYERS - 1 or one.kind == KINDS[0])
        assert kl.prompt > 0
    unprotected = measurement(model, data, groups, protect=False)
    assert unprotected.kl({groups[-1]: unprotected.pack(groups[-1])}).answer > 0
    assert measured.tokens == (40 + 25 + 2 + 29 + 22, 8 + 8 + 1 + 8 + 8)  # an open turn is opened for the answer


def test_kl_is_that_of_the_logits(model: Path, data: Path) -> None:
    groups = [group(name) for name in NAMES]
    measured = measurement(model, data, groups)
    packed = {one: measured.pack(one) for one in groups}
    found = measured.kl(packed)
    by_row: list[list[float]] = [[], []]
    head = measured._model.lm_head.weight.double()
    with torch.inference_mode():
        for ids in measured._prompts:
            p = (measured._hidden(ids).double() @ head.t()).log_softmax(-1)
            with ExitStack() as stack:
                for one, copy in packed.items():
                    stack.enter_context(measured._running(one, copy))
                q = (measured._hidden(ids).double() @ head.t()).log_softmax(-1)
            rows = (p.exp() * (p - q)).sum(-1).tolist()
            cut = len(rows) - min(8, len(rows) // 2)
            by_row[0] += rows[cut:]
            by_row[1] += rows[:cut]
    assert found.answer == pytest.approx(sum(by_row[0]) / len(by_row[0]), rel=1e-4)
    assert found.prompt == pytest.approx(sum(by_row[1]) / len(by_row[1]), rel=1e-4)
    assert measured.kl({}) == KL(0.0, 0.0)  # the hooks are gone


def test_kl_divergence_of_near_and_far_distributions() -> None:
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 1000, generator=random) * 4
    for size in (0.0, 1e-4, 1e-2, 1.0, 30.0):
        other = logits + size * torch.randn(64, 1000, generator=random)
        p, q = (x.double().log_softmax(-1) for x in (logits, other))
        exact = (p.exp() * (p - q)).sum(-1)
        got = kl_divergence(logits.log_softmax(-1), other.log_softmax(-1))
        torch.testing.assert_close(got, exact, rtol=2e-3, atol=1e-12)
        assert (got >= 0).all()


ESSAY = """A server that prefills in low precision reads each prompt faster, and writes its answers as before. The
prompt's keys and values are what is left of it: attention reads them at every step, and what was rounded there stays
rounded."""


def test_fp8_of_one_linear_is_not_lost_in_rounding(tiny_model: Path, tmp_path: Path) -> None:
    """In FP32 what the linears do alone adds up to what they do together; in BF16 each has the noise of all."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": ESSAY}) + "\n")
    groups = [group(f"model.layers.{layer}.{kind}", "fp8") for layer in range(8) for kind in KINDS]

    def of(dtype: torch.dtype) -> tuple[float, float, float]:
        measured = measurement(tiny_model, data, groups, dtype=dtype)
        packed = {one: measured.pack(one) for one in groups}
        alone = math.fsum(measured.kl({one: copy}).answer for one, copy in packed.items())
        return alone, measured.kl(packed).answer, measured.rounding(groups).answer

    alone, together, noise = of(torch.float32)
    assert 0.5 < alone / together < 2 and noise < together / 20
    alone, together, noise = of(torch.bfloat16)
    assert alone / together > 2 and noise > together / 20


# The choice.


def measured(name: str, kl: float, gain: float) -> Measured:
    return Measured(group(name), KL(kl, kl), gain)


def test_choice() -> None:
    four = [measured(NAMES[0], 4, 1), measured(NAMES[1], 9, 3), measured(NAMES[2], 1, 1), measured(NAMES[3], 0, -0.1)]
    free = {NAMES[3]}
    assert choose(four, 0) == free
    assert choose(four, 1) == free | {NAMES[0]}
    assert choose(four, 2.9) == free | {NAMES[0], NAMES[2]}  # what does not fit is passed over
    assert choose(four, 4) == free | {NAMES[0], NAMES[1]}
    assert choose(four, 5) == set(NAMES[:4])
    assert choose(four, 5, floor=1) == free | {NAMES[0], NAMES[1]}  # what is no more than noise is not paid for


def test_floors() -> None:
    assert floor_of(KL(8.0, 9.0), 16, "float32") == 1.0  # twice the share of one
    assert floor_of(KL(8.0, 9.0), 16, "bfloat16") == 8.0  # one other rounding is enough


def test_a_worse_recipe_is_told(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: Measurement, low: dict[Group, Any]) -> KL:
        return KL(0.0 if not low else 2.0 if len(low) < len(NAMES) else 1.0, 1.0)

    args = arguments(model, data, "--budget", "50%", "--json")
    assert sensitivity.run(args) == 0
    plain = capsys.readouterr()
    assert "WORSE" not in plain.out and not plain.err.count("does more to the answers")
    monkeypatch.setattr(Measurement, "kl", spoilt)
    monkeypatch.setattr(Measurement, "rounding", lambda self, groups: KL(0.1, 0.1))
    assert sensitivity.run(args) == 0
    told = capsys.readouterr()
    assert "# WORSE: the recipe that came out does more to the answers" in told.out
    assert "mixquant sensitivity: the recipe that came out does more" in told.err
    assert json.loads(told.out.splitlines()[-1])["worse"] is True


@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_prices_are_those_of_plan(tmp_path: Path, gpu: str) -> None:
    shape = find_model("Qwen3-8B")
    loaded = recipe.load("auto")
    selection = sensitivity.select(loaded, sensitivity.Device(gpu, find_gpu(gpu).capability))
    groups = groups_of(loaded, selection, shape)
    prices = Prices(shape, find_gpu(gpu), loaded, selection, 8192)
    work = Workload(8192)
    plans = {name: make_plan(name, shape, find_gpu(gpu)) for name in ("bf16", "auto")}
    by_plan = {name: predict(plan, shape, find_gpu(gpu), work) for name, plan in plans.items()}
    low = by_plan["auto"]
    assert {one.precision for one in groups} == {"fp8", selection.prefill}
    assert prices.speed(groups, []) == pytest.approx((low.prefill_ms, low.prefill_speedup))
    assert prices.speed(groups, groups) == pytest.approx((by_plan["bf16"].prefill_ms, 1.0))
    gain = math.fsum(prices.gain(one) for one in groups)
    assert gain == pytest.approx(by_plan["bf16"].prefill_ms - low.prefill_ms)
    down = [one for one in groups if one.kind == "mlp.down_proj"]
    file = tmp_path / "r.yaml"
    attention = "- {match: 're:.*self_attn', prefill: fp8}\n"
    file.write_text(f"version: 1\nprefill: {{precision: {selection.prefill}}}\n" + RULE + attention)
    planned = predict(make_plan(str(file), shape, find_gpu(gpu)), shape, find_gpu(gpu), work)
    assert prices.speed(groups, down) == pytest.approx((planned.prefill_ms, planned.prefill_speedup))
    ruled = groups_of(recipe.load(str(file)), selection, shape)
    assert len(ruled) == len(groups) - len(down)
    assert prices.speed(ruled, []) == pytest.approx((planned.prefill_ms, planned.prefill_speedup))


RULE = "layers:\n- {match: 're:.*down_proj', prefill: bf16}\n"


# The command.


def kept_by(text: str, folder: Path, *prefill: str) -> set[str]:
    """The modules that a recipe keeps in BF16, of all of the model; the others prefill in ``prefill``."""
    file = folder / "emitted.yaml"
    file.write_text(text)
    loaded = recipe.load(str(file))
    assert loaded.decode == "bf16"
    matcher = RuleMatcher(loaded.layers, FUSED)
    precisions = {name: matcher.precisions(name, loaded.prefill, loaded.decode) for name in NAMES}
    matcher.check_all_matched(NAMES)
    assert set(precisions.values()) <= {(precision, "bf16") for precision in ("bf16", *prefill)}
    return {name for name, (low, _) in precisions.items() if low == "bf16"}


@pytest.mark.parametrize("spoilt", ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"])
def test_a_spoilt_layer_is_found_and_kept(tmp_path: Path, data: Path, spoilt: str) -> None:
    options = ("--recipe", "nvfp4", "--budget", "60%")
    result = sensitivity.measure(arguments(write_model(tmp_path / "model", spoilt), data, *options))
    worst = max(result.groups, key=lambda one: one.kl.answer)
    assert worst.group.name == spoilt and max(result.groups, key=lambda one: one.kl.prompt) == worst
    assert spoilt in result.kept and len(result.kept) < len(NAMES)
    assert kept_by(as_yaml(result), tmp_path, "nvfp4") == result.kept
    assert result.runs["bf16"].kl == KL(0.0, 0.0)
    assert result.runs["result"].kl.answer < 0.5 * result.runs["recipe"].kl.answer
    assert result.runs["bf16"].prefill_ms > result.runs["result"].prefill_ms > result.runs["recipe"].prefill_ms
    assert 0 < result.given_back_ms <= 0.6 * result.gain_ms
    back = result.runs["result"].prefill_ms - result.runs["recipe"].prefill_ms
    assert back == pytest.approx(result.given_back_ms)


def test_the_ends_of_the_budget(tmp_path: Path, model: Path, data: Path) -> None:
    nothing = sensitivity.measure(arguments(model, data, "--budget", "0%"))
    assert not nothing.kept and nothing.given_back_ms == 0
    assert nothing.runs["result"] == nothing.runs["recipe"]
    assert kept_by(as_yaml(nothing), tmp_path, "nvfp4", "fp8") == set()
    assert "prefill: fp8, optional: true}" in as_yaml(nothing)  # the rule of auto
    everything = sensitivity.measure(arguments(model, data, "--budget", "100%"))
    assert everything.kept == set(NAMES) and everything.given_back_ms == pytest.approx(everything.gain_ms)
    assert everything.runs["result"].kl == KL(0.0, 0.0)
    assert kept_by(as_yaml(everything), tmp_path) == set(NAMES)
    assert "prefill: {precision: bf16" in as_yaml(everything) and "layers" not in as_yaml(everything)


def test_it_is_deterministic(model: Path, data: Path) -> None:
    assert sensitivity.measure(arguments(model, data)) == sensitivity.measure(arguments(model, data))


def test_recipes_keep_what_they_say(tmp_path: Path, model: Path, data: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\nprefill: {precision: fp8, min_tokens: 2, fuse: false}\nprotect: {last_prompt_token: false}\n"
        "verify: false\nweights: {scales: absmax}\nlayers:\n- {match: 're:.*\\.1\\.mlp', prefill: bf16}\n"
    )
    result = sensitivity.measure(arguments(model, data, "--recipe", str(file), "--budget", "40%"))
    assert {one.group.name for one in result.groups} == {*NAMES[:6]}
    assert result.kept
    out = tmp_path / "out.yaml"
    out.write_text(as_yaml(result))
    before, after = recipe.load(str(file)), recipe.load(str(out))
    assert after.layers[-1].match == before.layers[0].match
    same = {"name": "", "source": "", "layers": (), "description": ""}
    assert replace(after, **same) == replace(before, **same)
    assert kept_by(out.read_text(), tmp_path, "fp8") == result.kept | set(NAMES[6:])


def test_the_tail_and_the_kernels_that_do_not_fuse_are_kept_and_priced(tmp_path: Path, model: Path, data: Path) -> None:
    def found(name: str, text: str) -> tuple[sensitivity.Result, recipe.Recipe]:
        file = tmp_path / f"{name}.yaml"
        file.write_text("version: 1\n" + text)
        result = sensitivity.measure(arguments(model, data, "--recipe", str(file), "--budget", "0%"))
        (tmp_path / f"{name}-out.yaml").write_text(as_yaml(result))
        return result, recipe.load(str(tmp_path / f"{name}-out.yaml"))

    plain, _ = found("plain", "prefill: {precision: fp8}\n")
    tail, written = found("tail", "prefill: {precision: fp8}\nprotect: {last_prompt_tokens: 200}\n")
    unfused, kept = found("unfused", "prefill: {precision: fp8, fuse: false}\n")
    assert written.protected_tail == 200 and not kept.fuse
    assert tail.gain_ms < plain.gain_ms and unfused.gain_ms < plain.gain_ms
    assert tail.runs["recipe"].kl == KL(0.0, 0.0) != plain.runs["recipe"].kl  # all rows of these samples are BF16
    assert "and the 199 before them: last_prompt_tokens" in sensitivity_comments(tail)


def test_command_line(
    tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out.yaml"
    options = ["--priced-as", "Qwen3-8B", "--budget", "20%", "--samples", "2", "--max-tokens", "20"]
    command = ["sensitivity", str(model), "--data", str(data), *options]
    assert cli.main([*command, "--out", str(out), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines(keepends=True)
    assert "".join(lines) == out.read_text()
    made = json.loads(last)
    assert made["gpu"] == "H200" and made["prefill"] == "fp8" and made["tokens"] == [40, 20]
    kept = {one["name"] for one in made["groups"] if one["kept"]}
    assert kept and kept == kept_by(out.read_text(), tmp_path, "fp8") == kept_by(made["result"], tmp_path, "fp8")
    assert made["runs"]["bf16"]["kl"] == {"answer": 0.0, "prompt": 0.0}
    assert made["given_back_ms"] <= 0.2 * made["gain_ms"]


def test_rules_stay_short(model: Path, data: Path) -> None:
    result = sensitivity.measure(arguments(model, data))
    first, all_down = frozenset(NAMES[:2]), frozenset(name for name in NAMES if name.endswith("down_proj"))
    for kept, rules in (
        (first, [r"re:model\.layers\.0\.(self_attn\.qkv_proj|self_attn\.o_proj)$"]),
        (all_down, [r"re:model\.layers\.\d+\.mlp\.down_proj$"]),
        (frozenset(), []),
    ):
        assert patterns(replace(result, kept=kept)) == rules


REFUSALS = (
    (("--budget", "5"), "--budget: '5' is no share of the gain; allowed: 0% to 100%, like 5%"),
    (("--budget", "101%"), "--budget: '101%' is no share"),
    (("--budget", "-1%"), "--budget: "),
    (("--gpu", "H20"), "--gpu: unknown GPU 'H20'"),
    (("--recipe", "nvfp"), "unknown recipe 'nvfp'"),
    (("--recipe", "bf16"), "prefills every linear of model in bf16: nothing to measure"),
    (("--recipe", "nvfp4-everywhere"), "decodes in nvfp4; `sensitivity` weighs"),
    (("--gpu", "H200", "--recipe", "nvfp4", "--input-len", "1"), "is predicted to gain nothing on H200"),
    (("--priced-as", "Qwen4"), "is neither a directory with a config.json nor a known model"),
    (("--samples", "0"), "--samples: 0 is too small; allowed: at least 1"),
    (("--max-tokens", "1"), "--max-tokens: 1 is too small; allowed: at least 2"),
    (("--answer-tokens", "0"), "--answer-tokens: 0 is too small"),
    (("--input-len", "0"), "--input-len: 0 is out of range"),
    (("--out", "/no/such/folder/r.yaml"), "--out: /no/such/folder: no such folder"),
    (("--data", "/no/such.jsonl"), "--data: /no/such.jsonl: cannot be read"),
)


def refusal(model: Path, data: Path, *more: str) -> str:
    with pytest.raises(MixQuantError) as caught:
        sensitivity.measure(arguments(model, data, *more))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[" ".join(options) for options, _ in REFUSALS])
def test_refusals(model: Path, data: Path, options: tuple[str, ...], message: str) -> None:
    options = (f"{options[0]}={options[1]}", *options[2:])  # argparse takes -1% for an option otherwise
    assert message in refusal(model, data, *options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no samples"),
        ('{"text": "w1"}', "--data: sample 1 is fewer than two tokens"),
        ('{"messages": ["w1"]}', "--data: sample 1 does not fit the chat template"),
        ("[1]", ":1: a line is"),
    ],
)
def test_refused_data(tmp_path: Path, model: Path, text: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    assert message in refusal(model, file)


def test_refused_models(tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing", data)
    broken = write_model(tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "qwen9"}))
    assert "transformers cannot load it" in refusal(broken, data)
    from transformers import Qwen3ForCausalLM

    forward = Qwen3ForCausalLM.forward

    def capped(self: Qwen3ForCausalLM, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", capped)
    assert "does more to its logits than lm_head" in refusal(model, data)


def test_ready_made_weights_are_refused(tmp_path: Path, model: Path, data: Path) -> None:
    file = tmp_path / "ready.yaml"
    file.write_text("version: 1\nprefill: {precision: nvfp4, weights: somewhere}\n")
    assert "leave prefill.weights out" in refusal(model, data, "--recipe", str(file))


def test_too_little_memory_is_a_refusal(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Measurement, "_hidden", full)
    assert "--compute bfloat16 takes half of it" in refusal(model, data)
    assert "fewer --max-tokens take less" in refusal(model, data, "--compute", "bfloat16")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_without_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, lines in ((io.StringIO(), 2), (Terminal(), 0)):
        monkeypatch.setattr("sys.stderr", stream)
        with Bar(total=200, desc="work") as bar:
            for _ in range(200):
                bar.update()
        text = stream.getvalue()
        assert text.count("work") >= 2 and ("\r" in text) is (lines == 0)
        if lines:  # the first and the last; ten seconds did not pass
            first, last = filter(None, text.splitlines())
            assert "0/200" in first and "200/200" in last
