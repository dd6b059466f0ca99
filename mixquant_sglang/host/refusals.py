"""What mixquant refuses of SGLang's flags, asked before anything starts and again of what SGLang made of the flags.

Asked of the resolved arguments, since a flag may set others (``--rl-on-policy-target`` turns deterministic inference
on) and a model its own.  ``docs/support.md`` has the same list, and what was looked at and let through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import compact, refused_deterministic
from mixquant_sglang.host.refusal import Refusal, deterministic, gathers, is_set
from mixquant_sglang.host.refused import REFUSALS
from mixquant_sglang.recipe import Recipe, takes_ready_made
from mixquant_sglang.recipe.fingerprint import asked_digest
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.versions import environment, machine
from mixquant_sglang.versions.dialect import dialect

# Flags with which somebody looks at what modules return.  Fused modules hand over quantised activations, and rows that
# nobody reads are left out, which a dump would show as values: so nothing is fused and nothing left out.
WATCHING = (
    "forward_hooks",
    "debug_tensor_dump_output_folder",
    "msprobe_dump_config",
    "enable_return_routed_experts",
    "expert_distribution_recorder_mode",
)


def check_server_args(server_args: Any, recipe: Recipe | None = None) -> None:
    """Raises ``MixQuantError`` for the first flag that mixquant refuses, as given or as resolved so far."""
    for line in refused_lines(server_args, recipe):
        raise MixQuantError(line)


def refused_lines(server_args: Any, recipe: Recipe | None = None) -> Iterator[str]:
    """Of each flag that mixquant refuses, as given or as resolved so far, in the order of the table; without a recipe,
    of one that has low layers."""
    low = recipe is None or not recipe.bf16_throughout
    decodes_low = recipe is not None and not recipe.bf16_decode
    resolved = dialect().resolved(server_args)
    device = str(getattr(resolved, "device", None) or "").partition(":")[0]
    more = compact.REFUSALS if recipe is not None and compact.precisions(recipe) else ()
    for refusal in (*REFUSALS, *more):
        if (refusal.devices and device not in refusal.devices) or (refusal.low and not low):
            continue
        if refusal.decodes_low and not decodes_low:
            continue
        if refusal.beside and not any(is_set(_value(args, refusal.beside)) for args in (server_args, resolved)):
            continue
        if refusal.gathered and not (gathers(server_args) or gathers(resolved)):
            continue
        if refusal.deterministic and not (deterministic(server_args) or deterministic(resolved)):
            continue
        # as given too: SGLang resolves --enable-dp-attention to --attn-dp-size and False
        if any(_refuses(refusal, args) for args in (server_args, resolved)):
            yield f"--quantization {machine.NAME} does not go with {refusal.flag}: {refusal.why}; {refusal.instead}"


def _refuses(refusal: Refusal, args: Any) -> bool:
    value = _value(args, refusal.field)
    unless = any(is_set(_value(args, field)) for field in refusal.unless)
    return value is not None and not unless and refusal.refused(value)


def check_asked(recipe: Recipe, launched: str | None) -> None:
    """Raises ``MixQuantError`` if ``recipe`` asks another thing than what the launcher of this server read, of which
    ``launched`` is the digest: replicas (``--dp-size``) have no group over which they could compare."""
    if launched is not None and asked_digest(recipe) != launched:
        raise MixQuantError(f"{recipe.source} has changed since this server was launched: start it again")


def check_recipe(recipe: Recipe, selection: Selection) -> None:
    """Raises ``MixQuantError`` for what a recipe asks that does not go with what it comes to here."""
    if selection.kernels and machine.device().capability is None and machine.repacks_weights():
        raise MixQuantError(
            "SGLang's build for this CPU repacks BF16 weights for AMX, after which they cannot be packed any more; "
            f"use SGLang's build for CUDA with --device cpu, or recipe bf16 (recipe {recipe.name} has "
            f"{' and '.join(selection.kernels)})"
        )
    low_decode = {selection.decode, *selection.by_rule.get("decode", ())} - {"bf16"}
    if (recipe.min_tokens or 1) > 1 and low_decode:
        by = recipe.min_tokens_by or f"{recipe.source} prefill.min_tokens"
        which = "some" if selection.decode == "bf16" else "them"
        raise MixQuantError(
            f"{by}: shorter passes stay bf16, which needs decode in bf16 for all layers; "
            f"the recipe decodes {which} in {' and '.join(sorted(low_decode))}"
        )
    compact.check(recipe)
    refused_deterministic.check(recipe, selection)
    if recipe.prefill_weights and not takes_ready_made(selection.prefill, recipe.layers):
        raise MixQuantError(
            f"{recipe.prefill_weights_at}: holds NVFP4 weights, but prefill is {selection.prefill} "
            f"({selection.reason}); ask for 'prefill: {{precision: nvfp4}}'"
        )


def _value(args: Any, field: str) -> Any:
    for name in field.split("."):
        args = args.get(name) if isinstance(args, dict) else getattr(args, name, None)
    return args


def watching(server_args: Any) -> list[str]:
    """The flags among ``WATCHING`` that this server has, and the environment's dumper."""
    resolved = dialect().resolved(server_args)
    flags = [f"--{field.replace('_', '-')}" for field in WATCHING if is_set(getattr(resolved, field, None))]
    return [*flags, "DUMPER_ENABLE"] if environment.dumps_modules() else flags
