"""The families of models that we know block by block, one row each; ``blocks.py`` asks them."""

from __future__ import annotations

from dataclasses import dataclass, replace

_QKV = ("input_layernorm", "self_attn.qkv_proj")
_GATE_UP = ("post_attention_layernorm", "mlp.gate_up_proj")


@dataclass(frozen=True)
class Family:
    """Full class names in SGLang, each of which allows something; None allows nothing.  ``why``: what was read that
    makes them safe, and what was seen to be harmless.

    ``decoder``: the result of each of its ``norms`` goes to the linear named beside it alone (to one of an MLP only
    where that is an ``mlp``), so it may be handed over quantised.  What follows its attention treats each row by
    itself.
    ``mlp``: the result of act_fn goes to down_proj alone.
    ``attention``: takes the result of qkv_proj apart with ``split`` and does nothing else with it, so q may be a matrix
    of its own; its result goes to o_proj alone, row by row.
    ``model``: logits come from ``logits_processor(norm(last layer))`` and nothing else, so of the last layer's rows
    those that nobody samples from may be left out.

    ``rope``: what its attention does between that split and its attention layer, and nothing else: "rope" (rotary
    embedding of q and k), "norm_rope" (q_norm and k_norm of each head before it), both with nothing but o_proj behind,
    or "norm_rope_write" (``apply_qk_norm_rope``, which writes the cache too where SGLang's RoPE can).

    ``backbone``: where the model has ``layers`` and ``norm``.  ``blocks``: where a decoder layer has its MLP and
    experts.  ``by_rows``: such classes of theirs as give, for rows that are picked out, what they give for them among
    all; they run on the rows that are read.  The last layer of a family without them is as Llama's: its second norm
    takes the residual, and ``mlp`` and the last norm follow.
    """

    name: str
    why: str
    decoder: str | None = None
    mlp: str | None = None
    attention: str | None = None
    model: str | None = None
    rope: str | None = None
    norms: tuple[tuple[str, str], ...] = (_QKV, _GATE_UP)
    backbone: str = "model"
    blocks: tuple[str, ...] = ("mlp",)
    by_rows: tuple[str, ...] = ()


_LLAMA = Family(
    "Llama",
    "On CUDA and the CPU the attention's forward_prepare_native splits qkv and applies RoPE to q and k; the NPU's "
    "path, which reads qkv whole, is not ours.  Both norms' results go to self_attn and mlp, which begin with qkv_proj "
    "and gate_up_proj.",
    decoder="sglang.srt.models.llama.LlamaDecoderLayer",
    mlp="sglang.srt.models.llama.LlamaMLP",
    attention="sglang.srt.models.llama.LlamaAttention",
    rope="rope",
    model="sglang.srt.models.llama.LlamaForCausalLM",
)

FAMILIES = (
    _LLAMA,
    replace(
        _LLAMA,
        name="Mistral",
        why="The class of the model is Llama's under another name (``pass``), and all blocks are Llama's.",
        model="sglang.srt.models.mistral.MistralForCausalLM",
    ),
    replace(
        _LLAMA,
        name="Phi-3",
        why="As Mistral; its checkpoints have qkv_proj and gate_up_proj fused already.",
        model="sglang.srt.models.llama.Phi3ForCausalLM",
    ),
    replace(
        _LLAMA,
        name="InternLM3",
        why="As Mistral: ``pass`` under LlamaForCausalLM.",
        model="sglang.srt.models.llama.InternLM3ForCausalLM",
    ),
    Family(
        "Qwen2",
        "As Llama; qkv_proj has a bias, which our products take.",
        decoder="sglang.srt.models.qwen2.Qwen2DecoderLayer",
        mlp="sglang.srt.models.qwen2.Qwen2MLP",
        attention="sglang.srt.models.qwen2.Qwen2Attention",
        rope="rope",
        model="sglang.srt.models.qwen2.Qwen2ForCausalLM",
    ),
    Family(
        "Qwen3",
        "As Llama, with q_norm and k_norm behind the split, of each head by itself; the NPU's path and aiter's fused "
        "one (ROCm), which read qkv whole, are not ours.",
        decoder="sglang.srt.models.qwen3.Qwen3DecoderLayer",
        mlp="sglang.srt.models.qwen2.Qwen2MLP",  # which Qwen3 takes from Qwen2
        attention="sglang.srt.models.qwen3.Qwen3Attention",
        rope="norm_rope",
        model="sglang.srt.models.qwen3.Qwen3ForCausalLM",
    ),
    Family(
        "Granite",
        "As Llama, with factors behind attention and MLP that are the same for all rows (0.5.23: attention sinks, "
        "which the attention of few queries leaves to SGLang).",
        decoder="sglang.srt.models.granite.GraniteDecoderLayer",
        mlp="sglang.srt.models.granite.GraniteMLP",
        attention="sglang.srt.models.granite.GraniteAttention",
        model="sglang.srt.models.granite.GraniteForCausalLM",
    ),
    Family(
        "Cohere",
        "One LayerNorm feeds attention and MLP, so it is not fused, and neither that nor the last one is an operator "
        "whose forward can be replaced, so all rows are computed.  The attention splits qkv; what follows is of each "
        "head by itself.",
        mlp="sglang.srt.models.commandr.CohereMLP",
        attention="sglang.srt.models.commandr.CohereAttention",
    ),
    Family(
        "OLMo-2 and OLMo-3",
        "The norms come behind attention and MLP and their results are added, so none is fused.  The attention splits "
        "qkv; q_norm and k_norm are of a token's whole q and k.",
        decoder="sglang.srt.models.olmo2.Olmo2DecoderLayer",
        mlp="sglang.srt.models.olmo2.Olmo2MLP",
        attention="sglang.srt.models.olmo2.Olmo2Attention",
        model="sglang.srt.models.olmo2.Olmo2ForCausalLM",
        norms=(),
        by_rows=("sglang.srt.models.olmo2.Olmo2MLP",),
    ),
    Family(
        "GLM-4",
        "As Llama between the norms that are fused; two more follow attention and MLP, whose results are added, each "
        "row by itself.  0.5.23 calls all of them from the stages around attention and MLP, as modules.",
        decoder="sglang.srt.models.glm4.Glm4DecoderLayer",
        mlp="sglang.srt.models.glm4.Glm4MLP",
        attention="sglang.srt.models.glm4.Glm4Attention",
        model="sglang.srt.models.glm4.Glm4ForCausalLM",
        by_rows=("sglang.srt.models.glm4.Glm4MLP",),
    ),
    Family(
        "Qwen3-MoE",
        "LayerCommunicator (0.5.17) and the stage's boundary (0.5.23) call input_layernorm as a module and hand its "
        "result to self_attn alone; what could gather or scatter it (context parallelism, all-to-all of experts) is "
        "refused, and with DP attention nothing is fused.  The second norm's result goes to gate and experts, so it "
        "stays BF16.  Where --enable-fused-qk-norm-rope reads qkv whole, q is not apart.  The MoE block picks "
        "experts for each row.",
        decoder="sglang.srt.models.qwen3_moe.Qwen3MoeDecoderLayer",
        mlp="sglang.srt.models.qwen2_moe.Qwen2MoeMLP",  # of dense layers; Qwen3MoeMLP is another name for it
        attention="sglang.srt.models.qwen3_moe.Qwen3MoeAttention",
        rope="norm_rope_write",
        model="sglang.srt.models.qwen3_moe.Qwen3MoeForCausalLM",
        by_rows=("sglang.srt.models.qwen3_moe.Qwen3MoeSparseMoeBlock", "sglang.srt.models.qwen2_moe.Qwen2MoeMLP"),
    ),
    Family(
        "Qwen2-MoE",
        "As Qwen3-MoE; the shared expert is a Qwen2MoeMLP, whose act_fn is fused, and its input goes to the gates too.",
        decoder="sglang.srt.models.qwen2_moe.Qwen2MoeDecoderLayer",
        mlp="sglang.srt.models.qwen2_moe.Qwen2MoeMLP",
        attention="sglang.srt.models.qwen2_moe.Qwen2MoeAttention",
        model="sglang.srt.models.qwen2_moe.Qwen2MoeForCausalLM",
        by_rows=("sglang.srt.models.qwen2_moe.Qwen2MoeSparseMoeBlock", "sglang.srt.models.qwen2_moe.Qwen2MoeMLP"),
    ),
    Family(
        "Mixtral",
        "As Llama up to the second norm, whose result goes to gate and experts.",
        decoder="sglang.srt.models.mixtral.MixtralDecoderLayer",
        attention="sglang.srt.models.mixtral.MixtralAttention",
        model="sglang.srt.models.mixtral.MixtralForCausalLM",
        norms=(_QKV,),
        blocks=("block_sparse_moe",),
        by_rows=("sglang.srt.models.mixtral.MixtralMoE",),
    ),
    Family(
        "GLM-4.5",
        "As Qwen3-MoE; the first layers are dense, and there the second norm's result goes to gate_up_proj alone. "
        "quant_format is empty but on ROCm.  Experts are picked by groups within a row.",
        decoder="sglang.srt.models.glm4_moe.Glm4MoeDecoderLayer",
        mlp="sglang.srt.models.glm4_moe.Glm4MoeMLP",
        attention="sglang.srt.models.glm4_moe.Glm4MoeAttention",
        model="sglang.srt.models.glm4_moe.Glm4MoeForCausalLM",
        by_rows=("sglang.srt.models.glm4_moe.Glm4MoeSparseMoeBlock", "sglang.srt.models.glm4_moe.Glm4MoeMLP"),
    ),
    Family(
        "Gemma-3",
        "Zero-centred norms and GELU.  input_layernorm and pre_feedforward_layernorm take the residual and feed "
        "qkv_proj and gate_up_proj; the two that follow attention and MLP are of each row.  q and k are transposed "
        "behind the split, so nothing is gained by a q of its own.  The soft cap of logits comes behind lm_head.",
        decoder="sglang.srt.models.gemma3_causal.Gemma3DecoderLayer",
        mlp="sglang.srt.models.gemma3_causal.Gemma3MLP",
        model="sglang.srt.models.gemma3_causal.Gemma3ForCausalLM",
        norms=(_QKV, ("pre_feedforward_layernorm", "mlp.gate_up_proj")),
        by_rows=("sglang.srt.models.gemma3_causal.Gemma3MLP",),
    ),
    Family(
        "Gemma-3 with images",
        "Gemma-3 as language_model, which computes the logits.  That image rows attend to each other is attention's.",
        model="sglang.srt.models.gemma3_mm.Gemma3ForConditionalGeneration",
        backbone="language_model.model",
        by_rows=("sglang.srt.models.gemma3_causal.Gemma3MLP",),
    ),
    Family(
        "Gemma-4",
        "As Gemma-3, with plain RMSNorms.  Experts run beside the MLP: router and pre_feedforward_layernorm_2 read the "
        "residual, so the result of pre_feedforward_layernorm goes to the MLP alone.  SGLang's fused kernels read the "
        "weights of the norms that follow, of which none is fused.  Norms, sums, per-layer inputs and the layer's "
        "scale are of each row, and so are the experts, which are picked from logits that are given.",
        decoder="sglang.srt.models.gemma4_causal.Gemma4DecoderLayer",
        mlp="sglang.srt.models.gemma3_causal.Gemma3MLP",
        model="sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration",
        norms=(_QKV, ("pre_feedforward_layernorm", "mlp.gate_up_proj")),
        backbone="language_model",
        blocks=("mlp", "moe"),
        by_rows=("sglang.srt.models.gemma3_causal.Gemma3MLP", "sglang.srt.models.gemma4_causal.Gemma4MoE"),
    ),
    Family(
        "Qwen3.5",
        "Zero-centred norms (GemmaRMSNorm).  Of full-attention layers, which hold qkv_proj and o_proj themselves: the "
        "first norm feeds qkv_proj alone.  Its first columns are q and the output's gate, head by head, which a kernel "
        "takes apart, so q is not apart.  The gate is of each row.  An MLP that SGLang lets finish elsewhere (0.5.23, "
        "defer_finalize) is of several ranks and no call of ours.",
        decoder="sglang.srt.models.qwen3_5.Qwen3_5AttentionDecoderLayer",
        mlp="sglang.srt.models.qwen2_moe.Qwen2MoeMLP",
        model="sglang.srt.models.qwen3_5.Qwen3_5ForConditionalGeneration",
        norms=(("input_layernorm", "qkv_proj"), _GATE_UP),
        by_rows=("sglang.srt.models.qwen2_moe.Qwen2MoeMLP",),
    ),
    Family(
        "Qwen3.5's layers of linear attention",
        "The first norm feeds in_proj_qkvz and in_proj_ba, of which the second stays BF16; the second norm as above.",
        decoder="sglang.srt.models.qwen3_5.Qwen3_5LinearDecoderLayer",
        norms=(_GATE_UP,),
    ),
    Family(
        "Qwen3.5-MoE",
        "As Qwen3.5, with Qwen2-MoE's experts.",
        model="sglang.srt.models.qwen3_5.Qwen3_5MoeForConditionalGeneration",
        by_rows=("sglang.srt.models.qwen2_moe.Qwen2MoeSparseMoeBlock",),
    ),
    Family(
        "Qwen3-Next",
        "As Qwen3.5-MoE, in other classes; the prologue that reads qkv whole is for gfx950.",
        decoder="sglang.srt.models.qwen3_next.Qwen3HybridAttentionDecoderLayer",
        mlp="sglang.srt.models.qwen2_moe.Qwen2MoeMLP",
        model="sglang.srt.models.qwen3_next.Qwen3NextForCausalLM",
        norms=(("input_layernorm", "qkv_proj"), _GATE_UP),
        by_rows=(
            "sglang.srt.models.qwen2_moe.Qwen2MoeSparseMoeBlock",
            "sglang.srt.models.qwen2_moe.Qwen2MoeMLP",
        ),
    ),
    Family(
        "Qwen3-Next's layers of linear attention",
        "As Qwen3.5's layers of linear attention.",
        decoder="sglang.srt.models.qwen3_next.Qwen3HybridLinearDecoderLayer",
        norms=(_GATE_UP,),
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2's blocks behind the embedding of images; logits as there.",
        model="sglang.srt.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",
    ),
    Family(
        "Qwen3-VL",
        "Qwen3's blocks.  What images add to the first layers' results is added to each row, also behind a last layer, "
        "or by a norm, which then computes all rows in BF16.",
        model="sglang.srt.models.qwen3_vl.Qwen3VLForConditionalGeneration",
    ),
    Family(
        "Qwen3-VL-MoE",
        "Qwen3-MoE's blocks, the rest as Qwen3-VL.",
        model="sglang.srt.models.qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration",
        by_rows=("sglang.srt.models.qwen3_moe.Qwen3MoeSparseMoeBlock",),
    ),
)
