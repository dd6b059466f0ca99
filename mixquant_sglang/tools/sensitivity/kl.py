"""What one linear, or the experts of one layer, in low precision do to a model's predictions: KL(BF16 || emulated),
for ``mixquant sensitivity``.

transformers runs the BF16 checkpoint. In a *group*, the linears that SGLang fuses into one GEMM, the leading rows of
each sample take the emulated kernel (``kernels/linear/emulated_*.py``: the fused weight packed as one, activations
quantised by token) and its last rows keep their BF16 result, as ``layers/linear.py`` does with protected rows:

    y[:low] = packed.matmul(x[:low]),    y[low:] = x[low:] @ weight.T

The rest of the model, and what it is compared with, compute in FP32 by default. In BF16 any change at all, however
small, ends in other roundings of all that follows; in FP8 that noise is larger than what one linear does. What BF16's
rounding of the same products does is measured too (``rounding``): below it nothing is known of a group.

All experts of a layer are one group: the leading rows take the emulated experts (``kernels/experts/emulated.py``), with
the routing that transformers found for them.

That is the situation of a served request: the prompt goes through low precision, the last prompt token and the answer
do not, and see the low-precision prompt through its keys and values alone. ``answer`` is the mean KL over those last
rows, in nats: what reaches generated tokens. ``prompt`` is the mean over the rows before: what input logprobs would
show; attention is causal, so the BF16 rows after them change nothing there.

Logits are computed in FP32 from the BF16 hidden states: rounded to BF16, they would differ by more than a layer does.
Refused (MixQuantError): models in which transformers names linears differently or does more to the logits than
``lm_head``, NaN, and checkpoints that transformers cannot load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from jinja2 import TemplateError

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.experts.base import Form, Masters, PackedExperts
from mixquant_sglang.kernels.linear.base import PackedLinear
from mixquant_sglang.kernels.registry import packed_experts, packed_linear
from mixquant_sglang.tools.quantize import model_experts
from mixquant_sglang.tools.quantize.calibration import load_model, token_ids
from mixquant_sglang.tools.quantize.model_experts import ModelExperts
from mixquant_sglang.weights.names import Names

Packed: TypeAlias = PackedLinear | PackedExperts

_ROWS, _COLUMNS = 256, 1 << 14  # of the logits, per step
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu"}


@dataclass(frozen=True)
class Group:
    """A linear of SGLang, ``name``, and those of the checkpoint that it holds; ``kind`` is its name within a layer. All
    experts of a layer have no ``members``."""

    name: str
    kind: str
    layer: int
    members: tuple[str, ...]
    precision: str  # of prefill


@dataclass(frozen=True)
class KL:
    """Means in nats over the BF16 rows at the end of the samples, and over the low-precision rows before them."""

    answer: float
    prompt: float


class Measurement:
    """Runs the samples; each call of ``tick`` is one forward pass. Holds the final BF16 hidden states of them all."""

    def __init__(
        self,
        folder: Path,
        samples: Sequence[dict[str, Any]],
        groups: Iterable[Group],
        *,
        scales: str,
        device: str,
        max_tokens: int,
        answer_tokens: int,
        protect: bool,
        tail: int = 1,
        dtype: torch.dtype = torch.float32,
        tick: Callable[[], object],
    ) -> None:
        """``answer_tokens``: rows at the end of each sample that play the last prompt token and what is generated after
        it; at most half of a sample. ``protect``: the first of them is in BF16 too, as the recipe says, and with
        ``tail`` so are as many prompt tokens, that one included.  ``dtype``: what all else is computed in."""
        try:
            self._model, tokenizer = load_model(folder, device, dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise MixQuantError(f"{folder}: transformers cannot load it: {_one_line(error)}") from error
        self._prompts = [_tokens(tokenizer, i, sample)[:, :max_tokens].to(device) for i, sample in enumerate(samples)]
        own = {name: m for name, m in self._model.named_modules() if isinstance(m, torch.nn.Linear)}
        names, groups = Names(f"{name}.weight" for name in own), list(groups)
        found = {name: own.get(names.of(name)) for group in groups for name in group.members}
        if missing := next((name for name, linear in found.items() if linear is None), None):
            raise MixQuantError(
                f"{folder}: transformers has no linear {missing} in {type(self._model).__name__}; `sensitivity` knows "
                "dense models, and experts, that name their layers like Llama and Qwen3"
            )
        self._linears = {name: linear for name, linear in found.items() if linear is not None}
        self._experts = model_experts.find(self._model) if any(not group.members for group in groups) else {}
        self._scales, self._answer_tokens, self._tick = scales, answer_tokens, tick
        self._protected = tail if protect else 0
        self._low = 0  # rows of the running sample that a group in low precision takes
        self._head = self._model.get_output_embeddings()
        with torch.inference_mode():
            self._reference = [self._hidden(ids) for ids in self._prompts]
            self._check_head(folder)

    @property
    def tokens(self) -> tuple[int, int]:
        """(all, of them in the answers)."""
        lengths = [ids.shape[1] for ids in self._prompts]
        return sum(lengths), sum(self._answer(n) for n in lengths)

    def pack(self, group: Group) -> Packed:
        """The copy that the emulated kernel holds of the group's weights, in one."""
        try:
            if not group.members:
                experts = self._of_layer(group)
                kernel = packed_experts(group.precision, "emulated")
                masters = Masters(*(master.bfloat16() for master in experts.masters()))
                return kernel(masters, _form(experts), scales=self._scales)
            weights: list[torch.Tensor] = [self._linears[name].weight.detach() for name in group.members]
            return packed_linear(group.precision, "emulated")(torch.cat(weights).bfloat16(), scales=self._scales)
        except ValueError as error:
            raise MixQuantError(f"cannot pack {group.name}: {error}") from error

    def rounding(self, groups: Iterable[Group]) -> KL:
        """Of the model in which the ``groups`` run unquantised, with inputs and products rounded to BF16."""
        return self.kl({group: cast("Packed", _Rounded(self._weights(group))) for group in groups})

    def _weights(self, group: Group) -> list[torch.Tensor]:
        return [self._linears[name].weight for name in group.members]

    @torch.inference_mode()
    def kl(self, low: Mapping[Group, Packed]) -> KL:
        """Of the model in which the groups ``low``, and no others, run their packed copies."""
        sums = torch.zeros(2, dtype=torch.float64)
        with ExitStack() as stack:
            for group, packed in low.items():
                stack.enter_context(self._running(group, packed))
            for ids, reference in zip(self._prompts, self._reference, strict=True):
                by_row = self._kl_by_row(reference, self._hidden(ids))
                answer = self._answer(ids.shape[1])
                sums += torch.stack((by_row[-answer:].sum(), by_row[:-answer].sum())).cpu()
        tokens, answers = self.tokens
        if not sums.isfinite().all():
            raise MixQuantError("the logits hold NaN or infinity; check the checkpoint and the samples")
        return KL(float(sums[0]) / answers, float(sums[1]) / (tokens - answers))

    def _answer(self, tokens: int) -> int:
        return min(self._answer_tokens, tokens // 2)

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] after the last norm."""
        self._low = max(0, ids.shape[1] - self._answer(ids.shape[1]) + 1 - self._protected)
        hidden: torch.Tensor = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        self._tick()
        return hidden

    def _of_layer(self, group: Group) -> ModelExperts:
        try:
            return self._experts[group.layer]
        except KeyError:
            raise MixQuantError(f"transformers has no experts {group.name} in {type(self._model).__name__}") from None

    @contextmanager
    def _running(self, group: Group, packed: Packed) -> Iterator[None]:
        """Hooks the members of ``group``; q, k and v get one input, so one product serves the three."""
        if not group.members:
            with self._running_experts(self._of_layer(group), packed):
                yield
            return
        linears = [self._linears[name] for name in group.members]
        biases: list[torch.Tensor] = [
            m.bias if m.bias is not None else m.weight.new_zeros(m.out_features) for m in linears
        ]
        bias = torch.cat(biases).bfloat16() if any(m.bias is not None for m in linears) else None
        latest: list[Any] = [None, None]  # input, its product

        def hook_of(columns: slice, last: bool) -> Callable[..., torch.Tensor]:
            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
                x = inputs[0]
                if latest[0] is not x:
                    rows = x.reshape(-1, x.shape[-1])[: self._low].bfloat16().contiguous()
                    latest[:] = x, packed.matmul(rows, bias)  # type: ignore[union-attr]
                out.view(-1, out.shape[-1])[: self._low] = latest[1][:, columns]
                if last:
                    latest[:] = None, None
                return out

            return hook

        with ExitStack() as stack:
            done = 0
            for i, linear in enumerate(linears, 1):
                columns = slice(done, done := done + linear.out_features)
                handle = linear.register_forward_hook(hook_of(columns, i == len(linears)))
                stack.callback(handle.remove)
            yield

    @contextmanager
    def _running_experts(self, experts: ModelExperts, packed: Packed | _Rounded) -> Iterator[None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            x, ids, weights = (each[: self._low] for each in inputs[:3])
            if isinstance(packed, PackedExperts):
                x = x.bfloat16().contiguous()
                out[: self._low] = packed.run(x, weights.float().contiguous(), ids.int().contiguous())
            else:
                out[: self._low] = out[: self._low].bfloat16()
            return out

        handle = experts.module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _kl_by_row(self, reference: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Float64 [rows]; exactly 0 where the hidden states are equal."""
        found = []
        for rows in zip(torch.split(reference, _ROWS), torch.split(hidden, _ROWS), strict=True):
            log_p, log_q = (self._logits(each).log_softmax(dim=-1) for each in rows)
            found.append(kl_divergence(log_p, log_q))
        return torch.cat(found)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        x, bias = hidden.float(), self._head.bias
        logits = torch.cat([x @ part.float().t() for part in torch.split(self._head.weight, _COLUMNS)], dim=-1)
        return logits if bias is None else logits + bias.float()

    def _check_head(self, folder: Path) -> None:
        """Soft caps and scales on the logits would have to be known here."""
        theirs = self._model(input_ids=self._prompts[0], use_cache=False, logits_to_keep=1).logits[0].float()
        ours = self._logits(self._reference[0][-1:])
        if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(ours.abs().amax())):
            raise MixQuantError(
                f"{folder}: {type(self._model).__name__} does more to its logits than lm_head; `sensitivity` cannot "
                "measure it"
            )


class _Rounded:
    """What stands where a packed copy would, and quantises nothing: of linears ``weights``, of experts none."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = weights

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x BF16 [M, K] -> BF16 [M, N], added up in FP32."""
        products = torch.cat([x.float() @ weight.detach().float().t() for weight in self._weights], dim=-1)
        return (products if bias is None else products + bias.float()).bfloat16()


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Float64 [rows] from FP32 [rows, classes]. Since p and q sum to 1, the sum of p (d + e^-d - 1), d = log p - log q,
    is the same; its terms are of second order in d, and so are then the errors of FP32."""
    p, d = log_p.exp(), log_p - log_q
    terms = torch.where(d.abs() < 1, p * (torch.expm1(-d) + d), log_q.exp() - p + p * d)
    return terms.sum(dim=-1, dtype=torch.float64)


def _tokens(tokenizer: Any, i: int, sample: dict[str, Any]) -> torch.Tensor:
    try:
        answered = "text" in sample or sample["messages"][-1]["role"] == "assistant"
        ids = token_ids(tokenizer, sample, open_turn=not answered)
    except (ValueError, TypeError, KeyError, AttributeError, TemplateError) as error:
        raise MixQuantError(f"--data: sample {i + 1} does not fit the chat template: {_one_line(error)}") from error
    if ids.shape[1] < 2:
        raise MixQuantError(f"--data: sample {i + 1} is fewer than two tokens to the model's tokenizer")
    return ids


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _form(experts: ModelExperts) -> Form:
    """As SGLang runs them: its ``gelu`` is that by erf also where transformers takes the one by tanh."""
    name = str(getattr(experts.module.config, "hidden_act", None) or experts.module.config.hidden_activation)
    if name not in _ACTIVATIONS:
        raise MixQuantError(f"{experts.name}: activation {name}; allowed for experts: {', '.join(_ACTIVATIONS)}")
    return Form(_ACTIVATIONS[name])
