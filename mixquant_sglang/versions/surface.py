"""The attributes that we read or write on SGLang's objects: of which class, and where we use them.

Data alone.  What we import, hook or name as a string is found by reading our files (``lookup.py``); of an object that
SGLang hands us no file says the class, so it stands here.  ``tests/sglang/test_drift.py`` looks every row up in
SGLang's source, and fails for an attribute that we use and that has no row.
"""

from __future__ import annotations

from mixquant_sglang.versions.surface_models import BLOCKS, NEW, OLD, Row

_MODEL_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_FLASH = "sglang.srt.layers.attention.flashattention_backend"
_FORWARD = "sglang.srt.model_executor.forward_batch_info"
_SPECULATION = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm"
_COMPONENTS = "sglang.srt.model_executor.model_runner_components"
_QUANTIZATION = "sglang.srt.layers.quantization"
_PAIRS, _BOOT = "sglang.srt.disaggregation.common.conn", "host/hooks/pairs.py"
_DISTRIBUTED, _RUNTIME = "sglang.srt.distributed", "sglang.srt.runtime_context"
_ARGS = "sglang.srt.server_args.ServerArgs"

SURFACE: tuple[Row, ...] = (
    # -- server arguments ----------------------------------------------------------------------------------------------
    Row(
        _ARGS,
        ("quantization", "dtype", "moe_runner_backend", "disable_prefill_cuda_graph"),
        "host/hooks/launcher.py",
    ),
    Row(_ARGS, ("enable_lora", "lora_paths", "lora_target_modules"), "versions/lora.py"),
    Row("sglang.srt.lora.layers.BaseLayerWithLoRA", ("base_layer",), "versions/lora.py"),
    Row("sglang.srt.arg_groups.overrides", ("_declarations_materialized",), "versions/v0_5_17.py", OLD),
    Row(_ARGS, ("_resolution_finished",), "versions/v0_5_23.py", NEW),
    Row(_ARGS, ("cuda_graph_config",), "versions/v0_5_17.py"),
    Row(_ARGS, ("chunked_prefill_size", "max_prefill_tokens"), "versions/batches.py"),
    Row(_ARGS, ("prefill_attention_backend", "attention_backend", "kv_cache_dtype"), "versions/attention.py"),
    Row(_ARGS, ("max_total_tokens", "page_size"), "host/gathering.py"),
    Row(_ARGS, ("enable_memory_saver", "enable_dp_attention", "enable_lora", "lora_paths"), "host/compact.py"),
    Row(_ARGS, ("load_format", "is_embedding"), "versions/loading.py"),
    Row(_ARGS, ("disable_flashinfer_autotune", "enable_deterministic_inference"), "versions/fp4.py"),
    Row(
        _ARGS,
        (
            *("forward_hooks", "debug_tensor_dump_output_folder", "msprobe_dump_config"),
            *("enable_return_routed_experts", "expert_distribution_recorder_mode"),
        ),
        "host/refusals.py",
    ),
    Row(
        _ARGS,
        (
            *("tokenizer_worker_num", "port", "grpc_port", "grpc_mode", "smg_grpc_mode", "device"),
            *("enable_dp_attention", "enable_dp_attention_local_control_broadcast", "pp_size"),
            *("attn_cp_size", "enable_prefill_cp", "dcp_size"),
            *("enable_attn_tp_input_scattered", "moe_dense_tp_size", "moe_dp_size", "moe_a2a_backend", "dwdp_size"),
            *("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_pdmux"),
            *("speculative_algorithm", "speculative_draft_model_quantization", "enable_multi_layer_eagle"),
            *("decoupled_spec_role", "dllm_algorithm", "disaggregation_mode", "encoder_only"),
            *("hicache_storage_backend", "disaggregation_decode_enable_offload_kvcache", "enable_lmcache"),
            *("enable_flexkv", "radix_cache_backend", "disable_radix_cache", "cuda_graph_backend_prefill"),
            *("cpu_offload_gb", "offload_group_size", "modelopt_quant"),
            *("quantize_and_serve", "rl_quant_profile", "load_format", "weight_cache_mode", "enable_eplb"),
            *("elastic_ep_backend", "kt_weight_path", "model_impl", "disaggregation_decode_enable_radix_cache"),
        ),
        "host/refusals.py",
    ),
    Row(
        _ARGS,
        ("enable_prefill_context_parallel", "enable_dsa_prefill_context_parallel", "torchao_config"),
        "host/refusals.py",
        OLD,
    ),
    Row(
        _ARGS,
        (
            *("attn_dp_size", "enable_cp_tp_group_sharing", "enable_layernorm_sp"),
            *("enable_decoder_swa_bounded_replay", "enable_encoder_swa_bounded_replay"),
            *("enable_return_aux_hidden_states", "enable_nvidia_megakernel", "enable_amd_monokernel"),
            *("enable_paged_experts", "enable_pd_role_switch"),
        ),
        "host/refusals.py",
        NEW,
    ),
    Row("sglang.srt.environ.Envs", ("SGLANG_RUST_SERVER",), "versions/environment.py"),
    Row(_ARGS, ("tokenizer_worker_num", "use_ray"), "host/hooks/arrival.py"),
    Row("sglang.srt.environ.Envs", ("SGLANG_HTTP_SERVER_APP_PATH",), "versions/environment.py", NEW),
    Row("sglang.srt.environ.Envs", ("SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED",), "versions/environment.py", NEW),
    Row("sglang.srt.environ.Envs", ("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",), "versions/v0_5_17.py", OLD),
    Row("sglang.srt.mem_cache.utils", ("storage_namespace_seed",), "versions/v0_5_23.py", NEW),
    Row("sglang.srt.debug_utils.dumper._Dumper", ("may_enable",), "versions/environment.py"),
    Row("sglang.srt.model_executor.cuda_graph_config.CudaGraphConfig", ("prefill",), "versions/v0_5_17.py"),
    Row("sglang.srt.model_executor.cuda_graph_config.PhaseConfig", ("backend", "bs"), "versions/graphs.py"),
    # -- the model's config --------------------------------------------------------------------------------------------
    Row(
        "sglang.srt.configs.model_config.ModelConfig",
        (
            *("quantization", "hf_config", "hf_text_config", "dtype", "model_path", "revision"),
            *("is_encoder_decoder", "context_len", "vocab_size"),
        ),
        "host/hooks/launcher.py, host/stock.py, host/probe.py",
    ),
    # -- requests and batches ------------------------------------------------------------------------------------------
    Row(
        "sglang.srt.managers.schedule_batch.Req",
        (
            *("origin_input_ids", "sampling_params", "extra_key", "set_finish_with_abort", "to_finish"),
            *("full_untruncated_fill_ids", "logprob_start_len"),
        ),
        "versions/requests.py, versions/batches.py, host/hooks/requests.py",
    ),
    Row("sglang.srt.managers.schedule_batch.Req", ("set_extend_range",), "versions/v0_5_17.py", OLD),
    Row("sglang.srt.managers.schedule_batch.Req", ("extend_end",), "versions/v0_5_23.py", NEW),
    Row(
        "sglang.srt.managers.schedule_batch.ScheduleBatch",
        (
            *("reqs", "decoding_reqs", "prefill_stats", "input_ids", "prefill_input_ids_cpu", "device"),
            *("prepare_for_extend", "prepare_for_decode", "init_new"),
        ),
        "versions/requests.py, versions/batches.py, host/hooks/forward.py",
    ),
    Row("sglang.srt.sampling.sampling_params.SamplingParams", ("custom_params", "n"), "host/hooks/requests.py"),
    Row("sglang.srt.session.session_controller.Session", ("streaming", "req_nodes"), "host/hooks/requests.py"),
    Row("sglang.srt.session.session_controller.SessionReqNode", ("req",), "host/hooks/requests.py"),
    Row(
        f"{_FORWARD}.ForwardBatch",
        (
            *("forward_mode", "input_ids", "split_index", "extend_seq_lens_cpu", "extend_prefix_lens_cpu"),
            *("extend_logprob_start_lens_cpu", "return_logprob", "capture_hidden_mode", "is_prefill_only"),
            *("return_pooled_hidden_states", "multi_item_delimiter_indices", "_attn_output", "init_new"),
            *("seq_lens_cpu", "req_pool_indices"),
        ),
        "host/hooks/forward.py, versions/requests.py, layers/fused.py",
    ),
    Row(f"{_FORWARD}.CaptureHiddenMode", ("is_full",), "versions/requests.py"),
    Row(_SPECULATION, ("NONE", "NGRAM", "STANDALONE"), "versions/speculation.py"),
    Row(f"{_FORWARD}.ForwardMode", ("EXTEND", "MIXED", "SPLIT_PREFILL", "DECODE", "IDLE"), "passes/running.py"),
    Row(f"{_PAIRS}.CommonKVManager", ("dist_init_addr", "bootstrap_host", "bootstrap_port", "server_args"), _BOOT),
    Row(f"{_PAIRS}.CommonKVManager", ("attn_tp_rank", "attn_cp_rank", "attn_dp_rank", "system_dp_rank"), _BOOT),
    Row(f"{_PAIRS}.CommonKVManager", ("pp_rank", "prefill_info_table", "record_failure"), _BOOT),
    Row(f"{_PAIRS}.CommonKVReceiver", ("bootstrap_addr", "bootstrap_room", "kv_mgr", "abort"), _BOOT),
    Row(f"{_PAIRS}.CommonKVBootstrapServer", ("app",), _BOOT),
    # -- the model runner ----------------------------------------------------------------------------------------------
    Row(
        _MODEL_RUNNER,
        (
            *("server_args", "model_config", "model", "device", "is_generation", "forward", "attn_backend"),
            *("req_to_token_pool", "token_to_kv_pool_allocator", "eager_runner", "is_draft_worker", "spec_algorithm"),
            *("prefill_cuda_graph_runner", "decode_cuda_graph_runner"),
        ),
        "host/lifecycle.py, host/probe.py, versions/batches.py",
    ),
    Row(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner",
        ("_pad_to_bucket", "capture_num_tokens", "max_num_tokens", "model_runner", "prefill_backend_name"),
        "host/hooks/graphs.py, versions/graphs.py",
    ),
    Row(
        "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator",
        ("available_size", "clear", "page_size"),
        "versions/batches.py",
    ),
    Row("sglang.srt.mem_cache.memory_pool.ReqToTokenPool", ("available_size", "clear"), "versions/batches.py"),
    Row(
        "sglang.srt.distributed.parallel_state.GroupCoordinator",
        (
            *("cpu_group", "world_size", "rank_in_group", "is_first_rank", "is_last_rank"),
            *("recv_tensor_dict", "send_tensor_dict"),
        ),
        "versions/groups.py, versions/v0_5_23.py",
    ),
    Row("sglang.srt.distributed.parallel_state", ("_WORLD", "_PP"), "versions/groups.py"),
    Row("sglang.srt.model_executor.model_runner.ModelRunnerOutput", ("logits_output",), "versions/groups.py"),
    Row(f"{_FORWARD}.PPProxyTensors", ("tensors",), "versions/groups.py"),
    Row(
        "sglang.srt.model_executor.pool_configurator.MemoryPoolConfig",
        ("max_total_num_tokens", "__post_init__"),
        "host/hooks/memory.py",
    ),
    # -- weights -------------------------------------------------------------------------------------------------------
    Row(
        f"{_COMPONENTS}.weight_updater.WeightUpdater",
        ("device", "model_config", "custom_weight_loaders", "get_model", "get_model_runner"),
        "host/hooks/weights.py, versions/updates.py",
    ),
    Row("sglang.srt.model_loader.loader.DefaultModelLoader.Source", ("model_or_path",), "host/hooks/weights.py"),
    Row("sglang.srt.managers.io_struct.ReleaseMemoryOccupationReqInput", ("tags",), "versions/updates.py"),
    Row("sglang.srt.managers.io_struct.ResumeMemoryOccupationReqInput", ("tags",), "versions/updates.py"),
    Row("sglang.srt.managers.io_struct.AttachHiCacheStorageReqOutput", ("success", "message"), "versions/storage.py"),
    Row(
        f"{_QUANTIZATION}.base_config.QuantizeMethodBase",
        ("process_weights_after_loading", "apply", "create_weights"),
        "versions/updates.py, host/probe.py, layers/linear.py",
    ),
    Row(f"{_QUANTIZATION}.unquant.UnquantizedLinearMethod", ("apply_into",), "layers/linear.py"),
    Row(
        f"{_QUANTIZATION}.unquant.UnquantizedLinearMethod",
        ("apply_with_addend",),
        "layers/linear.py",
        NEW,
    ),
    Row(
        f"{_QUANTIZATION}.modelopt_quant.ModelOptFp4LinearMethod",
        ("create_weights", "process_weights_after_loading", "apply"),
        "kernels/linear/native_nvfp4.py",
    ),
    Row(f"{_QUANTIZATION}.modelopt_quant.ModelOptFp4LinearMethod", ("quant_mode",), "versions/fp4.py", NEW),
    Row(_QUANTIZATION, ("CPU_QUANTIZATION_METHODS",), "host/config.py"),
    Row(f"{_QUANTIZATION}.base_config.QuantizationConfig", ("packed_modules_mapping",), "host/config.py"),
    Row("sglang.srt.models.deepseek_v2.DeepseekV2ForCausalLM", ("post_load_weights",), "versions/updates.py"),
    # -- layers --------------------------------------------------------------------------------------------------------
    Row("sglang.srt.layers.linear.LinearBase", ("quant_method", "output_size"), "layers/fused.py, host/report.py"),
    Row("sglang.srt.layers.linear.ColumnParallelLinear", ("tp_rank", "tp_size"), "versions/v0_5_17.py", OLD),
    Row("sglang.srt.layers.linear.RowParallelLinear", ("tp_rank", "tp_size"), "versions/v0_5_17.py", OLD),
    Row("sglang.srt.layers.linear.LinearBase", ("tp_group",), "versions/v0_5_23.py", NEW),
    Row("sglang.srt.layers.linear.MergedColumnParallelLinear", ("output_sizes",), "weights/incoming.py"),
    Row("sglang.srt.layers.linear.QKVParallelLinear", ("num_kv_head_replicas",), "layers/linear.py"),
    Row(
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE",
        (
            *("quant_method", "use_triton_kernels", "use_flashinfer_trtllm_moe", "use_deep_gemm", "moe_runner_config"),
            *("num_experts", "num_fused_shared_experts", "moe_ep_rank", "moe_tp_rank", "moe_tp_size"),
        ),
        "host/config.py, layers/experts.py",
    ),
    Row(
        f"{_QUANTIZATION}.unquant.UnquantizedFusedMoEMethod",
        ("create_weights", "create_moe_runner", "get_triton_quant_info", "use_flashinfer_cutlass", "runner"),
        "layers/experts.py",
    ),
    Row(
        "sglang.srt.layers.moe.moe_runner.base.MoeRunnerConfig",
        (
            *("activation", "apply_router_weight_on_input", "gate_up_interleaved", "gemm1_alpha", "gemm1_clamp_limit"),
            *("inplace", "is_gated", "no_combine", "num_experts", "routed_scaling_factor", "swiglu_limit", "top_k"),
        ),
        "layers/experts.py",
    ),
    Row(
        "sglang.srt.layers.moe.token_dispatcher.standard.StandardDispatchOutput",
        ("hidden_states", "topk_output"),
        "layers/experts.py, host/probe.py",
    ),
    Row(
        "sglang.srt.layers.moe.topk.StandardTopKOutput",
        ("topk_weights", "topk_ids"),
        "layers/experts.py",
    ),
    Row(
        "sglang.srt.layers.layernorm.RMSNorm",
        (
            *("weight", "variance_epsilon", "has_weight", "cast_x_before_out_mul", "fp32_residual"),
            *("override_orig_dtype", "variance_size_override", "_forward_method", "forward_cuda", "forward_native"),
        ),
        "layers/fused.py",
    ),
    Row(
        "sglang.srt.layers.activation.SiluAndMul",
        ("_forward_method", "forward_cuda", "forward_native"),
        "layers/fused.py",
    ),
    *(
        Row(
            f"sglang.srt.layers.layernorm.{norm}", ("_forward_method", "forward_cuda", "weight", eps), "layers/fused.py"
        )
        for norm, eps in (("GemmaRMSNorm", "variance_epsilon"), ("Gemma3RMSNorm", "eps"))
    ),
    Row(
        "sglang.srt.layers.activation.GeluAndMul",
        ("_forward_method", "forward_cuda", "forward_native", "approximate"),
        "layers/fused.py",
    ),
    Row("sglang.srt.layers.layernorm.RMSNorm", ("_resolve_forward_method",), "versions/v0_5_23.py", NEW),
    Row(
        f"{_FLASH}.FlashAttentionBackend",
        (
            *("fa_impl_ver", "forward_metadata", "forward_extend", "use_mla", "is_encoder_decoder", "has_swa"),
            *("is_prefill_aware_swa", "use_sliding_window_kv_pool", "has_local_attention", "fa_skip_kv_cache"),
            *("kv_cache_is_mxfp8", "kv_cache_dtype_str"),
        ),
        "versions/attention.py, layers/fused.py, layers/gathered_attention.py",
    ),
    Row(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend.HybridLinearAttnBackend",
        ("full_attn_backend",),
        "layers/gathered_attention.py",
    ),
    Row(
        "sglang.srt.layers.attention.hybrid_attn_backend.HybridAttnBackend",
        ("prefill_backend",),
        "layers/gathered_attention.py",
    ),
    Row(f"{_FLASH}.FlashAttentionBackend", ("local_attn_builder", "_kv_shard_pool"), "versions/attention.py", NEW),
    Row(
        f"{_FLASH}.FlashAttentionMetadata",
        ("cu_seqlens_q", "max_seq_len_q", "local_attn_metadata", "swa_spec_metadata", "scheduler_metadata"),
        "versions/attention.py",
    ),
    Row(f"{_FLASH}.FlashAttentionMetadata", ("image_token_ranges",), "versions/attention.py", NEW),
    Row(
        "sglang.srt.layers.radix_attention.RadixAttention",
        (
            *("is_cross_attention", "use_irope", "sliding_window_size", "attn_type"),
            *("layer_id", "tp_q_head_num", "tp_k_head_num", "head_dim", "v_head_dim", "logit_cap"),
            *("qk_head_dim", "scaling"),
        ),
        "versions/attention.py, layers/gathered_attention.py, layers/low_attention.py",
    ),
    Row(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
        ("forward_extend", "req_to_token_pool", "token_to_kv_pool", "use_sliding_window_kv_pool"),
        "versions/attention.py, layers/low_attention.py",
    ),
    Row("sglang.srt.mem_cache.memory_pool.ReqToTokenPool", ("req_to_token",), "versions/attention.py"),
    Row(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
        ("get_key_buffer", "get_value_buffer"),
        "versions/attention.py",
    ),
    Row("sglang.srt.layers.radix_attention.AttentionType", ("DECODER",), "versions/attention.py"),
    *BLOCKS,
    # -- what users see ------------------------------------------------------------------------------------------------
    Row("sglang.srt.managers.scheduler.Scheduler", ("ps",), "versions/v0_5_17.py", OLD),
    Row(f"{_DISTRIBUTED}.parallel_state_wrapper.ParallelState", ("dp_rank",), "versions/v0_5_17.py", OLD),
    Row(f"{_RUNTIME}.SpawnRanks", ("dp_rank",), "versions/v0_5_23.py", NEW),
    Row("sglang.srt.managers.io_struct.GetInternalStateReqOutput", ("internal_state",), "host/hooks/observe.py"),
    Row(
        "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter",
        ("_graph_backend_label",),
        "host/hooks/observe.py",
    ),
    Row(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollectorContext",
        ("collector", "current_scheduler_metrics_enabled"),
        "host/hooks/observe.py",
    ),
    Row("sglang.srt.observability.metrics_collector.SchedulerMetricsCollector", ("labels",), "host/hooks/observe.py"),
)
