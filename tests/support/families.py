"""What mixquant makes of each family of ``scripts/models/families.py``, and how the family runs on a CPU and on a GPU.

Recipe ``auto``: FP8 for ``attention`` and what its rule names beside it, ``DOWN``, and for the rest of ``others`` what
the machine's best is (NVFP4, emulated on a CPU).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixquant_sglang.recipe.modules import A_GATE, NEVER, OUTSIDE, TIED

PROMPTS = [37, 21]  # of one prefill pass; the last row of each is protected
DOWN = "down_proj"
NOT_OFFERED = "SGLang gives it no quantization config"


@dataclass(frozen=True)
class Expected:
    """``attention`` and ``others``: the low linears, by name below ``prefix``, and how many of each.  ``reasons``: why
    others stay BF16.  ``experts``: MoE layers.  ``args``: of SGLang, anywhere.
    ``image``: one of four tokens, for the first prompt.

    ``interpreted``: on a CPU the family runs with Triton's interpreter alone, and with ``cpu_args``.  ``cpu``: why it
    does not run there, by version.  ``shared_fused``: on CUDA SGLang has the shared experts among the others, so there
    are no linears of theirs."""

    attention: Mapping[str, int]
    others: Mapping[str, int] = field(default_factory=dict)
    prefix: str = "model.layers.N."
    reasons: tuple[str, ...] = (NEVER,)
    experts: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)
    interpreted: bool = False
    cpu_args: Mapping[str, Any] = field(default_factory=dict)
    cpu: Mapping[str, str] = field(default_factory=dict)
    image: Mapping[str, Any] | None = None
    shared_fused: bool = False

    def low(self, attention: str, others: str, cuda: bool = False) -> dict[str, dict[str, int]]:
        """As ``run_model`` tells it, for these precisions."""
        out: dict[str, dict[str, int]] = {}
        gone = "mlp.shared_experts." if cuda and self.shared_fused else None
        down = {name: count for name, count in self.others.items() if name.endswith(DOWN)}
        rest = {name: count for name, count in self.others.items() if name not in down}
        for precision, linears in ((attention, self.attention | down), (others, rest)):
            kept = {name: count for name, count in linears.items() if gone is None or not name.startswith(gone)}
            out.setdefault(precision, {}).update({f"{self.prefix}{name}": count for name, count in kept.items()})
        return {precision: linears for precision, linears in out.items() if linears}

    @property
    def embeds(self) -> bool:
        return bool(self.args.get("is_embedding"))


def _attention(layers: int = 2) -> dict[str, int]:
    return {"self_attn.qkv_proj": layers, "self_attn.o_proj": layers}


def _mlp(name: str = "mlp", layers: int = 2) -> dict[str, int]:
    return {f"{name}.gate_up_proj": layers, f"{name}.down_proj": layers}


BOTH = ("0.5.17", "0.5.23")
EMBEDS = {"is_embedding": True}
TRITON = {"attention_backend": "triton"}
# Pages of states for the radix cache are made by CUDA alone.
STATES = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True, "max_mamba_cache_size": 16}
SHARED = _mlp(layers=1) | _mlp("mlp.shared_experts", 1)  # the first of two layers is dense
LATENT = {"self_attn.fused_qkv_a_proj_with_mqa": 2, "self_attn.q_b_proj": 2, "self_attn.o_proj": 2}
HYBRID = {
    **{"linear_attn.in_proj_qkvz": 1, "linear_attn.out_proj": 1},
    **{"qkv_proj": 1, "o_proj": 1},  # SGLang's layer is the attention itself
}
IMAGES = (NEVER, OUTSIDE)
MULTIMODAL = {"enable_multimodal": True}  # what SGLang takes for a text model unless it is told
PATCHES_14 = {"tokens": 4, "feature": [16, 3 * 2 * 14 * 14], "grid": [1, 4, 4]}
PATCHES_16 = {"tokens": 4, "feature": [16, 3 * 2 * 16 * 16], "grid": [1, 4, 4]}
# Of both prompts: with the Triton back end stock SGLang's Gemma-3 ends where a pass has texts and images.
PIXELS = {"tokens": 4, "feature": [1, 3, 56, 56], "prompts": 2}
PIXELS_OF_ONE = {"tokens": 4, "feature": [1, 3, 56, 56]}
PATCHES_OF_NINE = {"tokens": 4, "feature": [1, 36, 3 * 16 * 16], "patches": [6, 6]}
GEMMA4 = {"image": PATCHES_OF_NINE, "prefix": "language_model.layers.N.", "interpreted": True, "cpu_args": TRITON}

DENSE = Expected(_attention(), _mlp())
NO_HEAD = Expected(_attention(), _mlp(), reasons=(TIED,))
EXPERTS = Expected(_attention(), experts=2)

EXPECTED: dict[str, Expected] = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    # SGLang builds all of them without a name, so no rule speaks of attention's
    "phi": Expected({}, {"self_attn.qkv_proj": 2, "self_attn.dense": 2, "mlp.fc1": 2, "mlp.fc2": 2}),
    "phi3": DENSE,
    "olmo2": DENSE,
    "olmo3": DENSE,
    "granite": DENSE,
    "cohere": NO_HEAD,
    "cohere2": NO_HEAD,
    "glm4": DENSE,
    "stablelm": Expected({}, _mlp(), reasons=(NEVER, NOT_OFFERED)),
    "gemma3_text": DENSE,
    "mixtral": EXPERTS,
    "qwen2_moe": Expected(_attention(), _mlp("mlp.shared_expert"), experts=2, interpreted=True),
    "qwen3_moe": EXPERTS,
    "phimoe": EXPERTS,
    "glm4_moe": Expected(_attention(), SHARED, experts=1, shared_fused=True),
    "granitemoe": EXPERTS,
    # its linears of attention are built without a quantization config
    "gpt_oss": Expected(
        {},
        experts=2,
        reasons=(NEVER, NOT_OFFERED),
        args={"moe_runner_backend": "triton"},
        interpreted=True,
        cpu_args=TRITON,
    ),
    "llama4": Expected(
        _attention(),
        _mlp("feed_forward", 1) | _mlp("feed_forward.shared_expert", 1),
        prefix="language_model.model.layers.N.",
        reasons=IMAGES,
        experts=1,
        args=MULTIMODAL,
        image=PIXELS_OF_ONE,
        cpu=dict.fromkeys(BOTH, "SGLang's experts on a CPU do not take apply_router_weight_on_input"),
    ),
    "deepseek_v2": Expected(
        {"self_attn.q_proj": 2, "self_attn.kv_a_proj_with_mqa": 2, "self_attn.o_proj": 2},
        SHARED,
        experts=1,
        interpreted=True,
        cpu_args=TRITON,
    ),
    "deepseek_v3": Expected(LATENT, SHARED, experts=1, interpreted=True, cpu_args=TRITON),
    "glm4_moe_lite": Expected(LATENT, SHARED, experts=1, interpreted=True, cpu_args=TRITON, shared_fused=True),
    "qwen3_next": Expected(
        HYBRID,
        _mlp("mlp.shared_expert"),
        reasons=(NEVER, A_GATE, NOT_OFFERED),
        experts=2,
        args=STATES,
        interpreted=True,
        cpu_args=TRITON,
    ),
    "qwen3_5": Expected(
        HYBRID,
        _mlp(),
        reasons=(*IMAGES, A_GATE, NOT_OFFERED),
        args=STATES,
        interpreted=True,
        cpu_args=TRITON,
        image=PATCHES_16,
    ),
    "qwen3_5_moe": Expected(
        HYBRID,
        _mlp("mlp.shared_expert"),
        reasons=(*IMAGES, A_GATE, NOT_OFFERED),
        experts=2,
        args=STATES,
        interpreted=True,
        cpu_args=TRITON,
        image=PATCHES_16,
    ),
    "gemma3_mm": Expected(
        _attention(),
        _mlp(),
        prefix="language_model.model.layers.N.",
        reasons=IMAGES,
        args=MULTIMODAL,
        image=PIXELS,
    ),
    "gemma4": Expected(_attention(), _mlp(), reasons=IMAGES, **GEMMA4),
    "gemma4_moe": Expected(
        _attention(),
        _mlp(),
        reasons=IMAGES,
        experts=2,
        cpu={"0.5.17": "SGLang's experts on a CPU take silu alone"},
        **GEMMA4,
    ),
    "gemma4_ple": Expected(_attention(4), _mlp(layers=4), reasons=(*IMAGES, A_GATE), **GEMMA4),
    "qwen2_5_vl": Expected(_attention(), _mlp(), reasons=IMAGES, image=PATCHES_14),
    "qwen3_vl": Expected(_attention(), _mlp(), reasons=IMAGES, image=PATCHES_16),
    "qwen3_vl_moe": Expected(_attention(4), reasons=IMAGES, experts=4, image=PATCHES_16),
    "glm4v": Expected(_attention(), _mlp(), reasons=IMAGES, image=PATCHES_14),
    "glm4v_moe": Expected(_attention(), SHARED, reasons=IMAGES, experts=1, image=PATCHES_14, shared_fused=True),
    "qwen3_embedding": Expected(_attention(), _mlp(), args=EMBEDS),
    "e5_mistral": Expected(_attention(), _mlp(), reasons=(), args=EMBEDS),
    "qwen2_reward": Expected(_attention(), _mlp(), args=EMBEDS),
    "llama_reward": Expected(_attention(), _mlp(), args=EMBEDS),
}


def chosen() -> list[str]:
    """All of them, or those that ``FAMILIES=qwen3_5,gemma4`` names."""
    return os.environ.get("FAMILIES", ",".join(EXPECTED)).split(",")


def cases(name: str, model: str, more: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of ``run_model``: stock, the control, and the default recipe."""
    expected = EXPECTED[name]
    base = {"model": model, "prompts": PROMPTS, "args": {**expected.args, **args}, **more}
    if expected.image:
        base["image"] = expected.image
    low = {**base, "recipe": "auto", "policy": not expected.embeds}
    return {"stock": base, "bf16": {**base, "recipe": "bf16"}, "auto": low}


def problems(name: str, ran: Mapping[str, Any], attention: str, others: str, cuda: bool = False) -> list[str]:
    """What is not as it must be; ``ran``: results of ``cases``; ``attention``, ``others``: precisions of ``auto``."""
    expected = EXPECTED[name]
    failed = {case: result.get("error") or result.get("refused") for case, result in ran.items()}
    found = [f"{case}: {why}" for case, why in failed.items() if why]
    if found:
        return found
    stock, control = ran["stock"], ran["bf16"]
    for field_ in ("class", "tokens", "bits"):
        if stock[field_] != control[field_]:
            found.append(f"recipe bf16 is not stock: {field_} {control[field_]}, {stock[field_]}")
    if control["low"]:
        found.append(f"recipe bf16 has low linears: {control['low']}")
    if expected.image:
        if stock["other_image"] != control["other_image"]:
            found.append("recipe bf16 is not stock, of another image")
        blind = [case for case, result in ran.items() if result["other_image"] == result["bits"][0]]
        found += [f"{case}: the image makes no difference" for case in blind]
    return found + _problems_of_low(
        expected, ran["auto"], stock, expected.low(attention, others, cuda), attention, others
    )


def _problems_of_low(
    expected: Expected,
    auto: Mapping[str, Any],
    stock: Mapping[str, Any],
    low: Mapping[str, Mapping[str, int]],
    attention: str,
    others: str,
) -> list[str]:
    state = auto["state"]
    steps, rows = len(auto["bits"]) - 1, sum(PROMPTS)
    of_others = [others] if others in low or expected.experts else []
    label = "+".join(of_others + [name for name in (attention,) if name in low and name not in of_others])
    counted = {"bf16": len(PROMPTS), label: rows - len(PROMPTS)}
    layers = {precision: sum(linears.values()) for precision, linears in low.items()}
    ran = sum(layers.values()) + expected.experts
    proved = f"mixquant: a tiny prompt ran {ran} of {ran} low linears"
    checks = {
        "class": (auto["class"], stock["class"]),
        "low linears": (auto["low"], low),
        "layers": ({p: n for p, n in state["layers"].items() if p != "bf16"}, layers),
        "MoE layers": (state["experts"], {others: expected.experts} if expected.experts else {}),
        "reasons": ({*state["stays_bf16"]}, {*expected.reasons}),
        "proof": (state.get("unproven"), None),
        "proved": ([line for line in auto["log"] if line.startswith(proved)] != [], True),
        "tokens of prefill": (auto["after"]["tokens"]["prefill"], counted),
        "tokens of decode": (auto["after"]["tokens"]["decode"], {"bf16": steps * len(PROMPTS)} if steps else {}),
        "protected rows": (auto["after"]["protected_rows"], len(PROMPTS)),
        "prefill is another computation": (auto["bits"][0] != stock["bits"][0], True),
    }
    if not expected.embeds:
        checks["a BF16 prefill is stock's"] = (auto["policy"], {name: stock[name] for name in ("tokens", "bits")})
    return [f"{what}: {got}, not {wanted}" for what, (got, wanted) in checks.items() if got != wanted]
