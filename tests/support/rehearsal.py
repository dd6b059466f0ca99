"""A Blackwell server's start, prefill and decode without the GPU: ``python tests/support/rehearsal.py FOLDER``.

SGLang loads a tiny Qwen3 on the CPU through the plugin and its hooks, as a scheduler process does.  What asks for the
GPU is told that there is one, and what would run on it are stand-ins that note that they ran: FlashInfer's FP4 calls,
the FP8 GEMM, SGLang's fused gate and up projections of few rows (``DualGemm``).  "Capture" and "replay" of a prefill
graph run ``PrefillCudaGraphRunner._run_forward`` with the rows in the buffers that a graph would read.

Low-precision GEMMs sum in float64, whose order does not show in BF16, so that results can be compared to the bit.

One process of its own for a run: module constants of SGLang are patched.  Each scenario runs in a fork of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
import warnings
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LAYERS, HIDDEN, WIDE, VOCAB = 2, 128, 256, 512
EXPERTS, NARROW = 8, 64
BUCKETS = (4, 8, 12, 16, 32)
RAN: Counter[str] = Counter()  # kernel and [N, K] -> calls


@dataclasses.dataclass(frozen=True)
class Scenario:
    """``recipe`` None: SGLang without the plugin.  ``changes`` to the recipe's fields.  ``experts``: Qwen3-MoE."""

    name: str
    recipe: str | None
    capability: tuple[int, int] = (10, 0)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    experts: bool = False

    @property
    def decodes_low(self) -> bool:
        return self.recipe == "nvfp4-everywhere"


SCENARIOS = (
    Scenario("stock", None),
    Scenario("auto", "auto"),
    Scenario("auto on SM120", "auto", (12, 0)),
    Scenario("auto, emulated", "auto", changes={"kernel": "emulated"}),
    Scenario("auto, min_tokens", "auto", changes={"min_tokens": 13}),
    Scenario("nvfp4, FlashInfer's quantiser", "nvfp4", changes={"fuse": False}),
    Scenario("nvfp4, emulated", "nvfp4", changes={"kernel": "emulated", "fuse": False}),
    Scenario("nvfp4-everywhere", "nvfp4-everywhere"),
    Scenario("nvfp4-everywhere, FlashInfer's quantiser", "nvfp4-everywhere", changes={"fuse": False}),
    Scenario("nvfp4-everywhere, emulated", "nvfp4-everywhere", changes={"kernel": "emulated"}),
)
WITH_EXPERTS = (
    Scenario("experts, stock", None, experts=True),
    Scenario("experts, auto", "auto", experts=True),
    Scenario("experts, auto on SM103", "auto", (10, 3), experts=True),
    Scenario("experts, auto on SM120", "auto", (12, 0), experts=True),
    Scenario("experts, auto, emulated", "auto", changes={"kernel": "emulated"}, experts=True),
    Scenario("experts, nvfp4-everywhere", "nvfp4-everywhere", experts=True),
)


def checkpoint(folder: Path, experts: bool = False) -> Path:
    from safetensors.torch import save_file

    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if experts:
        config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS}
        config |= {"num_experts_per_tok": 2, "moe_intermediate_size": NARROW, "norm_topk_prob": True}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    shapes["model.norm"] = (HIDDEN,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + "self_attn.q_proj": (128, HIDDEN), layer + "self_attn.o_proj": (HIDDEN, 128)}
        shapes |= {layer + f"self_attn.{x}_proj": (64, HIDDEN) for x in "kv"}
        shapes |= {layer + f"self_attn.{x}_norm": (64,) for x in "qk"}
        wide = NARROW if experts else WIDE
        mlps = [f"mlp.experts.{e}." for e in range(EXPERTS)] if experts else ["mlp."]
        for mlp in mlps:
            shapes |= {layer + f"{mlp}{x}_proj": (wide, HIDDEN) for x in ("gate", "up")}
            shapes[layer + f"{mlp}down_proj"] = (HIDDEN, wide)
        if experts:
            shapes[layer + "mlp.gate"] = (EXPERTS, HIDDEN)
        shapes |= {layer + f"{x}_layernorm": (HIDDEN,) for x in ("input", "post_attention")}
    weights = {
        f"{name}.weight": (torch.randn(shape) * 0.1 if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- stand-ins ---------------------------------------------------------------------------------------------------------


def beside(name: str) -> Any:
    """The module next to this file: a script finds no package ``tests``."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(kernel: str, n: int, k: int) -> None:
    RAN[f"{kernel} {n}x{k}"] += 1


def multiply(x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: Any) -> torch.Tensor:
    assert x.dtype is w.dtype is torch.float8_e4m3fn
    ran("fp8", *w.shape)
    y = (x.double() @ w.double().t() * sx.double() * sw.double()).to(torch.bfloat16)
    return y if bias is None else y + bias


def dual_gemm_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gate, up and SiLU x up in one; rounds once, so that its results are not those of three kernels."""
    assert type(x) is torch.Tensor, f"DualGemm got {type(x).__name__}"
    assert x.dtype is weight.dtype is torch.bfloat16 and 1 <= len(x) <= 16
    ran("dual", *weight.shape)
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)


def stand_in(capability: tuple[int, int]) -> None:
    """Patches this process; for good."""
    from mixquant_sglang.formats import fp8
    from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
    from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
    from mixquant_sglang.kernels.rows import CapturedRows
    from mixquant_sglang.kernels.tuning import fp8_gemm, fp8_measure
    from mixquant_sglang.recipe.select import Device
    from mixquant_sglang.versions import fp4, machine

    blackwell = beside("blackwell")
    blackwell.SUM = torch.float64
    blackwell.install(setattr)
    from sglang.srt.layers.quantization import modelopt_quant

    def fp4_gemm(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        ran("nvfp4", weight.shape[1], 2 * weight.shape[0])
        return blackwell.gemm(x, weight, *rest)

    modelopt_quant.fp4_gemm = fp4_gemm
    blackwell.install_experts(setattr)
    import flashinfer.fused_moe

    def routed_moe(**arguments: Any) -> list[torch.Tensor]:
        experts, h = len(arguments["gemm1_weights"]), 2 * arguments["hidden_states"].shape[1]
        ran(f"nvfp4 {experts} experts", arguments["intermediate_size"], h)
        return blackwell.routed_moe(**arguments)  # type: ignore[no-any-return]

    flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe = routed_moe

    def emulated_nvfp4(self: Any, operand: tuple[torch.Tensor, ...], bias: Any) -> torch.Tensor:
        (part,), (alpha,) = self._parts, self._alphas
        ran("emulated nvfp4", *part.shape)
        return (operand[0].double() @ part.unscaled(torch.float32).double().t() * alpha).to(torch.bfloat16)

    def emulated_fp8(self: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        xq, packed = fp8.quantize_activations(x), self._packed
        ran("emulated fp8", *packed.data.shape)
        total = xq.data.double() @ packed.data.double().t() * xq.scales.double()[:, None] * packed.scales.double()
        return total.to(torch.bfloat16)

    EmulatedNVFP4.multiply = emulated_nvfp4  # type: ignore[method-assign]
    EmulatedFP8.matmul = emulated_fp8  # type: ignore[method-assign]
    fp8_gemm.CANDIDATES.clear()
    fp8_gemm.CANDIDATES["stand-in"] = multiply
    fp8_measure.milliseconds = lambda calls, seconds: [1.0 for call in calls if call() is not None]
    machine.device = lambda: Device(f"GPU that is not here, SM{capability[0]}{capability[1]}", capability)
    machine.kernel_versions = lambda: {"stand-in": "1"}
    fp4.fp4_gemm_measuring = lambda _runner: nullcontext()

    def gather(self: CapturedRows, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self.index.clamp(min=0)) * (self.index >= 0)[:, None].to(x.dtype)

    def scatter(self: CapturedRows, out: torch.Tensor, rows: torch.Tensor) -> None:
        out[self.index[self.index >= 0]] = rows[self.index >= 0]

    CapturedRows.gather, CapturedRows.scatter = gather, scatter  # type: ignore[method-assign]
    try:
        import sglang.kernels.ops.gemm as gemms
        from sglang.kernels.ops.gemm import cutedsl_dual_gemm
        from sglang.srt.layers import dual_gemm
    except ImportError:
        return  # 0.5.17 has none
    dual_gemm.is_cuda = lambda: True
    cutedsl_dual_gemm.is_sm100_supported = lambda: capability[0] == 10
    gemms.dual_gemm_swiglu = dual_gemm_swiglu


# -- the server's parts ------------------------------------------------------------------------------------------------


def load(folder: Path, scenario: Scenario) -> Any:
    """A ``ModelRunner`` as a scheduler process makes it."""
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    stand_in(scenario.capability)
    if scenario.recipe:
        from sglang.srt.plugins.hook_registry import HookRegistry

        from mixquant_sglang import recipe
        from mixquant_sglang.host import plugin

        asked = dataclasses.replace(recipe.load(scenario.recipe), **scenario.changes)
        recipe.load_requested = lambda: asked
        os.environ["MIXQUANT_ACTIVE"] = "1"
        plugin.register()
        HookRegistry.apply_hooks()
    else:
        from mixquant_sglang.versions import machine

        machine.allow_cpu()
    args = ServerArgs(
        model_path=str(folder),
        quantization="mixquant" if scenario.recipe else None,
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        skip_tokenizer_init=True,
        max_total_tokens=4096,
        max_running_requests=16,
        chunked_prefill_size=512,
    )
    if hasattr(args, "resolve_once"):  # 0.5.23
        args.resolve_once()
        ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
        one_batch.publish(args, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
    else:
        for initialize in ("moe_config", "fp8_gemm_config", "fp4_gemm_config"):
            getattr(one_batch, f"initialize_{initialize}")(args)
    one_batch.get_tokenizer = lambda *_args, **_kwargs: None
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return getattr(runner, "torch_runner", runner)


def batch_of(runner: Any, prompts: Sequence[int], new: int | None, bf16: bool) -> tuple[Any, Any]:
    """A ``ScheduleBatch`` of one extend pass over random prompts of these lengths, or their first ``new`` tokens."""
    from sglang.benchmark.one_batch import TreeCacheNamespace
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    numbers = torch.Generator().manual_seed(sum(prompts))
    requests = []
    for i, length in enumerate(prompts):
        sampling = SamplingParams(temperature=0, max_new_tokens=4)
        if bf16:
            sampling.custom_params = {"mixquant": {"prefill": "bf16"}}
        tokens = array("q", torch.randint(VOCAB, (length,), generator=numbers).tolist())
        request = Req(rid=str(i), origin_input_text="", origin_input_ids=tokens, sampling_params=sampling)
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        if hasattr(request, "set_extend_range"):  # 0.5.17
            request.set_extend_range(0, new or length)
        else:
            request.extend_end = new or length
        requests.append(request)
    pools = runner.req_to_token_pool, runner.token_to_kv_pool_allocator
    for pool in pools:
        pool.clear()
    cache = TreeCacheNamespace(page_size=1, device=runner.device, token_to_kv_pool_allocator=pools[1])
    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=pools[0],
        token_to_kv_pool_allocator=pools[1],
        tree_cache=cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids, batch.prefill_input_ids_cpu = batch.prefill_input_ids_cpu.clone(), None
    return batch, ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)


@dataclasses.dataclass
class Done:
    """What one forward pass did: kernels that ran, tokens that were counted for it, logits of the rows sampled from."""

    ran: dict[str, int]
    counted: dict[tuple[str, str], int]
    logits: torch.Tensor
    precision: str = ""  # as planned
    replayed: torch.Tensor | None = None  # the logits by way of a captured prefill graph, where one may be replayed


def forward(runner: Any, batch: Any) -> Done:
    from mixquant_sglang.host import runtime
    from mixquant_sglang.host.hooks.forward import scheduled_of

    run = runtime.current()
    before = Counter(run.counters.tokens) if run else Counter()
    RAN.clear()
    logits = runner.forward(batch).logits_output.next_token_logits.clone()
    plan = scheduled_of(batch)
    counted = Counter(run.counters.tokens) - before if run else {}
    return Done(dict(RAN), dict(counted), logits, plan.precision if plan else "")


def graph_runner(runner: Any) -> Any:
    """SGLang's prefill graph runner, with our hooks, as far as it runs without a GPU."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    class GraphRunner(PrefillCudaGraphRunner):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model_runner, self.layer_model = runner, runner.model.model
            self.prefill_backend_name = "breakable"
            self.capture_num_tokens, self.max_num_tokens = [*BUCKETS], BUCKETS[-1]
            self.capture_hidden_mode = CaptureHiddenMode.NULL

        def __getattr__(self, name: str) -> None:
            """What this stand-in does not set up is off."""

        def _prefill_forward_context(self, _batch: Any) -> Any:
            return forward_context(ForwardContext(attn_backend=runner.attn_backend))

        def _uses_eager_prefill_tail(self) -> bool:
            return True

        def _get_layer_model_positions(self, batch: Any) -> torch.Tensor:
            return batch.positions

        def _capture_pp_proxy_tensors(self, _tokens: int) -> None:
            return None

        def _pack_qwen_bcg_hc_output(self, output: Any) -> Any:
            return output

    return GraphRunner()


def run_graph(graphs: Any, batch: Any) -> Any:
    batch.dp_padding_mode = SimpleNamespace(is_max_len=lambda: False)  # as ``capture_prepare`` has one
    return graphs._run_forward(batch, len(batch.input_ids))


def replay(runner: Any, graphs: Any, batch: Any) -> torch.Tensor | None:
    """Logits by way of the graph of as many rows as the pass has; None where it may not be replayed."""
    from mixquant_sglang.host.hooks import graphs as hooks

    if not graphs.can_run_graph(batch):
        return None
    hooks.load_prefill_rows(graphs, batch)
    hidden = run_graph(graphs, batch)
    output = runner.model.logits_processor(batch.input_ids, hidden, runner.model.lm_head, batch)
    return output.next_token_logits.clone()  # type: ignore[no-any-return]


def play(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Start, capture, prefill, decode: what the scenario's server did, by name of the pass."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    began = time.perf_counter()
    runner = load(folder, scenario)
    print(f"{scenario.name}: loaded in {time.perf_counter() - began:.1f} s")
    at_load = dict(RAN)
    policies = (False,) if scenario.decodes_low else (False, True)  # there a request cannot ask for BF16
    done: dict[str, Done] = {}
    captured: dict[int, dict[str, int]] = {}
    graphs = graph_runner(runner)
    if scenario.recipe:
        for rows in reversed(BUCKETS):
            _, batch = batch_of(runner, [rows], None, bf16=False)
            RAN.clear()
            run_graph(graphs, batch)
            captured[rows] = dict(RAN)
    for rows in (*BUCKETS, 64):
        for name, prompts, new, bf16 in (
            ("prompts", [rows // 2, rows // 2], None, False),
            ("middle chunk", [100], rows, False),
            ("asked for bf16", [rows // 2, rows // 2], None, True),
        ):
            if bf16 not in policies:
                continue
            _, batch = batch_of(runner, prompts, new, bf16)
            done[f"{name}, {rows}"] = forward(runner, batch)
            if scenario.recipe and rows in BUCKETS:
                done[f"{name}, {rows}"].replayed = replay(runner, graphs, batch)
    for bf16 in policies:
        name = "decode behind bf16" if bf16 else "decode"
        schedule, batch = batch_of(runner, [9, 7], None, bf16)
        tokens = forward(runner, batch).logits.argmax(-1)
        schedule.input_ids = tokens.to(torch.int64)
        schedule.prepare_for_decode()
        batch = ForwardBatch.init_new(schedule, runner, return_hidden_states_before_norm=False)
        done[name] = forward(runner, batch)
    sizes: list[int] = []
    state = None
    if scenario.recipe:
        from mixquant_sglang.host import runtime
        from mixquant_sglang.host.hooks import graphs as hooks
        from mixquant_sglang.versions.dialect import dialect

        config = dialect().prefill_graphs(runner)
        config.backend, config.bs = "breakable", [4, 8, 16, 32]
        hooks.size_prefill_graphs(model_runner=runner, eager_runner=None)
        sizes = config.bs
        run = runtime.current()
        assert run is not None
        state = run.state()
    print(f"{scenario.name}: done in {time.perf_counter() - began:.1f} s")
    passes = {name: vars(what) for name, what in done.items()}
    return {"at_load": at_load, "captured": captured, "passes": passes, "sizes": sizes, "state": state}


def main(out: Path, only: Sequence[str]) -> None:
    """Plays the scenarios ``only``, or all of Qwen3, and writes ``out/NAME.pt`` for each, or ``out/NAME.txt`` with the
    traceback where it failed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    (models,) = find_spec("sglang.srt.models").submodule_search_locations  # type: ignore[union-attr]
    others = {file.stem for file in Path(models).iterdir()} - {"qwen3", "qwen3_moe", "qwen2_moe"}
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(others))  # saves importing them all
    torch.set_grad_enabled(False)

    import mixquant_sglang.host.config  # noqa: F401

    folders = [checkpoint(out / name, experts) for name, experts in (("model", False), ("experts", True))]
    for scenario in (*SCENARIOS, *WITH_EXPERTS):
        if scenario.experts if not only else scenario.name not in only:
            continue
        folder = folders[scenario.experts]
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            torch.save(play(folder, scenario), out / f"{scenario.name}.pt")
        finally:  # SystemExit too: whatever ended the start is the result
            if sys.exc_info()[0] is not None:
                (out / f"{scenario.name}.txt").write_text(traceback.format_exc())
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
