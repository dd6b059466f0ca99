"""What eval_accuracy runs inside the servers: logit processors that force a token, and that sample by a seed.

``Replay`` makes decode itself walk along a given answer, so that the logits at each of its tokens are those of the
server's own prompt KV and of its own decode passes.  (Input logprobs would not do: there the answer is prefilled, in
low precision.)  SGLang returns the best logprobs of what a processor leaves behind, so the processor leaves log p with
two changes: the token to force is raised to SHIFT, and the place of a spare token, which no answer contains, holds that
token's own log p, raised by LIFT so that it is always among the best.  The sum of exponentials is then exp(SHIFT) to
the last bit of FP32: log p is SHIFT more than X

``Sample`` draws with the noise of (seed, step, token id), because SGLang heeds seeds only in deterministic inference,
which mixquant refuses.  Arms that draw with the same seed draw with the same noise: their difference is the model's.

Both go by the number of tokens generated so far, which is right only with ``--disable-overlap-schedule``; the client
checks what came of it.
"""

from __future__ import annotations

import json
import pickle
from typing import Any

import torch

SHIFT, LIFT, FLOOR = 48.0, 31.0, -30.0
SPARE = 0  # of the tiny models: <|endoftext|>
_LOW_53 = (1 << 53) - 1


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser; int64 wraps, and its shifts are made logical by a mask."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """FP64 of the shape of ``ids`` [R, K]: Gumbel noise, a function of seed, step and token id alone."""
    rows = _mixed(_mixed(seeds) + steps)
    bits = _mixed(rows[:, None] + _mixed(ids + 1))
    uniform = (((bits >> 11) & _LOW_53).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _steps(params: list[dict[str, Any]]) -> list[int]:
    return [len(one["__req__"].output_ids) for one in params]


class Replay:
    """Forces ``custom_params["replay"]``, a list of token ids, none of which is ``custom_params["spare"]``."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        wanted = [one["replay"][step] for one, step in zip(params, _steps(params), strict=True)]
        ids = torch.tensor(wanted, device=logits.device)[:, None]
        out = torch.log_softmax(logits.float(), dim=-1)
        spare = torch.tensor([one.get("spare", SPARE) for one in params], device=logits.device)[:, None]
        out.scatter_(1, spare, out.gather(1, ids).clamp(min=FLOOR) + LIFT)
        return out.scatter_(1, ids, SHIFT).to(logits.dtype)


class Sample:
    """Draws by ``custom_params``: seed, temperature, top_p, and top_k where every request of the batch has one; the
    request itself is greedy."""

    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        seeds, steps = column([one["seed"] for one in params], torch.int64), column(_steps(params), torch.int64)
        temperature = column([one["temperature"] for one in params], torch.float64)[:, None]
        top_p = column([one["top_p"] for one in params], torch.float64)[:, None]
        most = [one.get("top_k", 0) for one in params]
        if min(most) > 0:  # of a large vocabulary, the few that can be drawn alone
            scaled = logits.float() / temperature.float()
            best, ids = scaled.topk(min(max(most), logits.shape[-1]), dim=-1)
            ordered = (best - scaled.logsumexp(dim=-1, keepdim=True)).double().exp()
            place = torch.arange(ids.shape[-1], device=logits.device)
            ordered = ordered.masked_fill(place >= column(most, torch.int64)[:, None], 0.0)
        else:
            whole = torch.softmax(logits.double() / temperature, dim=-1)
            ordered, ids = whole.sort(dim=-1, descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0.0  # as SGLang's sampler does
        noise = gumbel(seeds, steps, ids)
        drawn = ids.gather(1, (ordered.log() + noise).argmax(dim=-1, keepdim=True))
        return torch.zeros_like(logits).scatter_(1, drawn, 1.0)


def distribution(found: list[Any], token: int, spare: int = SPARE) -> tuple[list[int], list[float]]:
    """Token ids and log p of one step that forced ``token``, its own last, from SGLang's (logprob, id, text)."""
    at = {place: logprob + SHIFT for logprob, place, _ in found}
    own = at.pop(spare) - LIFT
    at.pop(token)
    return [*at, token], [*at.values(), own]


def to_str(processor: type) -> str:
    """The form that SGLang takes: a reference, so the server must find this module (the caller's PYTHONPATH)."""
    return json.dumps({"callable": pickle.dumps(processor, protocol=0).hex()})
