"""An image in a chat request, on real servers: stock SGLang, recipe bf16 and the default recipe, side by side.

What a family makes of an image is in ``tests/sglang/test_families.py``; this is the way from a PNG to the first row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import plugins, vision_model
from tests.support.server import Server
from tests.support.servers import CHUNK, FLAGS

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]

# Pictures of a prompt: a seed, width and height.  Each 32 x 32 pixels are a token; "large" does not fit one chunk.
PROMPTS: dict[str, list[tuple[int, int, int]]] = {
    "text": [],
    "image": [(1, 96, 64)],
    "other image": [(2, 96, 64)],
    "two images": [(1, 96, 64), (2, 64, 64)],
    "large": [(3, 256, 256), (1, 128, 256)],
}
TOKENS = 8
# The fast processor asks for a GPU; overlapped, a decode step more may run, and be counted, than has tokens to give.
SERVED = [*FLAGS, "--disable-fast-image-processor", "--disable-overlap-schedule"]


@pytest.fixture(scope="module")
def servers(tiny_model: Path, logs: Path) -> Iterator[dict[str, Server]]:
    folder = logs / "images"
    model = vision_model.make(folder, tiny_model)
    shim = plugins.write(folder, "cpu_shim", plugins.CPU_SHIM)
    mixquant = [*SERVED, "--quantization", "mixquant"]
    stock: dict[str, Any] = {"env": {"SGLANG_PLUGINS": "cpu_shim"}, "pythonpath": [shim]}
    with ExitStack() as running:
        started = {
            "stock": Server(model, folder, "stock", *SERVED, **stock),
            "control": Server(model, folder, "control", *mixquant, "--mixquant-recipe", "bf16"),
            "low": Server(model, folder, "low", *mixquant),
        }
        for server in started.values():
            running.callback(server.__exit__)
        for server in started.values():
            server.wait()
        yield started


def ask(server: Server, images: list[tuple[int, int, int]], **more: Any) -> dict[str, Any]:
    """Tokens with their log probabilities, and the usage."""
    shown = [{"type": "image_url", "image_url": {"url": vision_model.picture(*image)}} for image in images]
    content = [*shown, {"type": "text", "text": "What does the picture show? " * 8}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0}
    answer = server.post("/v1/chat/completions", {**body, "ignore_eos": True, "logprobs": True, **more})
    said = [(token["token"], token["logprob"]) for token in answer["choices"][0]["logprobs"]["content"]]
    return {"said": said, **answer["usage"]}


def counted(server: Server) -> dict[str, int]:
    """Tokens so far, by phase and precision, and the protected rows."""
    state = server.state()
    tokens = {f"{phase} {name}": n for phase, names in state["tokens"].items() for name, n in names.items()}
    return {**tokens, "protected": state["protected_rows"]}


@pytest.mark.parametrize("name", PROMPTS)
def test_recipe_bf16_is_stock_with_images(servers: dict[str, Server], name: str) -> None:
    for server in ("stock", "control"):
        servers[server].flush()
    stock, control = (ask(servers[server], PROMPTS[name]) for server in ("stock", "control"))
    assert stock["said"] == control["said"] and len(stock["said"]) == TOKENS
    assert stock["prompt_tokens"] == control["prompt_tokens"]


def test_the_image_is_read(servers: dict[str, Server]) -> None:
    for server in servers.values():
        said = {name: ask(server, images)["said"][0] for name, images in PROMPTS.items()}
        assert len(set(said.values())) == len(PROMPTS), said


@pytest.mark.parametrize("name", PROMPTS)
def test_image_rows_are_rows_of_the_prompt(servers: dict[str, Server], name: str) -> None:
    """And two tokens stand around each image.  The last row of the prompt is protected."""
    low = servers["low"]
    low.flush()
    text = ask(servers["stock"], [])["prompt_tokens"]
    before = counted(low)
    answer = ask(low, PROMPTS[name])
    after = counted(low)
    assert answer["prompt_tokens"] == text + sum(2 + width * height // 32**2 for _, width, height in PROMPTS[name])
    assert (answer["prompt_tokens"] > CHUNK) == (name == "large")
    moved = {what: n - before.get(what, 0) for what, n in after.items() if n != before.get(what, 0)}
    precision = low.state()["precision"]["prefill"]
    assert moved == {
        **{f"prefill {precision}": answer["prompt_tokens"] - 1, "prefill bf16": 1, "protected": 1},
        "decode bf16": TOKENS - 1,
    }


def test_a_request_that_asks_for_bf16_prefill_is_stocks(servers: dict[str, Server]) -> None:
    low, policy = servers["low"], {"custom_params": {"mixquant": {"prefill": "bf16"}}}
    low.flush()
    servers["stock"].flush()
    image = PROMPTS["image"]
    stock, asked, usual = ask(servers["stock"], image), ask(low, image, **policy), ask(low, image)
    assert asked["said"] == stock["said"] != usual["said"]


def test_what_is_said_of_the_tower(servers: dict[str, Server]) -> None:
    state = servers["low"].state()
    assert "unproven" not in state and any("outside" in why for why in state["stays_bf16"]), state["stays_bf16"]
