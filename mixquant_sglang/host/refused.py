"""The flags of SGLang that mixquant refuses, each with why and the way out; ``docs/support.md`` has the same table."""

from __future__ import annotations

from typing import Any

from mixquant_sglang.host.refusal import Refusal, is_set, several
from mixquant_sglang.host.refused_deterministic import DETERMINISTIC
from mixquant_sglang.host.refused_gathered import GATHERED
from mixquant_sglang.versions import environment, machine, storage
from mixquant_sglang.versions.dialect import dialect


def _unnamed(value: Any) -> bool:
    return is_set(value) and not dialect().stored_pages_are_named()


def _whole_graph(value: Any) -> bool:
    return value in ("full", "tc_piecewise")


_TP = "use --tp-size"
_LEAVE_OUT = "leave it out"
_CP = "context parallelism splits and reorders the rows of a pass"
_FORWARD = "it replaces the model's forward pass, which has not been tested"
_RANKS = "the linears of some layers get other rows than those of the pass"
_BREAKABLE = "use 'breakable' (SGLang's default on CUDA) or 'disabled'"
_GRAPHS = (
    "a graph of the whole pass would hold the choice of rows for the last layer's attention that was made at capture, "
    "and traced code that of all protected rows; breakable graphs run attention between their pieces"
)
_SEVERAL_DRAFTS = "several drafts, which some models turn on, have not been tested"
_CHECKPOINT = "serve the plain BF16 checkpoint"

# Those whose loader fills the weights first and then calls process_weights_after_loading (model_loader/loader.py):
# sharded_state, presharded and remote call it before, layered, remote_instance and ipc_cache never.
LOAD_FORMATS = (
    "auto", "safetensors", "pt", "npcache", "dummy", "mistral", "fastsafetensors", "instanttensor", "runai_streamer",
)  # fmt: skip

DRAFTS = ("NGRAM", "STANDALONE", "EAGLE", "EAGLE3", "NEXTN")

# What is not here was seen working or does not touch us: docs/support.md.
REFUSALS: tuple[Refusal, ...] = (
    # processes
    Refusal(
        "tokenizer_worker_num",
        "SGLANG_HTTP_SERVER_APP_PATH with --tokenizer-worker-num > 1",
        lambda v: v > 1 and environment.has_own_http_app(),
        "that app is not SGLang's own, so a request's BF16 prefill might be ignored",
        "unset it, or use one tokenizer worker",
    ),
    Refusal(
        "port",
        "SGLANG_RUST_SERVER",
        lambda _: environment.serves_by_rust(),
        "that server reads requests where no plugin is, so a request's BF16 prefill would be ignored",
        "unset it",
    ),
    Refusal(
        "grpc_port",
        "--grpc-port",
        is_set,
        "that server drops custom_params of embeddings, scores and reranking, so a BF16 prefill would be ignored",
        "use HTTP",
        unless=("smg_grpc_mode", "grpc_mode"),
    ),
    Refusal("use_ray", "--use-ray", is_set, "its actors ask for GPUs, and mixquant has not run in one", _LEAVE_OUT),
    Refusal(
        "device",
        "--device other than cuda and cpu",
        lambda v: is_set(v) and str(v).partition(":")[0] not in ("cuda", "cpu"),
        "nothing here has run on it",
        "use an NVIDIA GPU or the CPU",
    ),
    # the rows of a pass
    *GATHERED,
    Refusal("attn_cp_size", "--attn-cp-size > 1", several, _CP, _TP),
    Refusal("enable_prefill_cp", "--enable-prefill-cp", is_set, _CP, _TP),
    Refusal("enable_prefill_context_parallel", "--enable-prefill-context-parallel", is_set, _CP, _TP),
    Refusal("enable_dsa_prefill_context_parallel", "--enable-dsa-prefill-context-parallel", is_set, _CP, _TP),
    Refusal("enable_cp_tp_group_sharing", "prefill context parallelism in the TP group", is_set, _CP, _TP),
    Refusal(
        "dcp_size",
        "--dcp-size > 1",
        several,
        "the last layer's attention over some rows has not been tested with decode context parallelism",
        _TP,
    ),
    Refusal(
        "enable_layernorm_sp",
        "--enable-layernorm-sp",
        is_set,
        "it splits the rows of a pass over ranks, and multiplies linears itself, in BF16 and past our counters",
        _LEAVE_OUT,
    ),
    Refusal(
        "enable_attn_tp_input_scattered",
        "--enable-attn-tp-input-scattered",
        is_set,
        "it splits the rows of a pass over ranks",
        _LEAVE_OUT,
    ),
    Refusal("moe_dense_tp_size", "--moe-dense-tp-size", is_set, _RANKS, _LEAVE_OUT),
    Refusal("moe_dp_size", "--moe-dp-size > 1", several, _RANKS, _LEAVE_OUT),
    Refusal("moe_a2a_backend", "--moe-a2a-backend", is_set, _RANKS, "use --ep-size without it"),
    Refusal(
        "moe_runner_backend",
        "--moe-runner-backend other than auto and triton",
        lambda v: v not in ("auto", "triton"),
        "its kernels want experts in another layout than the one that low-precision experts are made from",
        "leave it out, or pass triton",
    ),
    Refusal(
        "port",
        "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED",
        lambda _: environment.interleaves_experts(),
        "it permutes the rows of the experts' weights, from which low-precision experts are made",
        "unset it",
    ),
    Refusal(
        "enable_paged_experts", "--enable-paged-experts", is_set, "it moves experts' weights while serving", _LEAVE_OUT
    ),
    Refusal("dwdp_size", "--dwdp-size > 1", several, "it has not been tested", _LEAVE_OUT),
    Refusal(
        "enable_two_batch_overlap", "--enable-two-batch-overlap", is_set, "it splits the rows of a pass", _LEAVE_OUT
    ),
    Refusal(
        "enable_single_batch_overlap", "--enable-single-batch-overlap", is_set, "it has not been tested", _LEAVE_OUT
    ),
    Refusal(
        "enable_pdmux",
        "--enable-pdmux",
        is_set,
        "prefill of a few layers at a time beside decode on another stream has been run in no test",
        "use --chunked-prefill-size to bound what decode waits for",
    ),
    Refusal(
        "enable_decoder_swa_bounded_replay",
        "--enable-decoder-swa-bounded-replay",
        is_set,
        "it leaves rows out of prefill, which has not been tested with row protection",
        "pass --no-enable-decoder-swa-bounded-replay",
    ),
    Refusal(
        "enable_encoder_swa_bounded_replay",
        "--enable-encoder-swa-bounded-replay",
        is_set,
        "it prefills cached rows again, which has not been tested with row protection",
        _LEAVE_OUT,
    ),
    # what a pass is for
    Refusal(
        "enable_return_aux_hidden_states",
        "--enable-return-aux-hidden-states",
        is_set,
        "prompt rows are those of low-precision prefill, which a draft should not be trained on unasked",
        "serve the model without the plugin for it",
    ),
    Refusal(
        "speculative_algorithm",
        "--speculative-algorithm other than " + ", ".join(DRAFTS),
        lambda v: is_set(v) and str(v).upper() not in DRAFTS,
        "it has not been tested",
        "use one of these",
    ),
    Refusal(
        "speculative_draft_model_quantization",
        "--speculative-draft-model-quantization mixquant",
        lambda v: v == machine.NAME,
        "a draft is small, and each token that it gets wrong costs more than its prefill saves",
        "leave it out: the draft runs in BF16",
    ),
    Refusal("enable_multi_layer_eagle", "--enable-multi-layer-eagle", is_set, _SEVERAL_DRAFTS, "do not speculate"),
    Refusal("decoupled_spec_role", "--decoupled-spec-role", is_set, "a draft server has not been tested", _LEAVE_OUT),
    Refusal(
        "dllm_algorithm",
        "--dllm-algorithm",
        is_set,
        "diffusion language models have no prefill to speak of",
        "serve them without the plugin",
    ),
    Refusal(
        "enable_pd_role_switch",
        "--enable-pd-role-switch",
        is_set,
        "a decode server has no packed copies to prefill with",
        "start a server for each role",
    ),
    Refusal("encoder_only", "--encoder-only", is_set, "an encoder has no prefill", "serve it without the plugin"),
    *DETERMINISTIC,
    # where KV is kept
    Refusal(
        "hicache_storage_backend",
        "--hicache-storage-backend",
        _unnamed,
        storage.UNNAMED_PAGES,
        "leave it out: --enable-hierarchical-cache keeps KV in this process",
    ),
    Refusal(
        "disaggregation_decode_enable_offload_kvcache",
        "--disaggregation-decode-enable-offload-kvcache",
        _unnamed,
        storage.UNNAMED_PAGES,
        _LEAVE_OUT,
    ),
    Refusal(
        "enable_lmcache",
        "--enable-lmcache",
        is_set,
        "how LMCache names pages has not been seen to tell KV of one recipe from that of another",
        "use --enable-hierarchical-cache",
    ),
    Refusal(
        "enable_flexkv",
        "--enable-flexkv",
        is_set,
        "FlexKV names pages by their tokens alone, so KV of other recipes would be read",
        "use --enable-hierarchical-cache",
    ),
    Refusal(
        "radix_cache_backend",
        "--radix-cache-backend",
        is_set,
        "whether it tells KV of one recipe from that of another is not known",
        _LEAVE_OUT,
    ),
    Refusal(
        "disable_radix_cache",
        "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",
        lambda v: not v and dialect().tree_ignores_keys(),
        "that tree looks at tokens alone, so a request's BF16 prefill would reuse low-precision KV",
        "unset it",
    ),
    # what replaces the forward pass
    Refusal("enable_nvidia_megakernel", "--enable-nvidia-megakernel", is_set, _FORWARD, _LEAVE_OUT),
    Refusal("enable_amd_monokernel", "--enable-amd-monokernel", is_set, _FORWARD, _LEAVE_OUT),
    Refusal(
        "cuda_graph_backend_prefill",
        "--cuda-graph-backend-prefill full or tc_piecewise",
        _whole_graph,
        _GRAPHS,
        _BREAKABLE,
    ),
    Refusal(
        "cuda_graph_config.prefill.backend",
        "a prefill CUDA graph backend full or tc_piecewise (--cuda-graph-config, or the model's default)",
        _whole_graph,
        _GRAPHS,
        "pass --cuda-graph-backend-prefill breakable or --disable-prefill-cuda-graph",
        ("cuda",),
    ),
    # weights
    Refusal("cpu_offload_gb", "--cpu-offload-gb", is_set, "packed weights would stay on the GPU", _LEAVE_OUT),
    Refusal(
        "offload_group_size",
        "--offload-group-size",
        lambda v: v is not None and v > 0,
        "it has not been tested",
        _LEAVE_OUT,
    ),
    Refusal(
        "torchao_config",
        "--torchao-config",
        is_set,
        "it quantises the BF16 weights that decode runs and the packed ones come from",
        "serve torchao without the plugin",
    ),
    Refusal("modelopt_quant", "--modelopt-quant", is_set, "it quantises the model at load", _CHECKPOINT),
    Refusal("quantize_and_serve", "--quantize-and-serve", is_set, "it quantises the model at load", _CHECKPOINT),
    Refusal("rl_quant_profile", "--rl-quant-profile", is_set, "it quantises the model at load", _CHECKPOINT),
    Refusal(
        "load_format",
        "--load-format other than " + ", ".join(LOAD_FORMATS),
        lambda v: v not in LOAD_FORMATS,
        "it quantises, or weights arrive after process_weights_after_loading, where the packed ones are made",
        "load from files in one of these",
    ),
    Refusal(
        "weight_cache_mode",
        "--weight-cache-mode",
        is_set,
        "its weights arrive past process_weights_after_loading, where the packed ones are made",
        "load from files",
    ),
    Refusal(
        "enable_eplb",
        "--enable-eplb",
        is_set,
        "it moves experts between ranks while serving, which has not been tested",
        _LEAVE_OUT,
    ),
    Refusal(
        "elastic_ep_backend",
        "--elastic-ep-backend",
        is_set,
        "ranks that join later have not been tested",
        _LEAVE_OUT,
    ),
    Refusal(
        "kt_weight_path",
        "--kt-weight-path",
        is_set,
        "KTransformers wraps quantization methods, which has not been tested with ours",
        _LEAVE_OUT,
    ),
    Refusal(
        "model_impl",
        "--model-impl transformers or mindspore",
        lambda v: v in ("transformers", "mindspore"),
        "layer names and rows of models that are not SGLang's own have not been tested",
        "use 'auto' or 'sglang'",
    ),
)
