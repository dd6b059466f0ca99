"""Agents: conversations over every way in, each answer judged, some of them cut on the way."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scripts.load.books import MALFORMED, RIGHT, WRONG, Books, Request
from scripts.load.client import Client, Reply, chat_body, generate_body
from scripts.load.judge import Asked, Windows, judge
from scripts.load.malformed import MALFORMED as BODIES
from scripts.load.malformed import verdict
from scripts.load.problems import Agent, Question, first, prompt, user
from scripts.load.target import Target

WAYS = ("chat", "generate")
BF16_SHARE, MALFORMED_SHARE, WALK_SHARE = 0.2, 0.1, 0.35


@dataclass(frozen=True)
class Mix:
    """Of a round: the share of requests that each cut takes, whether there are malformed bodies, and sessions."""

    cuts: Mapping[str, float] = field(default_factory=dict)
    malformed: bool = False
    sessions: tuple[bool, ...] = ()  # of these kinds: streaming or not


class Play:
    """What agents and the operator share."""

    def __init__(self, client: Client, target: Target, agents: Sequence[Agent], books: Books, seed: int) -> None:
        self.client, self.target, self.agents, self.books = client, target, list(agents), books
        self.windows = Windows()
        self.seed = seed
        self._rids = itertools.count()

    def rid(self) -> str:
        """Of equal length: SGLang aborts whatever begins with what it is given."""
        return f"soak{self.seed:06d}-{next(self._rids):08d}"

    # -- one request ---

    async def ask(
        self,
        rng: random.Random,
        way: str,
        turns: list[tuple[str, str]],
        text: str,
        question: Question,
        bf16: bool,
        cut: str,
    ) -> Request:
        rid, stream = self.rid(), rng.random() < 0.5
        rendered = prompt(turns, text)
        if way == "chat":
            path, body = "/v1/chat/completions", chat_body(turns, text, question.tokens, bf16=bf16, rid=rid)
        else:
            path, body = "/generate", generate_body(rendered, question.tokens, bf16=bf16, rid=rid)
        asked = Asked(question, bf16, cut, len(rendered))
        delay = rng.choice((0.02, 0.1, 0.3, 1.0)) * rng.random()
        if cut == "abort":
            sent = asyncio.create_task(self.client.ask(path, body, stream=stream))
            await asyncio.sleep(delay)
            for side in self.target.sides:
                await self.client.post(side.url + "/abort_request", {"rid": rid})
            reply = await sent
        elif cut == "close":
            reply = await self.client.ask(path, body, stream=True, cut_after=rng.randint(1, question.tokens // 3))
        elif cut == "leave":
            reply = await self.client.leave(path, body, delay)
        else:
            reply = await self.client.ask(path, body, stream=stream)
        return self.enter(asked, reply)

    def enter(self, asked: Asked, reply: Reply) -> Request:
        if asked.cut:
            self.books.faults[asked.cut] += 1
        request = judge(asked, reply, self.windows, self.agents)
        self.books.enter(request)
        return request

    # -- conversations ---

    async def agent(self, number: int, round_number: int, until: float, mix: Mix) -> None:
        rng = random.Random(f"{self.seed} {round_number} {number}")
        while time.monotonic() < until:
            if mix.malformed and rng.random() < MALFORMED_SHARE:
                await self.malformed(rng)
            elif mix.sessions and rng.random() < 0.25:
                await self.session(rng, rng.choice(mix.sessions))
            else:
                await self.conversation(rng, mix)

    async def conversation(self, rng: random.Random, mix: Mix) -> None:
        who, way, bf16 = rng.choice(self.agents), rng.choice(WAYS), rng.random() < BF16_SHARE
        walk = rng.random() < WALK_SHARE
        questions = [who.walk] if walk else rng.sample(who.asks, rng.randint(1, min(4, len(who.asks))))
        turns: list[tuple[str, str]] = []
        for question in questions:
            cut = next((name for name, share in mix.cuts.items() if rng.random() < share), "")
            text = question.text if turns else first(who, question)
            request = await self.ask(rng, way, turns, text, question, bf16, cut)
            if request.end != RIGHT:
                await asyncio.sleep(0.5)  # a server that is down is not asked as fast as it refuses
                return
            turns.append((text, question.right))

    async def session(self, rng: random.Random, streaming: bool) -> None:
        """Turns of a session hold what is new; SGLang knows the rest."""
        body = {"capacity_of_str_len": 20000, "streaming": streaming}
        status, answer = await self.client.post(self.target.url + "/open_session", body)
        if status != 200:
            self.books.enter(Request(WRONG, detail=f"/open_session: {status} {answer[:300]}"))
            return
        self.books.faults["streaming session" if streaming else "session"] += 1
        name, who, bf16 = answer.strip().strip('"'), rng.choice(self.agents), rng.random() < BF16_SHARE
        turns: list[tuple[str, str]] = []
        rid = None
        for question in rng.sample(who.asks, min(3, len(who.asks))):
            text = question.text if turns else first(who, question)
            session = {"id": name} if rid is None or streaming else {"id": name, "rid": rid}
            rid = self.rid()
            sent = ("\n" if turns else "") + user(text)
            sent_body = generate_body(sent, question.tokens, bf16=bf16, rid=rid, session=session)
            reply = await self.client.ask("/generate", sent_body, stream=rng.random() < 0.5)
            request = self.enter(Asked(question, bf16, "", len(prompt(turns, text))), reply)
            if request.end != RIGHT:
                break
            turns.append((text, question.right))
        status, answer = await self.client.post(self.target.url + "/close_session", {"session_id": name})
        if status != 200:
            self.books.enter(Request(WRONG, detail=f"/close_session: {status} {answer[:300]}"))

    async def malformed(self, rng: random.Random) -> None:
        sent = rng.choice(BODIES)
        self.books.faults["malformed"] += 1
        status, text = await self.client.post(self.target.url + sent.path, raw=sent.body)
        wrong = verdict(sent, status, text, router=self.target.pair)
        self.books.enter(Request(WRONG, detail=wrong) if wrong else Request(MALFORMED))

    # -- beforehand ---

    async def alone(self, question: Question, text: str, bf16: bool) -> tuple[Request, float]:
        """Asked on a server that does nothing else; the least lead of a first token over the second, in nats."""
        body = generate_body(prompt([], text), question.tokens, bf16=bf16)
        body |= {"return_logprob": True, "top_logprobs_num": 2}
        sent = time.monotonic()
        status, answer = await self.client.post(self.target.url + "/generate", body, timeout=240)
        reply = Reply(status, began=sent, ended=time.monotonic())
        lead = 0.0
        if status == 200:
            found = json.loads(answer)
            reply.take(found)
            tops = found["meta_info"]["output_top_logprobs"]
            lead = min(place[0][0] - place[1][0] for place in tops)
        else:
            reply.error = answer[:300]
        return judge(Asked(question, bf16, "", len(text)), reply, self.windows, self.agents), lead
