"""Random recipes and checkpoint headers, in this process."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.weights.ready_made import ReadyMadeWeights
from scripts.tools.fuzz_check import NASTY, check, one_line

DEVICES = [Device("a CPU", None), Device("A100", (8, 0)), Device("H200", (9, 0)), Device("B200", (10, 0))]
EVERYTHING = """version: 1
description: all keys
prefill: {precision: auto, min_tokens: 3, fuse: true}
decode: {precision: bf16}
protect: {last_prompt_token: true, last_prompt_tokens: 2}
kernel: auto
verify: true
weights: {scales: search}
layers:
  - {match: 're:.*\\.(qkv|o)_proj', prefill: fp8}
  - {match: model.layers.0.mlp.down_proj, prefill: bf16, decode: bf16, optional: true}
"""


def mutated(rng: random.Random, text: str) -> str:
    """One to four edits of characters, words or lines."""
    for _ in range(rng.randint(1, 4)):
        lines, at = text.split("\n"), rng.randrange(len(text) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:at] + chr(rng.choice([*range(32, 127), 0, 9, 0x2028, 0xE9])) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 6) :]
        elif kind == 2:
            del lines[rng.randrange(len(lines))]
            text = "\n".join(lines)
        elif kind == 3:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
        elif kind == 4:
            words = [
                "auto",
                "bf16",
                "fp8",
                "nvfp4",
                "true",
                "false",
                "1",
                "-1",
                "1e9",
                "null",
                "[]",
                "{}",
                "yes",
                "012",
            ]
            parts = text.split(" ")
            parts[rng.randrange(len(parts))] = rng.choice(words)
            text = " ".join(parts)
        elif kind == 5:
            text = text.replace(
                *rng.choice([(":", ""), ("{", "["), ("'", '"'), ("prefill", "decode"), ("re:", "re:(")])
            )
        else:
            text = text[:at] + rng.choice(NASTY) + text[at:]
    return text


def recipes(rng: random.Random, folder: Path) -> str:
    texts = [EVERYTHING, *(p.read_text() for p in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")))]
    file = folder / "recipe.yaml"
    file.write_text(mutated(rng, rng.choice(texts)), encoding="utf-8", errors="surrogatepass")
    try:
        loaded = recipe.load(str(file))
    except MixQuantError as error:
        one_line(error)
        return "refused"
    again = folder / "again.yaml"
    again.write_text(loaded.to_yaml(), encoding="utf-8")
    check(recipe.load(str(again)).to_yaml() == loaded.to_yaml(), "to_yaml does not survive a round trip")
    for device in DEVICES:
        try:
            select(loaded, device)
        except MixQuantError as error:
            one_line(error)
    return "taken"


def small_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    made = {f"model.layers.0.mlp.{n}_proj.weight": torch.randn(32, 32).bfloat16() for n in ("gate", "up", "down")}
    made["model.embed_tokens.weight"] = torch.randn(64, 32).bfloat16()
    folder.mkdir()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def broken_header(rng: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    kind = rng.randrange(5)
    if kind == 0:  # one flipped bit
        data[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**40, 2**63]))
    else:
        header = json.loads(data[8 : 8 + size])
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        junk: list[Any] = [None, -1, "x", [], {}, [2**70], [-32, 32], [32.0, 32], "BF16", "F64", [0, 1], True]
        entry[rng.choice(["dtype", "shape", "data_offsets", "extra"])] = rng.choice(junk)
        head = json.dumps(header).encode()
        data[: 8 + size] = struct.pack("<Q", len(head)) + head
    file.write_bytes(bytes(data))


def headers(rng: random.Random, folder: Path) -> str:
    model, out = small_checkpoint(folder / "m"), folder / "out"
    ready = rng.random() < 0.4
    if ready:
        quantize_checkpoint(model, out)
        model = out
    broken_header(rng, model / "model.safetensors")
    try:
        if ready:
            ReadyMadeWeights.open(str(model), "recipe.yaml:2 prefill.weights")
            return "ready-made taken"
        quantize_checkpoint(model, out)
    except MixQuantError as error:
        one_line(error)
        return "refused"
    with safe_open(model / "model.safetensors", "pt") as file:  # a flipped bit may have renamed one
        names = set(file.keys())
    written = {name.replace("weight_packed", "weight") for name in load_file(out / "model.safetensors")}
    check(names <= written, f"lost {sorted(names - written)}")
    return "taken"
