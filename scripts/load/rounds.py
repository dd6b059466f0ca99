"""Rounds: some seconds of load and faults of one sort, then silence, in which books, counters and memory are read."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from scripts.load.agents import Mix, Play
from scripts.load.books import Counted, balance
from scripts.load.judge import BURST
from scripts.load.memory import Memory
from scripts.load.operator import Operator
from scripts.load.target import Side, counted, differs, idle, metrics, state, value_of

CALM, CUT, PRESSED, KILL = "calm", "cut", "pressed", "kill"
CYCLE = (CALM, CUT, PRESSED)
AGENTS = {CALM: 6, CUT: 8, PRESSED: 12, KILL: 6}
CUTS = {"abort": 0.2, "close": 0.15, "leave": 0.1}
# Streaming sessions keep keys and values outside of the tree, which a flush, a retraction or a full pool would take.
MIXES = {
    CALM: Mix(malformed=True, sessions=(True, False)),
    CUT: Mix(CUTS, malformed=True, sessions=(False,)),
    PRESSED: Mix({"abort": 0.05, "close": 0.05}),
    KILL: Mix({"abort": 0.05, "close": 0.05}, malformed=False),
}


@dataclass
class Life:
    """Of one server, from a start to an end: its memory after each round."""

    name: str
    seen: list[tuple[str, Memory]] = field(default_factory=list)

    def ends(self) -> tuple[Memory, Memory] | None:
        """After each sort of round was played once, and last; None for a life that is too short to tell."""
        kinds: set[str] = set()
        for kind, memory in self.seen[:-1]:
            kinds.add(kind)
            if kinds >= {*CYCLE}:
                return memory, self.seen[-1][1]
        return None


class Rounds:
    """``pauses``: running requests are retracted by pauses too."""

    def __init__(self, play: Play, say: Callable[[str], None], pauses: bool = True) -> None:
        self.play, self.say, self.pauses = play, say, pauses
        self.operator = Operator(play, say)
        self.lives: dict[str, list[Life]] = {side.name: [Life(side.name)] for side in play.target.sides}
        self.number = 0
        self._before: dict[str, dict[str, Any]] = {}
        self._retracted: dict[str, float] = {}

    async def open(self) -> None:
        """Where the counters stand, before anything of the soak ran."""
        for side in self.play.target.sides:
            await self._stand(side)

    async def _stand(self, side: Side) -> dict[str, list[tuple[dict[str, str], float]]]:
        self._before[side.name] = await state(self.play.client, side)
        status, text = await self.play.client.get(side.url + "/metrics")
        page = metrics(text) if status == 200 else {}
        self._retracted[side.name] = value_of(page, "sglang:num_retracted_requests_total")
        return page

    async def round(self, kind: str, seconds: float, kill: str = "") -> None:
        play, number = self.play, self.number
        self.number += 1
        began = time.monotonic()
        until = began + seconds
        agents = [asyncio.create_task(play.agent(i, number, until, self._mix(kind))) for i in range(AGENTS[kind])]
        rng = random.Random(f"{play.seed} {number} operator")
        self.operator.pauses = 0
        # What was retracted waits in the queue, and so does what the pool has no room for: it may be full at any time.
        window = play.windows.open(BURST) if kind == PRESSED else None
        try:
            await self._faults(kind, rng, seconds, kill)
            await asyncio.gather(*agents)
        finally:
            for task in agents:
                task.cancel()
            if window is not None:
                play.windows.close(window)
        play.target.check()
        await self._look(kind, kill, time.monotonic() - began)

    def _mix(self, kind: str) -> Mix:
        mix = MIXES[kind]
        # SGLang's router has no /open_session.
        return Mix(mix.cuts, mix.malformed, ()) if self.play.target.pair else mix

    async def _faults(self, kind: str, rng: random.Random, seconds: float, kill: str) -> None:
        operator = self.operator

        async def wait() -> None:
            await asyncio.sleep(seconds * rng.uniform(0.1, 0.2))

        if kind == CALM:
            await wait()
            await operator.burst(rng)
        elif kind == CUT:
            for act in (operator.flush, operator.abort_all, operator.flush):
                await wait()
                await act()
        elif kind == PRESSED:
            for act in (partial(operator.pause, update=False), operator.updates, partial(operator.pause, update=True)):
                await wait()
                if self.pauses or act == operator.updates:
                    await act()
        elif kill:
            await wait()
            await operator.kill(kill)

    async def _look(self, kind: str, kill: str, seconds: float) -> None:
        """After the last answer: everything must be at rest, and the counters say what the requests asked for."""
        play = self.play
        wrong: list[str] = []
        for side in play.target.sides:
            stuck = await idle(play.client, side)
            wrong += [stuck] if stuck else []
        before, retracted = dict(self._before), dict(self._retracted)
        grown: dict[str, Counted] = {}
        retractions = 0
        for side in play.target.sides:
            page = await self._stand(side)
            wrong += [f"{side.name}: {what}" for what in differs(self._before[side.name], page)] if page else []
            start = Counted() if side.name == kill else counted(before[side.name])
            grown[side.name] = counted(self._before[side.name]).since(start)
            retractions += int(self._retracted[side.name] - (0 if side.name == kill else retracted[side.name]))
        requests = play.books.close_round()
        names = [side.name for side in play.target.sides]
        if kill:
            # What a dead server counted is gone, so that only this is left to say:
            for name, counts in grown.items():
                low = counts.of("decode", low=True)
                wrong += [f"{name}: {low} decode rows in low precision"] if low else []
            self.lives[kill].append(Life(kill))
        else:
            precision = self._before[names[0]]["precision"]["prefill"]
            wrong += balance(
                requests,
                grown[names[0]],
                grown[names[-1]],
                pair=play.target.pair,
                all_bf16=precision == "bf16",
                may_retract=self.operator.pauses + retractions,
            )
        play.books.problems += [f"round {self.number} ({kind}): {what}" for what in wrong]
        play.books.retracted_by_sglang += retractions
        memory = play.target.measure()
        for name, held in memory.items():
            self.lives[name][-1].seen.append((kind, held))
        ends = sorted({request.end for request in requests})
        said = ", ".join(f"{sum(r.end == end for r in requests)} {end}" for end in ends)
        sizes = ", ".join(f"{name} {held}" for name, held in memory.items())
        self.say(
            f"round {self.number} {kind}{' ' + kill if kill else ''}: {seconds:.0f} s, {said or 'nothing'}; "
            f"{'books balance' if not wrong else '; '.join(wrong)}; {sizes}"
        )
