"""What is done to servers: weight updates, flushes, pauses, bursts, aborts of everything, kills."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from scripts.load.agents import Play
from scripts.load.books import LOST, REFUSED, RIGHT, WRONG, Request
from scripts.load.client import generate_body
from scripts.load.judge import ABORT_ALL, BURST, OUTAGE, Asked
from scripts.load.problems import first, prompt
from scripts.load.target import QUEUED, RUNNING, Side

# After a pair's server is back, the other half and the router find that out by heartbeats and failures.
GRACE_S = {False: 1.0, True: 30.0}
BACK_S = 120.0


class Operator:
    def __init__(self, play: Play, say: Callable[[str], None]) -> None:
        self.play, self.say = play, say
        self.pauses = 0  # of the round

    def wrong(self, what: str) -> None:
        self.play.books.enter(Request(WRONG, detail=what))

    async def flush(self) -> None:
        """Under load SGLang refuses it, mostly; where it takes it, nothing ran."""
        for side in self.play.target.sides:
            status, text = await self.play.client.post(side.url + "/flush_cache")
            self.play.books.faults["cache flush" if status == 200 else "cache flush, refused as busy"] += 1
            if status not in (200, 400):
                self.wrong(f"/flush_cache of the {side.name} server: {status} {text[:300]}")

    async def update(self, side: Side) -> None:
        """Without a flush: SGLang ends itself where its scheduler still holds a request that it has answered."""
        body = {"model_path": self.play.target.model, "flush_cache": False}
        status, text = await self.play.client.post(side.url + "/update_weights_from_disk", body, timeout=240)
        if status != 200 or '"success":true' not in text.replace(" ", ""):
            self.wrong(f"/update_weights_from_disk of the {side.name} server: {status} {text[:300]}")

    async def updates(self) -> None:
        """The same checkpoint again, one server after the other: SGLang waits until nothing runs, and holds what comes.
        Two halves of a pair at once would wait for each other's halves of requests."""
        self.play.books.faults["weight update"] += 1
        for side in self.play.target.sides:
            await self.update(side)
        await self.flush()

    async def pause(self, *, update: bool) -> None:
        """All that runs is retracted, and goes on afterwards: generated tokens are prefilled again.  The weights are
        updated in between, as reinforcement learning does; the cache is kept, since SGLang empties none that waits."""
        self.pauses += 1
        self.play.books.faults["weight update while paused" if update else "pause with retraction"] += 1
        side = self.play.target.sides[-1]  # of a pair, the decode server
        status, text = await self.play.client.post(side.url + "/pause_generation", {"mode": "retract"})
        if status != 200:
            self.wrong(f"/pause_generation of the {side.name} server: {status} {text[:300]}")
        if update:
            await self.update(side)
        status, text = await self.play.client.post(side.url + "/continue_generation", {})
        if status != 200:
            self.wrong(f"/continue_generation of the {side.name} server: {status} {text[:300]}")

    async def abort_all(self) -> None:
        self.play.books.faults["abort of all"] += 1
        window = self.play.windows.open(ABORT_ALL)
        for side in self.play.target.sides:
            await self.play.client.post(side.url + "/abort_request", {"abort_all": True})
        self.play.windows.close(window, 1.0)

    async def burst(self, rng: random.Random, times: int = 3) -> None:
        """More at once than may run and wait together; one server must refuse some, and answer the others."""
        play = self.play
        play.books.faults["burst"] += 1
        window = play.windows.open(BURST)

        async def one() -> Request:
            who = rng.choice(play.agents)
            question = who.walk if rng.random() < 0.3 else rng.choice(who.asks)
            text = prompt([], first(who, question))
            reply = await play.client.ask("/generate", generate_body(text, question.tokens, rid=play.rid()))
            return play.enter(Asked(question, sent=len(text)), reply)

        requests = await asyncio.gather(*(one() for _ in range(times * (RUNNING + QUEUED))))
        play.windows.close(window)
        refused = sum(request.end == REFUSED for request in requests)
        if not refused and play.target.bounded:
            self.wrong(f"a burst of {len(requests)} requests filled no queue of {QUEUED}")

    async def kill(self, name: str) -> None:
        """The schedulers of one server die; it must end, and serve again once it was started again."""
        play = self.play
        play.books.faults[f"{name} killed"] += 1
        window = play.windows.open(OUTAGE)
        wrong = await play.target.kill_and_restart(name, self.say)
        if wrong:
            self.wrong(wrong)
        play.windows.close(window, GRACE_S[play.target.pair])
        await self.served_again(name)

    async def served_again(self, name: str) -> None:
        play = self.play
        who = play.agents[0]
        question = who.asks[0]
        text = prompt([], first(who, question))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BACK_S
        while True:
            reply = await play.client.ask("/generate", generate_body(text, question.tokens))
            request = play.enter(Asked(question, sent=len(text)), reply)
            if request.end == RIGHT:
                return
            if loop.time() > deadline:
                play.books.enter(Request(LOST, detail=f"after the {name} server was back: {reply.error}"))
                return
            await asyncio.sleep(1)
