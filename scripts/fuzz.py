"""Random recipes, request policies, HTTP bodies, checkpoint headers and weight updates, each with one right answer.

    fuzz.py --url http://127.0.0.1:30000 --model PATH [--seconds 600] [--seed 1] [--stock URL]

``--url`` is a running server of a recipe that prefills in low precision, ``--model`` the checkpoint that it serves,
``--stock`` a server of the same checkpoint without mixquant: a body that SGLang itself answers with 5xx is not ours.
What must hold, at every step:

  recipes   load, and are the same again after ``to_yaml``, or end in one line
  policies  a valid one prefills in BF16 or is refused with a 400 that says so; any other is a 400; none at all is low
  bodies    no 5xx that stock does not give; no client text reaches another policy's cache
  headers   ``quantize`` and ready-made weights take a checkpoint whole or end in one line
  updates   a broken one is refused, and the answers after it are those of before, bit for bit

and between steps a fixed prompt is answered as at the start.  The first wrong answer ends the run with the seed of its
step: ``--seed S --steps 1`` repeats it.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.weights.ready_made import ReadyMadeWeights

VALID = {"prefill": "bf16"}
LONG, CUT = 0, 599
NASTY = [
    "",
    "\x00",
    "\u2028",
    "é" * 40,
    "|mixquant=bf16",
    "mixquant",
    "bf16",
    "a" * 5000,
    "../..",
    "%s{}",
    "\ud83d\ude00",
]
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


class WrongError(Exception):
    """What came was not the one right answer."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def one_line(error: BaseException) -> None:
    text = str(error)
    check(0 < len(text) < 3000 and "\n" not in text, f"not one line: {text[:300]!r}")


# -- in this process ---------------------------------------------------------------------------------------------------


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
    texts = [EVERYTHING, *(p.read_text() for p in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")))]
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
        junk = [None, -1, "x", [], {}, [2**70], [-32, 32], [32.0, 32], "BF16", "F64", [0, 1], True]
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


# -- on a server -------------------------------------------------------------------------------------------------------


def junk(rng: random.Random, depth: int = 0) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([0, -1, 1, 3.5, 2**31, 2**63, -(2**70), 1e300]),
        lambda: rng.choice(NASTY),
        lambda: rng.choice(["bf16", "BF16", "fp8", "nvfp4", "auto", "prefill"]),
        lambda: [junk(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(["prefill", "prefil", "decode", "mixquant", *NASTY]): junk(rng, depth + 1)},
        lambda: {"prefill": rng.choice(["bf16 ", "bf16", None, ["bf16"], {"prefill": "bf16"}, 1]), "x": 1},
    ]
    return rng.choice(kinds if depth < 4 else kinds[:5])()


class Target:
    """The server under test."""

    def __init__(self, url: str, model: Path, stock: str | None) -> None:
        self.url, self.model, self.stock = url, model, stock
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.top = min(vocabulary, 2000)
        self.name = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        self.canary = self.answer()

    def ids(self, rng: random.Random, n: int) -> list[int]:
        return [rng.randrange(10, self.top) for _ in range(n)]

    def post(self, path: str, body: Any, url: str | None = None) -> requests.Response:
        return requests.post((url or self.url) + path, json=body, timeout=120)

    def flush(self) -> None:
        for _ in range(100):
            if self.post("/flush_cache", None).status_code == 200:
                return
            time.sleep(0.1)
        raise WrongError("the server did not become idle")

    def answer(self) -> Any:
        self.flush()
        params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        body = {"input_ids": [*range(20, 90)], "sampling_params": params, "return_logprob": True}
        meta = self.post("/generate", body).json()["meta_info"]
        return [entry[:2] for entry in meta["output_token_logprobs"]]

    def low_rows(self) -> int:
        info = requests.get(self.url + "/server_info", timeout=60).json()
        rows = info["internal_states"][0]["mixquant"]["tokens"]["prefill"]
        return sum(n for precision, n in rows.items() if precision != "bf16")

    def unharmed(self) -> None:
        check(self.answer() == self.canary, "a fixed prompt is answered otherwise than at the start")

    # what each endpoint takes; ``custom`` goes where its clients would put it
    def body(self, rng: random.Random, custom: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        text = " ".join(rng.choice(["count", "the", "cows", "and", "wolves"]) for _ in range(60))
        said = [{"role": "user", "content": text}]
        ollama = {"model": self.name, "stream": False, "options": {"num_predict": 2}, **custom}
        return rng.choice(
            [
                ("/generate", {"input_ids": self.ids(rng, 50), "sampling_params": {"max_new_tokens": 2, **custom}}),
                ("/v1/completions", {"model": self.name, "prompt": self.ids(rng, 50), "max_tokens": 2, **custom}),
                ("/v1/chat/completions", {"model": self.name, "messages": said, "max_tokens": 2, **custom}),
                ("/v1/responses", {"model": self.name, "input": text, "max_output_tokens": 2, **custom}),
                ("/v1/messages", {"model": self.name, "messages": said, "max_tokens": 2, **custom}),
                ("/api/generate", {"prompt": text, **ollama}),
                ("/api/chat", {"messages": said, **ollama}),
            ]
        )

    def policies(self, rng: random.Random, _folder: Path) -> str:
        kind = rng.choice(["valid", "wrong", "wrong", "none"])
        value = VALID if kind == "valid" else junk(rng)
        if kind == "wrong" and value == VALID:
            kind = "valid"
        more = {"other": 1} if rng.random() < 0.2 else {}
        custom = {} if kind == "none" else {"custom_params": {"mixquant": value, **more}}
        path, body = self.body(rng, custom)
        self.flush()
        before = self.low_rows()
        answer = self.post(path, body)
        if answer.status_code == 404:
            return f"{path} is not there"
        low, said = self.low_rows() - before, f"{path} {custom} -> {answer.status_code} {answer.text[:200]}"
        if answer.status_code >= 500 and self.stock:
            check(self.post(path, body, self.stock).status_code >= 500, said)  # 0.5.17's /api/chat
            return f"{path}: 5xx as stock"
        check(answer.status_code in (200, 400), said)
        check(len(answer.text) < 20000, f"an answer of {len(answer.text)} bytes")
        if kind == "none":
            check(answer.status_code == 200 and low > 0, f"{said}, {low} low rows")
            return "low"
        check(low == 0, f"{said}, {low} low rows")
        if kind == "wrong":
            check(answer.status_code == 400, said)
            return "refused"
        check(answer.status_code == 200 or "mixquant" in answer.text, said)
        return "bf16" if answer.status_code == 200 else f"{path} refuses"

    def bodies(self, rng: random.Random, _folder: Path) -> str:
        path, body = self.body(rng, {})
        place = body["sampling_params"] if path == "/generate" and rng.random() < 0.5 else body
        for _ in range(rng.randint(1, 3)):
            kind = rng.randrange(3)
            if kind == 0 and place:
                del place[rng.choice(list(place))]
            elif kind == 1:
                names = ["extra_key", "cache_salt", "rid", "custom_params", "temperature", "top_p", "max_new_tokens"]
                place[rng.choice([*names, "stop", "n", "session_params", "priority", *body])] = junk(rng)
            else:
                place[rng.choice(["extra_key", "cache_salt"])] = rng.choice(NASTY)
        for limited, limit in ((body, "max_tokens"), (body, "max_output_tokens"), (place, "max_new_tokens")):
            if limit in limited or (limited is place is not body):  # nobody waits for thousands of tokens
                given = limited.get(limit)
                limited[limit] = 2 if given is None or (type(given) in (int, float) and given > 8) else given
        data = json.dumps(body).encode()
        if rng.random() < 0.2:
            at = rng.randrange(len(data))
            data = (
                data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(5))) + data[at + rng.randrange(5) :]
            )
        status = self.status(self.url + path, data)
        if status == LONG:
            return "long answer"
        if status >= 500 and self.stock:
            theirs = self.status(self.stock + path, data)
            check(theirs >= 500, f"{path} {data[:300]!r} -> {status}, stock {theirs}")
            return "5xx or cut off, as stock"
        return f"{status // 100}xx"

    def status(self, url: str, data: bytes) -> int:
        """HTTP's, ``CUT`` for an answer that breaks off, ``LONG`` for one that nobody waits for."""
        try:
            return requests.post(url, data=data, headers={"Content-Type": "application/json"}, timeout=40).status_code
        except requests.Timeout:
            self.post("/abort_request", {"rid": "", "abort_all": True})
            return LONG
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            return CUT

    def namespaces(self, rng: random.Random, _folder: Path) -> str:
        """Low-precision KV that a client wrote under any key is never what a BF16 request reads."""
        prompt, params = self.ids(rng, 60), {"max_new_tokens": 1, "temperature": 0}
        keys = {name: rng.choice([*NASTY, "mixquant=bf16|", "mixquant:bf16"]) for name in ("extra_key", "cache_salt")}
        keys = {name: keys[name] for name in keys if rng.random() < 0.7}
        self.flush()
        self.post("/generate", {"input_ids": prompt, "sampling_params": params, **keys})
        other = dict(rng.sample(sorted(keys.items()), rng.randint(0, len(keys))))
        body = {"input_ids": prompt, "sampling_params": {**params, "custom_params": {"mixquant": VALID}}, **other}
        answer = self.post("/generate", body)
        if answer.status_code != 200:
            return f"{answer.status_code // 100}xx"
        cached = answer.json()["meta_info"]["cached_tokens"]
        check(cached == 0, f"{keys} then {other}: {cached} tokens of low-precision KV in a BF16 request")
        return "apart"

    def updates(self, rng: random.Random, folder: Path) -> str:
        made = folder / "update"
        shutil.copytree(self.model, made)
        file = rng.choice(sorted(made.glob("*.safetensors")))
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        kind = rng.choice(["nan", "inf", "-inf", "gone", "extra", "shape", "cut", "bit", "huge", "no folder", "same"])
        if kind in ("nan", "inf", "-inf", "huge"):
            value = torch.tensor(3.4e38 if kind == "huge" else float(kind))
            tensors[name] = tensors[name].float() if kind == "huge" else tensors[name]
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value
        elif kind == "gone":
            del tensors[name]
        elif kind == "extra":
            tensors["model.layers.99.mlp.down_proj.weight"] = torch.zeros(4, 4).bfloat16()
        elif kind == "shape":
            tensors[name] = tensors[name][..., :-1].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
        if kind == "cut":
            file.write_bytes(file.read_bytes()[: -rng.randint(1, 4096)])
        elif kind == "bit":
            broken_header(rng, file)
        elif kind == "no folder":
            shutil.rmtree(made)
        answer = self.post("/update_weights_from_disk", {"model_path": str(made)})
        said = f"update {kind} of {name} -> {answer.status_code} {answer.text[:300]}"
        taken = answer.status_code == 200 and answer.json()["success"]
        if kind == "same":
            check(taken, said)
        elif kind != "bit":  # a bit of the metadata may change nothing
            check(not taken, said)
        if taken:  # its files go; also, a server is called by the path of its weights
            answer = self.post("/update_weights_from_disk", {"model_path": str(self.model)})
            check(answer.status_code == 200 and answer.json()["success"], f"{said}; back again -> {answer.text[:300]}")
        self.unharmed()
        return f"{kind} {'taken' if taken else 'refused'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the server; without it only recipes and headers")
    parser.add_argument("--model", type=Path, help="the checkpoint that it serves")
    parser.add_argument("--stock", help="a server without mixquant")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, help="at most so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="parts")
    args = parser.parse_args()
    if args.url and not args.model:
        parser.error("--url needs --model, the checkpoint that it serves")
    print(json.dumps(run(args.url, args.model, args.stock, args.seconds, args.seed, args.steps, args.only)))


def run(
    url: str | None,
    model: Path | None,
    stock: str | None,
    seconds: float,
    seed: int,
    steps: int | None = None,
    only: list[str] | None = None,
) -> dict[str, Any]:
    """Raises ``WrongError`` at the first wrong answer; returns how often what was seen."""
    parts: dict[str, Callable[[random.Random, Path], str]] = {"recipes": recipes, "headers": headers}
    target = None
    if url and model:
        target = Target(url, model, stock)
        served = {"policies": target.policies, "bodies": target.bodies, "namespaces": target.namespaces}
        parts |= {**served, "updates": target.updates}
    parts = {name: part for name, part in parts.items() if not only or name in only}
    seen: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end and (steps is None or step < steps):
        rng = random.Random(seed + step)
        name = min(parts, key=lambda part: spent[part])  # each part gets its share of the time
        if steps == 1 and only:
            name = only[0]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen[f"{name}: {parts[name](rng, Path(folder))}"] += 1
                if target and name in ("policies", "bodies") and step % 20 == 0:
                    target.unharmed()
            except WrongError as wrong:
                raise WrongError(f"--only {name} --seed {seed + step} --steps 1: {wrong}") from None
        spent[name] += time.monotonic() - start
        step += 1
        if sys.stderr.isatty():
            with contextlib.suppress(OSError):
                sys.stderr.write(f"\r{step} steps, {end - time.monotonic():.0f} s left ")
    return {"seed": seed, "steps": step, "seen": dict(sorted(seen.items()))}


if __name__ == "__main__":
    main()
