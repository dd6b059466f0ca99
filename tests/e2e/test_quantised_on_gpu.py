"""Quantised checkpoints and packed experts on GPU servers: generated tokens are those of the same weights in BF16.

Low prefill differs from BF16's on purpose, and the compact recipes have no BF16 prefill to ask for.  So what is
compared with stock SGLang, on the weights multiplied out, leaves it out: prompts go in one token at a time, each behind
the cached ones before it.  Such a row is the last of its prompt, a protected one, and is multiplied as decode rows are:
only kernels of BF16 rows and packed weights ran, which the counters must say.  Whole prompts, with low prefill, are
compared with a server that packs the BF16 weights itself, to the same numbers: they are exact in the format.

The kernels add in another order than cuBLAS, and BF16 rounds what they give: a token may be another one where the
reference finds both within ``TIE`` of each other.  Every position of a prompt is compared, also behind such a one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.e2e.test_deterministic_on_gpu import Counted
from tests.support import exact_checkpoints, plugins, quantised_checkpoints, tiny_models
from tests.support.server import ON_GPU, Server

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(900)]

CAPABILITY = torch.cuda.get_device_capability() if ON_GPU else (9, 0)
ATTENTION = ["--attention-backend", "fa3" if CAPABILITY[0] == 9 else "triton"] if ON_GPU else []
FLAGS = [
    *("--random-seed", "1", "--page-size", "1", "--chunked-prefill-size", "256", "--mem-fraction-static", "0.2"),
    *("--cuda-graph-max-bs-decode", "8", *ATTENTION),
]
NEW = 16
TIE = 0.25  # of logprobs: BF16 logits between 16 and 32 are 0.125 apart, and two of them may be off by one step
TEXTS = (  # what the model was trained on: the Python library's sources
    'def __repr__(self):\n        return "<%s at %x>" % (self.__class__.__name__, id(self))\n\n    def close(self',
    "import os\nimport sys\n\nclass Error(Exception):\n    pass\n\ndef main(argv=None):\n    if argv is None:\n",
    "for i in range(len(self._items)):\n            if self._items[i] is not None:\n                yield",
    "    try:\n        import threading\n    except ImportError:\n        threading = None\n\n    def read(self, size",
)
LENGTH = 24  # of a prompt, in tokens
DOWN = "layers:\n  - {match: 're:.*down_proj', prefill: bf16, decode: bf16}\n"  # K = 704 is no multiple of 128
LEFT = f"layers:\n  - {{match: {quantised_checkpoints.LEFT}, prefill: bf16, decode: bf16}}\n"
DECODES = {"fp8": "w8a16", "nvfp4": "w4a16"}
PACKING = {"fp8": "fp8", "nvfp4": "nvfp4-emulated"}  # recipes that keep BF16 weights for decode
KINDS = (
    *("nvfp4 parts", "nvfp4 modelopt", "fp8 rows", "fp8 blocks"),
    *("fp8 experts", "nvfp4 experts"),
)


@dataclass(frozen=True)
class Checkpoints:
    """``compact`` and its recipe; the same weights in BF16, and the recipe that packs those to the same numbers."""

    compact: Path
    recipe: str
    plain: Path
    packs: str | None


def _recipe(folder: Path, name: str, prefill: str, decode: str, rules: str) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(f"version: 1\nprefill: {{precision: {prefill}}}\ndecode: {{precision: {decode}}}\n{rules}")
    return str(file)


def _mixture(folder: Path) -> Path:
    """A Qwen3-MoE of random weights, in which each token takes all experts: between two that a router finds about
    equal, rounding would choose."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**(tiny_models.TEXT | sizes | experts))
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make(tiny: Path, folder: Path, kind: str) -> Checkpoints:
    low, _, form = kind.partition(" ")
    if form == "experts":
        exact = exact_checkpoints.write(_mixture(folder / "made"), folder / "exact", low)
        return Checkpoints(exact, f"{low}-compact", exact, PACKING[low])
    if form in ("parts", "blocks"):  # numbers that no packing of ours gives
        rules = DOWN if form == "blocks" else ""
        made, plain = quantised_checkpoints.write(tiny, folder / "made", kind)
        recipe = _recipe(folder, "compact", low, DECODES[low], rules) if rules else f"{low}-compact"
        return Checkpoints(made, recipe, plain, None)
    exact = exact_checkpoints.write(tiny, folder / "exact", low)
    made, plain = quantised_checkpoints.write(exact, folder / "made", kind, beside=form == "modelopt")
    return Checkpoints(made, f"{low}-compact", plain, _recipe(folder, "packs", low, DECODES[low], LEFT))


@dataclass(frozen=True)
class Served:
    kind: str
    compact: Server
    stock: Server
    packs: Server | None
    prompts: list[list[int]]

    @property
    def low(self) -> str:
        return self.kind.split()[0]

    @property
    def decode(self) -> str:
        return DECODES[self.low]


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    kind = request.param
    if kind.startswith("nvfp4") and CAPABILITY[0] >= 10:
        pytest.skip("nvfp4-compact is refused where NVFP4 is native")
    if kind.startswith("fp8") and CAPABILITY < (8, 9):
        pytest.skip("FP8 wants SM89")
    folder = tmp_path_factory.mktemp("quantised")
    made = make(tiny_model, folder, kind)
    shim = plugins.write(folder, "cpu_shim", plugins.CPU_SHIM)
    ours = ["--quantization", "mixquant", "--mixquant-recipe"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    prompts = [tokenizer(text)["input_ids"][:LENGTH] for text in TEXTS]
    if kind.endswith("experts"):
        prompts = [[token % tiny_models.TEXT["vocab_size"] for token in prompt] for prompt in prompts]
    env = {"MIXQUANT_MIN_TOKENS": ""}  # no recipe that keeps one copy takes one
    flags = [*FLAGS, *(["--skip-tokenizer-init"] if kind.endswith("experts") else [])]
    with ExitStack() as running:
        compact = Server(made.compact, folder, "compact", *flags, *ours, made.recipe, env=env)
        running.callback(compact.__exit__)
        stock = Server(made.plain, folder, "stock", *flags, env={"SGLANG_PLUGINS": "cpu_shim"}, pythonpath=[shim])
        running.callback(stock.__exit__)
        packs = None
        if made.packs:
            kept = env if made.packs.endswith(".yaml") else {"MIXQUANT_MIN_TOKENS": "1"}
            packs = Server(made.plain, folder, "packs", *flags, *ours, made.packs, env=kept)
            running.callback(packs.__exit__)
        for server in filter(None, (compact, stock, packs)):
            server.wait()
        yield Served(kind, compact, stock, packs, prompts)


@dataclass(frozen=True)
class Step:
    token: int
    top: dict[int, float]  # the likeliest tokens' logprobs

    def admits(self, other: Step) -> bool:
        """Whether ``other`` may be beside this one, the reference."""
        return other.token == self.token or self.top[self.token] - self.top.get(other.token, -1e9) <= TIE


def steps(answer: dict[str, Any]) -> list[Step]:
    found = zip(answer["output_ids"], answer["meta_info"]["output_top_logprobs"], strict=True)
    return [Step(token, {entry[1]: entry[0] for entry in top}) for token, top in found]


def ask(server: Server, prompts: Any, new: int) -> Any:
    return server.generate(prompts, new, return_logprob=True, top_logprobs_num=5)


def fed(server: Server, prompt: list[int]) -> list[Step]:
    """What comes next behind each token of ``prompt``, which go in one by one."""
    found = []
    for end in range(1, len(prompt) + 1):
        answer = ask(server, prompt[:end], 1)
        assert end == 1 or answer["meta_info"]["cached_tokens"] == end - 1, "more than one row went in"
        found += steps(answer)
    return found


def compared(what: str, reference: list[Step], other: list[Step]) -> int:
    """How many tokens are others; each must be nearly as likely."""
    assert len(reference) == len(other)
    parted = [(want, got) for want, got in zip(reference, other, strict=True) if want.token != got.token]
    off = [abs(a.top[a.token] - b.top[a.token]) for a, b in zip(reference, other, strict=True) if a.token in b.top]
    print(f"{what}: {len(parted)} of {len(other)} tokens are others; logprobs off by at most {max(off):.3f}")
    for want, got in parted:
        assert want.admits(got), (what, want, got)
    assert max(off) <= TIE
    return len(parted)


def until_parted(reference: list[Step], other: list[Step]) -> list[Step]:
    """The reference up to and with the first token that is another: what follows has other tokens before it."""
    same = [want.token == got.token for want, got in zip(reference, other, strict=True)]
    return reference[: same.index(False) + 1] if False in same else reference


def continued(what: str, reference: Server, other: Server, prompts: list[list[int]]) -> int:
    """Compares ``NEW`` tokens behind each prompt, all prompts in one batch: decode graphs of several rows."""
    count = 0
    for want, got in zip(ask(reference, prompts, NEW), ask(other, prompts, NEW), strict=True):
        wanted = until_parted(steps(want), steps(got))
        count += compared(what, wanted, steps(got)[: len(wanted)])
    return count


def test_tokens_are_stocks_with_the_same_weights(served: Served) -> None:
    low, stock = served.compact, served.stock
    for server in (low, stock):
        server.flush()
    parted = 0
    with Counted(low) as counted:
        for i, prompt in enumerate(served.prompts):
            parted += compared(f"{served.kind}, prompt {i}", fed(stock, prompt), fed(low, prompt))
        parted += continued(f"{served.kind}, behind it", stock, low, served.prompts)
    # the last token of a prompt that is cached whole goes in again
    rows = sum(map(len, served.prompts)) + len(served.prompts)
    assert {p: n for p, n in counted.rows.items() if n} == {served.decode: rows}
    assert counted.decode.keys() == {served.decode} and counted.decode[served.decode] >= len(TEXTS) * (NEW - 1)
    total = sum(map(len, served.prompts)) + NEW * len(served.prompts)
    assert parted <= total // 10, f"{parted} of {total} tokens are others: no rounding of BF16"


def test_whole_prompts_are_those_of_weights_packed_here(served: Served) -> None:
    low = served.compact
    for server in filter(None, (low, served.packs)):
        server.flush()
    with Counted(low) as counted:
        answers = [ask(low, prompt, NEW) for prompt in served.prompts]
    rows = sum(map(len, served.prompts))
    assert counted.rows == {served.low: rows - len(answers), served.decode: len(answers)}
    assert {p for p, n in counted.decode.items() if n} == {served.decode}
    assert len({step.token for answer in answers for step in steps(answer)}) > 8, "a model that repeats one token"
    if served.packs is None:
        return  # no recipe of ours packs to these numbers
    parted = 0
    for i, (prompt, answer) in enumerate(zip(served.prompts, answers, strict=True)):
        want, got = steps(ask(served.packs, prompt, NEW)), steps(answer)
        wanted = until_parted(want, got)
        parted += compared(f"{served.kind}, whole prompt {i}", wanted, got[: len(wanted)])
    assert parted <= len(answers) // 2


def test_one_copy_is_held_and_said(served: Served) -> None:
    state = served.compact.state()
    words = {"fp8": "FP8", "nvfp4": "NVFP4"}[served.low] + " weights, BF16 activations"
    assert state["generated_from"] == words
    assert state["roles"]["decode"]["linear"] == state["roles"]["protected"]["linear"] == served.decode
    # of FP8 blocks a third stays BF16, by the rule
    most = {"fp8": 0.56, "nvfp4": 0.34}[served.low] if served.kind != "fp8 blocks" else 0.7
    assert state["linear_weight_bytes"] < most * state["bf16_linear_bytes"]
    if served.kind.endswith("experts"):
        assert state["experts"] == {served.low: 2}
        assert state["roles"]["decode"]["experts"] == state["roles"]["protected"]["experts"] == served.decode
