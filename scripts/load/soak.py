"""Load and faults on one server or a pair, every answer checked.

    scripts/soak [--minutes 10] [--seed 1]                 # one server of the tiny trained model, started here
    scripts/soak --pd                                      # a prefill and a decode server behind SGLang's router
    scripts/soak --url http://127.0.0.1:30000 --model M    # a server that runs; it is not killed

Agents ask for values of their own over /generate, /v1/chat/completions and sessions, streamed and not, some in BF16;
meanwhile requests are aborted, streams closed, clients gone, bodies malformed, queues overrun, the cache flushed,
running requests retracted, weights updated, and schedulers killed, whose servers are started again.  Rounds of one sort
follow each other; after each everything must come to rest, and the counters of mixquant must say what the requests
asked for (``books.py``; exactly, where nothing was cut or retracted).  What an answer is held against: ``problems.py``.

Memory is the resident set of all processes of a server, and what its GPU has in use, after a cache flush: first once
every sort of round was played, last at the end, or before the server is killed; for each life of a server that is long
enough to tell.  Ends with a table and a line of JSON; the exit status is 1 where an answer was wrong or lost, books did
not balance, or memory grew by ``--growth`` percent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.load import problems
from scripts.load.agents import Play
from scripts.load.books import ABORTED, CLOSED, DOWN, GONE, LOST, MALFORMED, REFUSED, RIGHT, WRONG, Books
from scripts.load.client import Client
from scripts.load.rounds import CYCLE, KILL, Rounds
from scripts.load.target import BOTH, ON_CPU, QUIET, OneServer, PairTarget, Side, Target
from scripts.serve.libraries import MissingLibraries
from scripts.serve.pair import Pair, Plan, gpus_of
from scripts.serve.pd import gpu_count
from scripts.serve.processes import Ended, free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "models" / "tiny-qwen3"
NAMES = {
    RIGHT: "answered, right",
    WRONG: "wrong",
    LOST: "lost",
    ABORTED: "aborted",
    CLOSED: "stream closed by the client",
    GONE: "client gone before the answer",
    MALFORMED: "malformed, refused with 4xx",
    REFUSED: "refused, queue full",
    DOWN: "ended or refused while a server was away",
}


def say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pd", action="store_true", help="a prefill and a decode server behind SGLang's router")
    add("--url", help="a server with mixquant that runs, with --enable-metrics --enable-cache-report")
    add("--model", default=str(MODEL), help="the checkpoint, which knows the tasks (default: the tiny trained one)")
    add("--recipe", default="", help="a shipped recipe or a recipe file (default: auto)")
    add("--minutes", type=float, default=10, help="of rounds, restarts among them (default: %(default)s)")
    add("--round", type=float, default=20, help="seconds of a round (default: %(default)s)")
    add("--kills", type=int, help="how many servers lose their scheduler (default: 1, with --pd 2, with --url 0)")
    add("--agents", type=int, default=8, help="different agents (default: %(default)s)")
    add(
        "--pauses",
        action="store_true",
        help="with --pd: retract by pauses too, after which the decode server of SGLang 0.5.17 may end (docs/soak.md)",
    )
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    add("--growth", type=float, default=1.0, help="percent of memory that fail the run (default: %(default)s)")
    add("--logs", type=Path, default=ROOT / ".cache", help="folder of the servers' logs (default: .cache)")
    add("flags", nargs="*", help="after --: more flags for the servers")
    args = parser.parse_args(argv)
    if args.url and args.pd:
        parser.error("--url and --pd: one of them")
    if args.url and args.kills:
        parser.error("--kills: a server that runs already is not killed, since it could not be started again")
    if args.minutes <= 0 or args.round < 5 or args.agents < 1:
        parser.error("--minutes, --round, --agents: more than 0, at least 5, at least 1")
    if args.kills is None:
        args.kills = 0 if args.url else 2 if args.pd else 1
    if Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    if args.recipe and Path(args.recipe).is_file():
        args.recipe = str(Path(args.recipe).resolve())
    return args


def start(args: argparse.Namespace) -> Target:
    """Ready to serve.  Raises ``Ended``."""
    args.logs.mkdir(parents=True, exist_ok=True)
    gpus = gpu_count()
    first = (gpus_of(0, 1),) if gpus else ()
    if args.url:
        return Target(args.url.rstrip("/"), [Side("server", args.url.rstrip("/"), first)], args.model)
    if not args.pd:
        server = OneServer(args.model, args.recipe, args.flags, first, args.logs.resolve())
        try:
            server.start(say)
        except BaseException:
            server.stop()
            raise
        return server
    two = gpus > 1
    plan = Plan(
        args.model,
        free_port(),
        recipe=args.recipe,
        prefill_gpu=gpus_of(0, 1) if two else "",
        decode_gpu=gpus_of(1, 1) if two else "",
        transfer="nixl" if two else "mooncake_tcp",
        both=(*BOTH, *args.flags),
        envs=dict.fromkeys(("prefill", "decode"), QUIET if two else QUIET | ON_CPU),
    )
    pair = Pair(plan, args.logs.resolve(), say)
    pair.__enter__()
    return PairTarget(pair, plan, {"prefill": first if two else (), "decode": (gpus_of(1, 1),) if two else ()})


async def kept(play: Play, agents: list[problems.Agent]) -> list[problems.Agent]:
    """Agents with those of their questions that are answered right alone, in both precisions, beyond doubt."""
    found, least = [], float("inf")
    asked = dropped = 0
    told = time.monotonic()
    for agent in agents:
        good = []
        for question in (*agent.asks, agent.walk):
            leads = []
            for bf16 in (False, True):
                request, lead = await play.alone(question, problems.first(agent, question), bf16)
                leads.append(lead if request.end == RIGHT else 0.0)
            asked += 1
            if time.monotonic() - told > 15:
                told = time.monotonic()
                say(f"  asking alone, {asked} of {len(agents) * (len(agent.asks) + 1)} questions")
            if min(leads) >= problems.MARGIN:
                good.append(question)
                least = min(least, *leads)
            else:
                dropped += 1
        asks = tuple(question for question in good if question is not agent.walk)
        if asks and agent.walk in good:
            found.append(problems.Agent(agent.number, agent.records, asks, agent.walk))
    say(
        f"asked alone: {asked} questions, {dropped} not answered beyond doubt and left out; least lead {least:.1f} nats"
    )
    if len(found) < 2 or dropped > asked // 4:
        raise Ended(f"{play.target.model} does not know the tasks: {dropped} of {asked} questions were left out")
    return found


def kill_times(minutes: float, kills: int) -> list[float]:
    """Seconds after which they are due, evenly."""
    return [60 * minutes * (i + 1) / (kills + 1) for i in range(kills)]


async def soak(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    books = Books()
    async with Client(target.url) as client:
        play = Play(client, target, [], books, args.seed)
        play.agents = await kept(play, problems.draw(args.seed, args.agents, 5))
        pauses = args.pauses or not target.pair
        if not pauses:
            say("left out: pauses with retraction; --pauses has them (docs/soak.md)")
        rounds = Rounds(play, say, pauses)
        await rounds.open()
        began = time.monotonic()
        due = kill_times(args.minutes, args.kills if target.can_kill else 0)
        victims = [side.name for side in reversed(target.sides)]
        killed = 0
        while True:
            passed = time.monotonic() - began
            if killed < len(due) and passed >= due[killed]:
                await rounds.round(KILL, args.round, victims[killed % len(victims)])
                killed += 1
                continue
            played = rounds.number - killed
            if passed >= 60 * args.minutes and played > len(CYCLE):
                break
            await rounds.round(CYCLE[played % len(CYCLE)], args.round)
        seconds = time.monotonic() - began
    return result(args, target, rounds, books, seconds)


def result(args: argparse.Namespace, target: Target, rounds: Rounds, books: Books, seconds: float) -> dict[str, Any]:
    lives = []
    for name, of_side in rounds.lives.items():
        for i, life in enumerate(of_side, 1):
            ends = life.ends()
            growth = None if ends is None else ends[1].growth(ends[0])
            start, last = (None, None) if ends is None else (str(ends[0]), str(ends[1]))
            lives.append({"server": name, "life": i, "start": start, "end": last, "growth_percent": growth})
    grown = [value for life in lives for value in (life["growth_percent"] or {}).values()]  # type: ignore[attr-defined]
    most = max(grown, default=None)
    if most is not None and most >= args.growth:
        books.problems.append(f"memory grew by {most:.2f}%, {args.growth}% is too much")
    return {
        "ok": books.clean(),
        "sglang": version("sglang"),
        "topology": "pd" if target.pair else "one",
        "seed": args.seed,
        "seconds": round(seconds),
        "rounds": books.rounds,
        "requests": dict(books.ends),
        "faults": dict(sorted(books.faults.items())),
        "retractions": {"told": books.retracted, "out of memory": books.retracted_by_sglang},
        "wrong": books.ends[WRONG],
        "lost": books.ends[LOST],
        "memory": lives,
        "growth_percent": None if most is None else round(most, 3),
        "problems": books.problems[:20],
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"{'requests':<44}{sum(found['requests'].values()):>8}"]
    for end, title in NAMES.items():
        lines.append(f"  {title:<42}{found['requests'].get(end, 0):>8}")
    lines.append("faults")
    lines += [f"  {name:<42}{n:>8}" for name, n in found["faults"].items()]
    lines += [f"  {'retractions, ' + name:<42}{n:>8}" for name, n in found["retractions"].items()]
    lines.append("memory")
    for life in found["memory"]:
        title = f"  {life['server']}, life {life['life']}"
        if life["growth_percent"] is None:
            lines.append(f"{title:<22}too short to tell, or not to be seen")
            continue
        grown = ", ".join(f"{kind} {value:+.2f}%" for kind, value in life["growth_percent"].items())
        lines.append(f"{title:<22}{life['start']} -> {life['end']}: {grown}")
    return "\n".join(lines)


def tell(found: dict[str, Any]) -> int:
    say("\n" + table(found))
    for line in found["problems"]:
        say(f"NOT OK: {line}")
    say(json.dumps(found))
    return 0 if found["ok"] else 1


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    target: Target | None = None
    try:
        target = start(args)
        return tell(asyncio.run(soak(args, target)))
    except (Ended, MissingLibraries) as error:
        say(str(error))
        say(json.dumps({"ok": False, "error": str(error)[:2000]}))
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if target:
            target.stop()


def command() -> None:
    sys.exit(main())
