"""What a loaded model runs: its linears and MoE layers by prefill precision, and why others stay BF16.

Read off the modules, by their own names: the prefix that a layer was built with is not always the name that it got.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.layers.utils.common import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.layers.blocks import is_decoder, norms
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.fused import FusedNorm
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.quantised import QuantisedLinearMethod
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import NEVER, OUTSIDE, TIED, why_bf16
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.text import some
from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.weights.incoming import Known
from mixquant_sglang.weights.names import Names, gates_and_ups
from mixquant_sglang.weights.quantised import QuantisedCheckpoint

logger = logging.getLogger(__name__)

NOT_OFFERED = "SGLang gives it no quantization config"
MULTIPLIED = "SGLang multiplies by its weight itself"
PART_OF_ROWS = "its block has several kinds of experts, each of which may be given a part of the rows"
GATHERED = "DP attention: it may be given the rows of all ranks, and a rank knows the protected ones of its own alone"

ATTENTION = (RadixAttention, RadixLinearAttention)

# Where models of several modalities keep the one of text, and what all models call their blocks.
_TEXT_PARTS = ("thinker", "language_model", "llm", "language", "model")


def linears(model: torch.nn.Module) -> Iterator[tuple[str, MixQuantLinearMethod]]:
    """Our methods under the names of their modules."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MixQuantLinearMethod):
            yield name, method


def experts(model: torch.nn.Module) -> Iterator[tuple[str, MixQuantExpertsMethod]]:
    """Our methods of MoE layers under the names of their modules."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MixQuantExpertsMethod):
            yield name, method


def packed(model: torch.nn.Module) -> Iterator[tuple[str, MixQuantLinearMethod | MixQuantExpertsMethod]]:
    """Both."""
    yield from linears(model)
    yield from experts(model)


def language_model(model: Any) -> torch.nn.Module:
    """The part of ``model`` whose rows are those of the pass; ``model`` where it has no such part."""
    found: Any = model
    for _ in range(4):  # thinker.model, language_model.model
        parts = [getattr(found, name, None) for name in _TEXT_PARTS]
        inner = next((part for part in parts if isinstance(part, torch.nn.Module)), found)
        if inner is found:
            break
        found = inner
    return found  # type: ignore[no-any-return]


def keep_outside_bf16(model: torch.nn.Module) -> None:
    """Makes BF16 what the recipe made low by a prefix that does not tell what the module is: towers that are built as
    if they were the model, gates, and in blocks of experts what ``_beside_experts`` names."""
    inside = {id(module) for module in language_model(model).modules()}
    beside = _beside_experts(model)
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, (MixQuantLinearMethod, MixQuantExpertsMethod)):
            continue
        reason = why_bf16(name) or (None if id(module) in inside else OUTSIDE) or beside.get(id(module))
        if reason is not None and method.low:
            method.stay_bf16(reason)


def _beside_experts(model: torch.nn.Module) -> dict[int, str]:
    """By id: routers, which stand beside the experts and have an output for each of them, and experts of several kinds
    in one block (Ernie 4.5 VL's for texts and for images), whose protected rows nobody knows."""
    found: dict[int, str] = {}
    for block in model.modules():
        layers: list[Any] = [child for child in block.children() if isinstance(child, FusedMoE)]
        counts = {
            count for one in layers for count in (one.num_experts, one.num_experts - one.num_fused_shared_experts)
        }
        routers: list[Any] = [child for child in block.children() if isinstance(child, LinearBase)]
        found |= {id(router): NEVER for router in routers if router.output_size in counts}
        found |= {id(layer): PART_OF_ROWS for layer in layers if len(layers) > 1}
    return found


def keep_gathered_bf16(model: torch.nn.Module, ranks: int) -> None:
    """With DP attention, makes BF16 what does not stand beside an operator of attention, in the same module: SGLang
    gathers the rows of all ranks between the blocks of a layer.  Nor are rows of one batch what is sharded over more
    ``ranks`` than attention.  That the others see rows of their rank alone is seen by running them (``probe.py``)."""
    beside = {
        id(linear)
        for block in model.modules()
        if any(isinstance(part, ATTENTION) for part in block.children())
        for linear in block.children()
    }
    for _, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, (MixQuantLinearMethod, MixQuantExpertsMethod)) or not method.low:
            continue
        if id(module) not in beside or dialect().tensor_parallel(module)[1] > ranks:
            method.stay_bf16(GATHERED)


def describe(model: torch.nn.Module, run: Runtime, asked: Mapping[torch.nn.Module, str]) -> int:
    """Counts into ``run`` what the modules are; returns the bytes of BF16 weights of linears and experts.

    ``asked``: why a layer that was offered to the recipe was left to SGLang."""
    total = 0
    run.precisions.clear()
    run.experts.clear()
    run.stays_bf16.clear()
    dropped = 0
    for name, module in model.named_modules():
        method, reason = getattr(module, "quant_method", None), None
        if isinstance(method, MixQuantLinearMethod):
            run.precisions[method.precision[Role.PROMPT]] += 1
            total += module.weight.nbytes
            dropped += module.weight.nbytes if method.masterless else 0
            reason = method.refusal
        elif isinstance(module, LinearBase):
            run.precisions["bf16"] += 1
            total += module.weight.nbytes
            reason = asked.get(module) or why_bf16(name) or NOT_OFFERED
        elif isinstance(module, (ParallelLMHead, torch.nn.Linear)):
            run.precisions["bf16"] += 1
            reason = NEVER
        elif isinstance(module, FusedMoE):
            run.experts[method.precision[Role.PROMPT] if isinstance(method, MixQuantExpertsMethod) else "bf16"] += 1
            total += sum(p.nbytes for p in module.parameters(recurse=False))
            if isinstance(method, MixQuantExpertsMethod) and method.masterless:
                dropped += sum(weight.nbytes for weight in method.masters[:2])
            reason = method.refusal if isinstance(method, MixQuantExpertsMethod) else asked.get(module) or NOT_OFFERED
        if reason is not None:
            run.stays_bf16.setdefault(reason, []).append(name)
    if tied := _tied_head(model):
        run.stays_bf16[TIED] = [tied]
    run.schedule.label(run.layers)
    run.bf16_linear_bytes, run.dropped_bytes = total, dropped
    return total


def _tied_head(model: torch.nn.Module) -> str:
    """The table of tokens that logits come from, where the model has no head of its own; empty where it has one, makes
    no logits, or another stage of the pipeline makes them."""
    modules = dict(model.named_modules())
    if any(isinstance(module, ParallelLMHead) for module in modules.values()):
        return ""
    if not any(isinstance(module, LogitsProcessor) for module in modules.values()):
        return ""
    if any(isinstance(module, PPMissingLayer) and name.endswith("lm_head") for name, module in modules.items()):
        return ""
    return next((name for name, module in modules.items() if isinstance(module, VocabParallelEmbedding)), "")


def unfused(model: torch.nn.Module) -> dict[str, list[str]]:
    """Reason -> the norms beside attention and MLP that hand over BF16 in every pass, once the others were fused.

    Norms within attention, and the one behind the last layer, are not of this kind."""
    found: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        children = dict(layer.named_children())
        if any(isinstance(part, (*ATTENTION, torch.nn.ModuleList)) for part in children.values()):
            continue
        if not any(isinstance(part, ATTENTION) for part in layer.modules()):
            continue
        readers = {id(norm) for norm, _ in norms(layer)}
        for child, norm in children.items():
            if not type(norm).__name__.endswith("Norm") or isinstance(
                getattr(norm, "_forward_method", None), FusedNorm
            ):
                continue
            if not is_decoder(layer):
                reason = f"no row of layers/families.py lets it in {type(layer).__name__}"
            elif id(norm) not in readers:
                reason = "no linear of low precision reads its result alone"
            else:
                reason = f"no kernel follows the numbers of this {type(norm).__name__}"
            found.setdefault(reason, []).append(f"{name}.{child}" if name else child)
    return found


def log_unfused(model: torch.nn.Module) -> None:
    for reason, names in unfused(model).items():
        logger.info("mixquant: not fused (%s): %s", reason, some(names))


def note_wholes(model: torch.nn.Module, known: Known, matcher: RuleMatcher | None) -> None:
    """Tells ``known`` which tensors of the checkpoint make a weight, of a linear or of an expert, that is not kept in
    BF16."""
    names = Names(known.tensors)
    for name, method in linears(model):
        if isinstance(method, QuantisedLinearMethod):
            known.wholes[name] = frozenset(method.source.checkpoint.leaves_of(method.source.modules))
        elif method.masterless and matcher is not None:
            parts = [f"{names.of(part)}.weight" for part in matcher.shards(name) or (name,)]
            known.wholes[name] = frozenset(part for part in parts if part in known.tensors)
    for name, method in experts(model):
        if method.masterless:
            known.wholes |= gates_and_ups(known.tensors, names.of(name))
    if isinstance(known.quantised, QuantisedCheckpoint):
        for module in known.quantised.kept:
            known.wholes[module] = frozenset(known.quantised.leaves_of([module]))


def log_precisions(run: Runtime, total: int) -> None:
    if any(layer.masterless for layer in run.layers):
        log_one_copy(run, total)
        return
    logger.info(
        "mixquant: %s by prefill precision: %s%s; packed weights add %.1f MiB (%.0f%% of %s %.1f MiB)",
        "linears and experts" if run.experts else "linears",
        _counted(run.precisions),
        f"; MoE layers: {_counted(run.experts)}" if run.experts else "",
        run.extra_weight_bytes / 2**20,
        100 * run.extra_weight_bytes / max(total, 1),
        "their" if run.experts else "the linears'",
        total / 2**20,
    )
    logger.info("mixquant: rows by role: %s", run.schedule.table.describe())


def log_one_copy(run: Runtime, total: int) -> None:
    """Of a recipe that keeps no BF16 weights of some linears."""
    logger.info(
        "mixquant: %s by prefill precision: %s%s; their weights take %.1f MiB, %.0f%% of %.1f MiB in BF16",
        "linears and experts" if run.experts else "linears",
        _counted(run.precisions),
        f"; MoE layers: {_counted(run.experts)}" if run.experts else "",
        run.linear_weight_bytes / 2**20,
        100 * run.linear_weight_bytes / max(total, 1),
        total / 2**20,
    )
    logger.info("mixquant: rows by role: %s", run.schedule.table.describe())
    logger.info("mixquant: generated tokens come from %s; no BF16 weights are kept for them", run.generated_from)
    if run.recipe.verify and run.selection.kernels.get("nvfp4") == "native":
        logger.info("mixquant: native nvfp4 is not compared with the emulated kernel where no BF16 weights are kept")


def _counted(precisions: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {precision}" for precision, n in sorted(precisions.items()))


def log_reasons(run: Runtime, reasons: Iterable[str]) -> None:
    for reason in reasons:
        logger.info("mixquant: stays BF16 (%s): %s", reason, some(run.stays_bf16[reason]))
