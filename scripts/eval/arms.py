"""The arms of eval_accuracy: recipes, and waves of requests to the server that runs one.

A wave is one request to /generate with all prompts as token ids.  SGLang hands such a batch to its scheduler in one
message; from an empty or equal cache on it then forms the same batches each time, and equal batches give equal bits.
(Prompts through the chat endpoint would come one by one, in batches that depend on the moment, and a row's last bits
depend on the batch.  The chat template renders the same text: tests/unit/test_tiny_tasks.py.)
"""

from __future__ import annotations

import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from scripts.bench.servers import Arm
from scripts.eval.processor import SPARE, Replay, Sample, distribution, to_str
from scripts.models.tiny_text import END_OF_TEXT, IM_END

# prefill, decode, whether the last prompt token takes decode's precision
RECIPES = {
    "bf16": ("bf16", "bf16", True),
    "everywhere": ("nvfp4", "nvfp4", False),
    "mix": ("nvfp4", "bf16", True),
    "mix-unprotected": ("nvfp4", "bf16", False),
    "decode-only": ("bf16", "nvfp4", False),  # together with mix-unprotected: each pass of `everywhere` once
    "mix-fp8": ("fp8", "bf16", True),
}
# What each choice of the recipe nvfp4 buys: one of them changed. Rules name layers as every Qwen3 and Llama has them;
# EDGES stands for the numbers of the first and the last one.
ABLATIONS = {
    "absmax": {"weights": "{scales: absmax}"},
    "tail-16": {"protect": "{last_prompt_tokens: 16}"},
    "tail-64": {"protect": "{last_prompt_tokens: 64}"},
    "tail-256": {"protect": "{last_prompt_tokens: 256}"},
    "down-bf16": {"layers": r"[{match: 're:.*\.down_proj', prefill: bf16}]"},
    "o-bf16": {"layers": r"[{match: 're:.*\.o_proj', prefill: bf16}]"},
    "qkv-bf16": {"layers": r"[{match: 're:.*\.qkv_proj', prefill: bf16}]"},
    "qkv-bf16-tail-64": {
        "layers": r"[{match: 're:.*\.qkv_proj', prefill: bf16}]",
        "protect": "{last_prompt_tokens: 64}",
    },
    "attention-bf16": {"layers": r"[{match: 're:.*\.(qkv|o)_proj', prefill: bf16}]"},
    "attention-bf16-tail-64": {
        "layers": r"[{match: 're:.*\.(qkv|o)_proj', prefill: bf16}]",
        "protect": "{last_prompt_tokens: 64}",
    },
    "qkv-fp8": {"layers": r"[{match: 're:.*\.qkv_proj', prefill: fp8}]"},
    "attention-fp8": {"layers": r"[{match: 're:.*\.(qkv|o)_proj', prefill: fp8}]"},
    "attention-fp8-tail-64": {
        "layers": r"[{match: 're:.*\.(qkv|o)_proj', prefill: fp8}]",
        "protect": "{last_prompt_tokens: 64}",
    },
    "edges-bf16": {"layers": r"[{match: 're:model\.layers\.(EDGES)\..*', prefill: bf16}]"},
    "down-fp8": {"layers": r"[{match: 're:.*\.down_proj', prefill: fp8}]"},
    "edges-fp8": {"layers": r"[{match: 're:model\.layers\.(EDGES)\..*', prefill: fp8}]"},
    "min-tokens-512": {"prefill": "{precision: nvfp4, min_tokens: 512}"},
}
MAIN = (*RECIPES, "attention-fp8")  # the last is what nvfp4-fp8 does with a model like ours
FLAGS = ["--enable-custom-logit-processor", "--disable-overlap-schedule"]  # see processor.py


def recipe(name: str, layers: int) -> str:
    """The YAML of an arm for a model of so many ``layers``."""
    prefill, decode, protect = RECIPES[name if name in RECIPES else "mix"]
    sections = {
        "version": "1",
        "prefill": f"{{precision: {prefill}}}",
        "decode": f"{{precision: {decode}}}",
        "protect": f"{{last_prompt_token: {str(protect).lower()}}}",
        **ABLATIONS.get(name, {}),
    }
    text = "".join(f"{key}: {value}\n" for key, value in sections.items())
    return text.replace("EDGES", f"0|{layers - 1}")


def write_recipes(folder: Path, names: list[str], layers: int) -> list[str]:
    """A file for each arm; SGLang gets the path, and logs are named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.yaml").write_text(recipe(name, layers))
    return [str(folder / f"{name}.yaml") for name in names]


@dataclass(frozen=True)
class Answer:
    """Generated ids up to and with the stop token; of a replayed answer also its distributions [tokens, top]."""

    ids: list[int]
    cached: int
    top_ids: np.ndarray[Any, Any] | None = None
    top_logprobs: np.ndarray[Any, Any] | None = None


class Client:
    """Waves to one server; whatever goes wrong ends in one line and the end of the server's log."""

    def __init__(self, arm: Arm, top: int, spare: int = SPARE, stops: tuple[int, ...] = (IM_END, END_OF_TEXT)) -> None:
        """``spare``: see processor.py; ``stops``: the tokens that end an answer, none: its limit alone does."""
        self.arm, self.top, self.spare, self.stops = arm, top, spare, stops
        self.spent = {"greedy": 0.0, "sampled": 0.0, "replayed": 0.0}  # seconds in requests

    def _wave(
        self, kind: str, prompts: list[list[int]], params: list[dict[str, Any]], **more: Any
    ) -> list[dict[str, Any]]:
        body = {"input_ids": prompts, "sampling_params": params, **more}
        began = time.monotonic()
        try:
            found = orjson.loads(self.arm.post("/generate", body))
        except urllib.error.HTTPError as error:
            raise self.arm.failed(f"answered {error.code}: {error.read()[:300]!r}") from None
        except (OSError, ValueError) as error:
            raise self.arm.failed(f"did not answer ({error!r})") from None
        self.spent[kind] += time.monotonic() - began
        if len(found) != len(prompts):
            raise self.arm.failed(f"gave {len(found)} answers to {len(prompts)} prompts")
        for one in found:
            if one["meta_info"]["finish_reason"]["type"] == "abort":
                raise self.arm.failed(f"aborted a request: {one['meta_info']['finish_reason']}")
        return list(found)

    def greedy(self, prompts: list[list[int]], limits: list[int]) -> list[Answer]:
        return self._answers(self._wave("greedy", prompts, [self._params(limit) for limit in limits]))

    def sampled(
        self,
        prompts: list[list[int]],
        limits: list[int],
        seeds: list[int],
        temperature: float,
        top_p: float,
        top_k: int = 0,
    ) -> list[Answer]:
        """``top_k`` 0: of the whole vocabulary."""
        drawn = {"temperature": temperature, "top_p": top_p} | ({"top_k": top_k} if top_k else {})
        params = [
            self._params(limit) | {"custom_params": {"seed": seed, **drawn}}
            for limit, seed in zip(limits, seeds, strict=True)
        ]
        return self._answers(self._wave("sampled", prompts, params, custom_logit_processor=to_str(Sample)))

    def replayed(self, prompts: list[list[int]], answers: list[list[int]]) -> list[Answer]:
        """The distribution at each token of ``answers``, decoded."""
        whole = {"ignore_eos": True, "stop_token_ids": None}
        params = [
            {**self._params(len(ids)), **whole, "custom_params": {"replay": ids, "spare": self.spare}}
            for ids in answers
        ]
        more = {"return_logprob": True, "top_logprobs_num": self.top + 1, "custom_logit_processor": to_str(Replay)}
        out = []
        for ids, one in zip(answers, self._wave("replayed", prompts, params, **more), strict=True):
            meta = one["meta_info"]
            if one["output_ids"] != ids:
                raise self.arm.failed(f"did not replay an answer: {one['output_ids'][:8]}... for {ids[:8]}...")
            found = zip(meta["output_top_logprobs"], ids, strict=True)
            steps = [distribution(step, token, self.spare) for step, token in found]
            top_ids = np.array([tokens for tokens, _ in steps], dtype=np.int32)
            out.append(Answer(ids, meta["cached_tokens"], top_ids, np.array([logprobs for _, logprobs in steps])))
        return out

    @staticmethod
    def _answers(found: list[dict[str, Any]]) -> list[Answer]:
        return [Answer(one["output_ids"], one["meta_info"]["cached_tokens"]) for one in found]

    def _params(self, limit: int) -> dict[str, Any]:
        asked = {"temperature": 0, "max_new_tokens": limit}
        return asked | ({"stop_token_ids": [*self.stops]} if self.stops else {"ignore_eos": True})
