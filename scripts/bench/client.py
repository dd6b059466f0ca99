"""A streamed request to /generate, token ids in and out, and when each chunk came."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import aiohttp
import orjson

Reads = list[tuple[float, bytes]]
BUSY = (429, 503)  # statuses of a full queue


class Refused(RuntimeError):
    """The server was too busy to begin with the request."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times in seconds.  ``gaps``: from chunk to chunk, with the tokens of the later one."""

    ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    ttft: float
    latency: float
    gaps: list[tuple[float, int]]


@dataclass(frozen=True)
class Response:
    """What came of a request: the HTTP status, and what was read and when."""

    status: int
    reads: Reads


def encode(ids: list[int]) -> bytes:
    """Token ids as JSON without brackets."""
    return ",".join(map(str, ids)).encode()


def read_stream(began: float, reads: Reads) -> Answer:
    """The answer in what was read from /generate with ``stream``, and when.

    ``output_ids`` are all tokens so far, or the new ones with --incremental-streaming-output; the count of tokens in
    ``meta_info`` tells which.  (All so far may be more than counted: SGLang sends a list that goes on growing.)
    Raises Refused, or RuntimeError, where the server says that it gave up.
    """
    ids: list[int] = []
    gaps: list[tuple[float, int]] = []
    first = last = 0.0
    meta: dict[str, int] = {}
    rest = b""
    for when, data in reads:
        *events, rest = (rest + data).split(b"\n\n")
        known = len(ids)
        for event in events:
            if event == b"data: [DONE]":
                continue
            out = orjson.loads(event.removeprefix(b"data: "))
            if "error" in out:
                busy = out["error"].get("code") in BUSY and not ids
                raise (Refused if busy else RuntimeError)(f"the server answered: {out['error']['message']}")
            finish = out["meta_info"].get("finish_reason") or {}
            if finish.get("type") == "abort":
                busy = finish.get("status_code") in BUSY and not ids
                raise (Refused if busy else RuntimeError)(f"the server aborted: {finish.get('message')}")
            meta = out["meta_info"]
            ids[max(0, meta["completion_tokens"] - len(out["output_ids"])) :] = out["output_ids"]
        new = len(ids) - known
        if not new:
            continue
        if known:
            gaps.append((when - last, new))
        else:
            first = when
        last = when
    if not ids:
        raise RuntimeError("the server answered without a token")
    return Answer(ids, meta["prompt_tokens"], meta["cached_tokens"], first - began, last - began, gaps)


async def send(session: aiohttp.ClientSession, url: str, prompt: bytes, tokens: int) -> Response:
    """While it streams nothing is done but noting what came when, so that requests do not delay each other."""
    params = orjson.dumps({"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True})
    body = b'{"stream":true,"sampling_params":%b,"input_ids":[%b]}' % (params, prompt)
    reads: Reads = []
    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
        async for data in response.content.iter_any():
            reads.append((time.perf_counter(), data))
    return Response(response.status, reads)


def answer_of(response: Response, began: float, tokens: int) -> Answer:
    """The whole answer, of ``tokens`` tokens; anything else raises Refused or RuntimeError."""
    if response.status != 200:
        said = b"".join(data for _, data in response.reads)[:500]
        kind = Refused if response.status in BUSY else RuntimeError
        raise kind(f"the server answered {response.status}: {said!r}")
    try:
        answer = read_stream(began, response.reads)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"the server's stream is none of SGLang's: {error!r}") from None
    if len(answer.ids) != tokens:
        raise RuntimeError(f"the server generated {len(answer.ids)} tokens, not {tokens}")
    return answer


async def ask(session: aiohttp.ClientSession, url: str, prompt: bytes, tokens: int) -> Answer:
    began = time.perf_counter()
    return answer_of(await send(session, url, prompt, tokens), began, tokens)


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
