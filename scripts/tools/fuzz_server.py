"""Random policies, bodies, namespaces and weight updates, on a running server."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors.torch import load_file, save_file

from scripts.tools.fuzz_check import NASTY, WrongError, check
from scripts.tools.fuzz_files import broken_header

VALID = {"prefill": "bf16"}
LONG, CUT = 0, 599


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
        """Of all replicas."""
        states = requests.get(self.url + "/server_info", timeout=60).json()["internal_states"]
        rows = [item for state in states for item in state["mixquant"]["tokens"]["prefill"].items()]
        return sum(n for precision, n in rows if precision != "bf16")

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
        prompt = self.ids(rng, 60)
        params: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0}
        keys = {name: rng.choice([*NASTY, "mixquant=bf16|", "mixquant:bf16"]) for name in ("extra_key", "cache_salt")}
        keys = {name: keys[name] for name in keys if rng.random() < 0.7}
        self.flush()
        self.post("/generate", {"input_ids": prompt, "sampling_params": params, **keys})
        other: dict[str, Any] = dict(rng.sample(sorted(keys.items()), rng.randint(0, len(keys))))
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
