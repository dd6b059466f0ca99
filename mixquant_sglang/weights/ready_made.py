"""Ready-made prefill weights: an NVFP4 checkpoint, calibrated by somebody else, beside the BF16 one that decodes.

``prefill: {weights: PATH_OR_NAME}`` in a recipe.  Two conventions, told apart by the checkpoint's quantization config:

| | codes, uint8 [N, K/2] | block scales, float8_e4m3fn [N, K/16] | tensor scale, float32, one number |
|---|---|---|---|
| compressed-tensors, ``nvfp4-pack-quantized`` | weight_packed | weight_scale | 1 / weight_global_scale |
| ModelOpt, NVFP4 and W4A16_NVFP4 | weight | weight_scale | weight_scale_2 |

The codes and scales are used as they are.  Parts of a fused linear may have different tensor scales: they stay parts
then, each with its own GEMM, for folding one scale into another would round block scales again.  The activation scales
(input_global_scale, input_scale) and those of a quantised KV cache are not used: activations are scaled by token
(``formats/nvfp4.py``).  Norms, embeddings and all that is not quantised there come from the BF16 checkpoint.

Files are read by their headers first, and then slice by slice: a rank reads its rows, or for a row-parallel linear its
columns.  Refused (MixQuantError, with the tensor and its file): other formats, missing, extra or misshapen tensors,
block scales that are negative or NaN, tensor scales outside [2^-126, 2^126], and weights that are not those of the BF16
checkpoint: other dimensions, other norms, or codes that are not the nearest to its values.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK, nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.recipe.fingerprint import digest
from mixquant_sglang.recipe.modules import is_outside
from mixquant_sglang.weights.checkpoint import DTYPES, Source, Stored
from mixquant_sglang.weights.layouts import Layout, detect
from mixquant_sglang.weights.ready_linear import ReadyLinear

logger = logging.getLogger(__name__)

# How far a part may be from the master, by what rounding to NVFP4 does.  Each code is to be the nearest with the scales
# that the checkpoint has; arithmetic in BF16 moves a boundary by up to ``TIE`` of a block's unit.  Measured on
# Gaussian, heavy-tailed (t3) and trained weights, with scales absmax, searched and weighted, and tensor scales 0.5 to
# 64 times the usual: up to 0.8% of the codes are others, the error is that of the nearest, 0.08 to 0.13 of the norm.
# A fine-tune 2% away has 6% other codes, one 10% away 27% and 1.4 times the error; a tensor scale 1.05 times too large
# 9%.  GPTQ, whose codes make up for each other's errors, has 29%: it cannot be told from a fine-tune, and is refused.
TIE = 0.03
OTHER_CODES = 0.05
WORSE = 1.1
FAR = 0.25
# Dimensions that both configs have to agree on, where both have them.
_DIMENSIONS = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_SMOOTHED = ("pre_quant_scale", "input_smooth_scale")
# Beside what lies outside of the language model, no linear of ours can take experts and draft layers.
_NEVER = re.compile(r"(?:.*\.)?(?:lm_head|embed_tokens)|.*\.experts\..*|(?:.*\.)?mtp\..*")


@dataclass
class PrefillWeights:
    """An NVFP4 checkpoint by its headers, and which of its modules were taken."""

    source: Source
    layout: Layout
    quantised: dict[str, set[str]]  # module -> the last parts of its tensors' names
    unused: dict[str, str] = field(default_factory=dict)  # module -> why no linear takes it
    _taken: set[str] = field(default_factory=set)
    _warned: bool = False

    @classmethod
    def open(cls, asked: str, where: str) -> PrefillWeights:
        """``asked``: a folder, or a name on the hub; ``where`` begins the error messages."""
        try:
            return cls._open(Source.open(find(asked)))
        except MixQuantError as error:
            raise MixQuantError(f"{where}: {error}") from None

    @classmethod
    def _open(cls, source: Source) -> PrefillWeights:
        layout = detect(source)
        leaves: dict[str, set[str]] = {}
        marks = set()
        for name, stored in source.tensors.items():
            module, _, leaf = name.rpartition(".")
            leaves.setdefault(module, set()).add(leaf)
            if leaf in (layout.scales, layout.tensor_scale) or (leaf == layout.codes and stored.dtype == "U8"):
                marks.add(module)
        opened = cls(source, layout, {module: leaves[module] for module in leaves if module in marks})
        if not opened.quantised:
            raise MixQuantError(f"{source.folder}: holds no {layout.name} NVFP4 weight")
        for module, found in opened.quantised.items():
            opened._check_complete(module, found)
        return opened

    @property
    def folder(self) -> Path:
        return self.source.folder

    def identity(self) -> str:
        """Of the weights, wherever they lie: dtypes and shapes, each module's tensor scale and first row of scales."""
        tensors = sorted((name, stored.dtype, list(stored.shape)) for name, stored in self.source.tensors.items())
        samples = []
        for module in sorted(self.quantised):
            scales = self._slice(f"{module}.{self.layout.scales}", slice(0, 1), slice(None), BLOCK)
            outer = self.source.read(f"{module}.{self.layout.tensor_scale}")
            samples.append([scales.view(torch.uint8).flatten().tolist(), outer.flatten().tolist()])
        return digest([self.layout.name, tensors, samples])

    def check_model(self, config: Any) -> None:
        """Refuses a checkpoint of another model; ``config``: what transformers makes of the BF16 one's config.json."""
        here = getattr(config, "text_config", None) or config
        there = self.source.config.get("text_config", self.source.config)
        for key in _DIMENSIONS:
            bf16, ready = getattr(here, key, None), there.get(key)
            if bf16 is not None and ready is not None and bf16 != ready:
                raise MixQuantError(
                    f"{self.folder / 'config.json'}: {key} is {ready}, but {bf16} in the BF16 checkpoint; "
                    "prefill.weights has to hold the same model in NVFP4"
                )

    def linear(self, name: str, shards: Sequence[str]) -> ReadyLinear | None:
        """The linear ``name``, which holds ``shards``; None if the checkpoint keeps it in BF16."""
        modules = self._modules(name, shards)
        there = [module for module in modules if module in self.quantised]
        for module in modules:
            weight = self.source.tensors.get(f"{module}.weight")
            if module in self.quantised or (weight is not None and weight.dtype in DTYPES and not there):
                continue
            if weight is None:
                raise MixQuantError(f"{self.folder}: {module}.{self.layout.codes} is missing")
            rule = f"{{match: {name}, prefill: bf16}}"
            raise MixQuantError(
                f"{self._file(f'{module}.weight')}: {module}.weight is {weight.dtype}"
                + (f", but {there[0]} is NVFP4, and {name} is one GEMM" if there else "")
                + f"; keep {name} in BF16 with a recipe rule '{rule}'"
            )
        if not there:
            return None
        self._taken.update(there)
        return ReadyLinear(self, name, modules)

    def keep(self, name: str, shards: Sequence[str], reason: str) -> None:
        """``name`` stays BF16, so it does not take what the checkpoint has for it."""
        self.unused.update({m: reason for m in self._modules(name, shards) if m in self.quantised})

    def check_all_taken(self) -> None:
        """Refuses quantised modules that no linear of the model took or kept; call it when all have asked."""
        layers = self.source.config.get("text_config", self.source.config).get("num_hidden_layers", math.inf)
        for module in self.quantised.keys() - self._taken - self.unused.keys():
            block = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
            never = _NEVER.fullmatch(module) or is_outside(module)
            if not never and not (block and int(block[1]) >= layers):
                name = f"{module}.{self.layout.codes}"
                raise MixQuantError(f"{self._file(name)}: {name} belongs to no linear of this model")
            self.unused[module] = "never quantised"

    def check_norms(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Refuses vectors of the same name that differ: another model, or one smoothed into its norms."""
        for name, parameter in parameters:
            stored = self.source.tensors.get(name)
            if stored is None or stored.dtype not in DTYPES or parameter.ndim != 1 or stored.shape != parameter.shape:
                continue
            if not torch.equal(self.source.read(name).to(parameter.dtype), parameter.detach().cpu()):
                raise MixQuantError(
                    f"{self._file(name)}: {name} is not that of the BF16 checkpoint; prefill.weights has to be "
                    "quantised from that very checkpoint, without smoothing"
                )

    def check_shapes(self, module: str, n: int, k: int) -> None:
        layout = self.layout
        for leaf, dtype, shape in (
            (layout.codes, "U8", (n, k // 2)),
            (layout.scales, "F8_E4M3", (n, k // BLOCK)),
            (layout.tensor_scale, "F32", None),
        ):
            stored = self.source.tensors[f"{module}.{leaf}"]
            one = shape is None and math.prod(stored.shape) == 1
            if stored.dtype != dtype or not (one or stored.shape == shape):
                raise MixQuantError(
                    f"{self._file(f'{module}.{leaf}')}: {module}.{leaf} is {stored.dtype} {list(stored.shape)}; "
                    f"the BF16 checkpoint needs {dtype} {list(shape) if shape else 'with one number'}"
                )

    def read(self, module: str, rows: slice, columns: slice, device: torch.device) -> NVFP4Tensor:
        """``rows`` and ``columns`` (a multiple of 16, or all) of a module, which ``check_shapes`` has seen."""
        layout = self.layout
        codes = self._slice(f"{module}.{layout.codes}", rows, columns, 2).to(device)
        scales = self._slice(f"{module}.{layout.scales}", rows, columns, BLOCK).to(device)
        if bool((scales.view(torch.uint8) > 0x7E).any()):  # 0x7F is NaN, the rest have a sign
            name = f"{module}.{layout.scales}"
            raise MixQuantError(f"{self._file(name)}: {name} holds negative or NaN block scales")
        name = f"{module}.{layout.tensor_scale}"
        stored = self.source.read(name).reshape(())
        outer = stored.reciprocal() if layout.encodes else stored
        if not 2.0**-126 <= float(outer) <= 2.0**126:
            raise MixQuantError(f"{self._file(name)}: {name} is {float(stored):g}, which is no scale")
        return NVFP4Tensor(codes, scales, outer.to(device))

    def check_near(self, module: str, piece: NVFP4Tensor, master: torch.Tensor) -> None:
        """Refuses codes that are not the nearest to ``master`` bfloat16 [n, K], of the same rows and columns."""
        far = nearest = norm = 0.0
        other = codes = 0
        for rows in (slice(start, start + 1024) for start in range(0, master.shape[0], 1024)):
            part = NVFP4Tensor(piece.packed[rows], piece.block_scales[rows], piece.tensor_scale)
            wanted, ready = master[rows].float(), part.dequantize(torch.float32)
            unit = (part.block_scales.float() * part.tensor_scale).repeat_interleave(BLOCK, dim=1)
            error, least = (ready - wanted).abs_(), (nvfp4.nearest(wanted, part) - wanted).abs_()
            other += int((error > least + TIE * unit).sum())
            codes += int(((wanted != 0) | (ready != 0)).sum())
            far += float(error.square_().sum(dtype=torch.float64))
            nearest += float(least.square_().sum(dtype=torch.float64))
            norm += float(wanted.square_().sum(dtype=torch.float64))
        if other <= OTHER_CODES * codes and far <= WORSE**2 * nearest + 1e-12 * norm and far <= FAR**2 * norm:
            return
        name = f"{module}.{self.layout.codes}"
        raise MixQuantError(
            f"{self._file(name)}: {name} is not this weight of the BF16 checkpoint, rounded: "
            f"{100 * other / max(codes, 1):.1f}% of its codes are not the nearest (allowed: {100 * OTHER_CODES:.0f}%), "
            f"and it is {math.sqrt(far / norm) if norm else math.inf:.2f} of the weight's norm away "
            f"(nearest codes: {math.sqrt(nearest / norm) if norm else 0.0:.2f}). Another fine-tune, another scale, and "
            "codes that make up for each other's errors (GPTQ) are refused"
        )

    def warn_updated(self) -> None:
        """Once: the BF16 weights were updated."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "mixquant: the BF16 weights were updated, so linears that changed no longer prefill with the "
                "ready-made weights of %s, but are quantised from the new BF16 weights",
                self.folder,
            )

    def _modules(self, name: str, shards: Sequence[str]) -> tuple[str, ...]:
        whole = not shards or name in self.quantised or f"{name}.weight" in self.source.tensors
        return (name,) if whole else tuple(shards)

    def _check_complete(self, module: str, found: set[str]) -> None:
        layout = self.layout
        for leaf in (layout.codes, layout.scales, layout.tensor_scale):
            if leaf not in found:
                raise MixQuantError(f"{self.folder}: {module}.{leaf} is missing")
        for leaf in sorted(found - layout.known):
            raise MixQuantError(
                f"{self._file(f'{module}.{leaf}')}: {module}.{leaf} is no tensor of {layout.name}'s NVFP4"
                + ("; weights that were scaled by input channel do not fit the BF16 checkpoint" * (leaf in _SMOOTHED))
            )

    def _file(self, name: str) -> Path:
        return self.folder / self.source.tensors[name].shard

    def _slice(self, name: str, rows: slice, columns: slice, per: int) -> torch.Tensor:
        stored: Stored = self.source.tensors[name]
        if columns.start is not None:
            columns = slice(columns.start // per, columns.stop // per)
        try:
            with safe_open(self.folder / stored.shard, "pt") as file:
                values: torch.Tensor = file.get_slice(name)[rows, columns]
        except (SafetensorError, OSError) as error:
            raise MixQuantError(f"{self.folder / stored.shard}: {name} cannot be read: {error}") from None
        return values.contiguous()


@functools.cache
def find(asked: str) -> Path:
    """The folder ``asked``, or that of the hub's snapshot of that name, downloaded unless it is there already."""
    if Path(asked).is_dir():
        return Path(asked)
    import httpx
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(asked, allow_patterns=patterns, ignore_patterns=["original/*", "consolidated*"]))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise MixQuantError(f"{asked}: is no folder, and fetching it from the hub failed: {reason[:300]}") from None
