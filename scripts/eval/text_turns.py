"""eval_text --multi-turn: whole conversations with tools, turn by turn, each arm in two ways.

kept     as agents are served: after a turn the radix cache keeps its prompt's KV and the answer's, as decode wrote it;
         the next turn's prompt finds both and prefills what is new
flushed  the cache is emptied before each turn, so that earlier answers are prefilled again, in the arm's precision:
         what an evicted conversation gets, or one whose prefill server has no answers

Answers are forced, so every prompt is the same for all arms and in both ways.  All conversations of a group go through
a turn together, as one wave (arms.py says why); a group is what the KV pool holds from its first to its last turn.
What a turn found in the cache is checked, as it is what the two ways differ in.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.bench.servers import Arm
from scripts.eval.arms import Answer, Client
from scripts.eval.report import Results
from scripts.eval.statistics import Array, analyse, divergence
from scripts.eval.text_data import Window, conversations
from scripts.eval.text_parts import BESIDE, REFERENCE, WORST, Cell, Stored
from scripts.eval.text_report import turn_tables

MODES = KEPT, FLUSHED = "kept", "flushed"
SLACK = 64  # tokens of the context and, by conversation, of the pool that SGLang keeps to itself: margins and pages
Talk = list[Window]
Groups = dict[str, dict[str, list[float]]]  # {group of turns: {measure: [by conversation]}}


@dataclass(frozen=True)
class Part(Stored):
    """Of all answers' tokens, in the order of conversations and their turns."""

    ids: Array  # int32 [tokens, top], the answer's own token last
    logprobs: Array  # float32, the same shape
    lengths: Array  # int32 [conversations, turns of the longest]: tokens of each answer, 0 where there is none


class Turns:
    stored: type[Stored] = Part

    def __init__(self, args: argparse.Namespace, tokenizer: Any, context: int) -> None:
        self.args = args
        self.cells: list[Cell] = [(source, mode) for source in args.sources for mode in MODES]
        room = min(context, args.kv_tokens) - SLACK
        self.talks = {
            source: conversations(source, args.data, tokenizer, args.n, room, args.answer_tokens)
            for source in args.sources
        }
        counts = [len(talk) for talks in self.talks.values() for talk in talks]
        self.head = (
            f"{len(counts)} conversations of {', '.join(args.sources)}, {sum(counts)} turns, answers of "
            f"{args.answer_tokens} tokens at most"
        )

    def texts(self, cell: Cell) -> list[list[list[int]]]:
        """Prompt and answer of each request."""
        return [[turn.prompt, turn.answer] for talk in self.talks[cell[0]] for turn in talk]

    def measure(self, client: Client, cell: Cell, identity: dict[str, Any]) -> Part:
        talks, page = self.talks[cell[0]], page_size(client.arm)
        answers: list[list[Answer]] = []
        for group in groups(talks, self.args.kv_tokens, self.args.wave):
            answers += play(client, group, page, flushed=cell[1] == FLUSHED)
        lengths = np.zeros((len(talks), max(map(len, talks))), dtype=np.int32)
        for number, said in enumerate(answers):
            lengths[number, : len(said)] = [len(one.ids) for one in said]
        flat = [one for said in answers for one in said]
        ids, logprobs = (np.concatenate([getattr(one, what) for one in flat]) for what in ("top_ids", "top_logprobs"))
        return Part(identity, ids.astype(np.int32), logprobs.astype(np.float32), lengths)

    def results(self, parts: dict[Cell, dict[str, Any]], arms: list[str]) -> Results:
        """As statistics.analyse's, for each group of turns; arms are named ARM/MODE."""
        names = [f"{arm}/{mode}" for arm in arms for mode in MODES]
        pairs = [(name, f"{REFERENCE}/{KEPT}") for name in names]
        pairs = [(a, b) for a, b in pairs if a != b] + [(f"{arm}/{FLUSHED}", f"{arm}/{KEPT}") for arm in arms]
        pairs += [(f"{a}/{mode}", f"{b}/{mode}") for a, b in BESIDE if {a, b} <= {*arms} for mode in MODES]
        found: dict[str, dict[str, Groups]] = {}  # {source: {ARM/MODE: ...}}
        for (source, mode), row in parts.items():
            base = parts[source, KEPT][REFERENCE]
            found.setdefault(source, {}).update({f"{arm}/{mode}": figures(part, base) for arm, part in row.items()})
        ends = (f"{REFERENCE}/{KEPT}", f"{WORST}/{KEPT}")
        out: Results = {}
        for group in dict.fromkeys(group for row in found.values() for group in next(iter(row.values()))):
            values = {
                (source, 0): {name: row[name][group] for name in names}
                for source, row in found.items()
                if group in next(iter(row.values()))
            }
            out[group] = analyse(values, list(dict.fromkeys(pairs)), ends, self.args.seed, self.args.draws)["all"]
        return out

    def shown(self, results: Results, arms: list[str], head: str) -> str:
        return turn_tables(results, arms)


def page_size(arm: Arm) -> int:
    """Tokens of a page of the server's radix cache."""
    with urllib.request.urlopen(f"{arm.url}/server_info", timeout=60) as response:
        return int(json.loads(response.read())["internal_states"][0]["page_size"])


def groups(talks: list[Talk], kv_tokens: int, wave: int) -> list[list[Talk]]:
    """Neighbours that fit into the KV pool together, to their last token."""
    made: list[list[Talk]] = []
    used = 0
    for talk in talks:
        need = len(talk[-1].prompt) + len(talk[-1].answer) + SLACK
        if not made or used + need > kv_tokens or len(made[-1]) == wave:
            made.append([])
            used = 0
        made[-1].append(talk)
        used += need
    return made


def play(client: Client, group: list[Talk], page: int, *, flushed: bool) -> list[list[Answer]]:
    """The replayed answers of each conversation."""
    out: list[list[Answer]] = [[] for _ in group]
    for turn in range(max(map(len, group))):
        if flushed or turn == 0:
            client.arm.flush()
        going = [number for number, talk in enumerate(group) if turn < len(talk)]
        asked = [group[number][turn] for number in going]
        answers = client.replayed([one.prompt for one in asked], [one.answer for one in asked])
        for number, answer in zip(going, answers, strict=True):
            _check_cache(client, group[number][:turn], answer.cached, page, flushed)
            out[number].append(answer)
    return out


def _check_cache(client: Client, before: Talk, cached: int, page: int, flushed: bool) -> None:
    """A turn must have found all of the turns ``before`` it but the last token, which never got in; flushed, nothing of
    their answers (others of the wave may begin with the same schemas)."""
    if before and flushed and cached > len(before[0].prompt):
        raise client.arm.failed(f"found {cached} tokens of a conversation in a cache that was emptied")
    if before and not flushed:
        had = len(before[-1].prompt) + len(before[-1].answer) - 1
        if cached < had - had % page:
            wrong = f"kept {cached} of {had} earlier tokens (pages of {page})"
            raise client.arm.failed(f"{wrong}: give it more --kv-tokens, if its cache keeps answers at all")


def figures(part: Part, base: Part) -> Groups:
    """Against BF16's part ``base``; "later": turns from the second on, where the two ways differ."""
    if not np.array_equal(part.lengths, base.lengths):
        raise AssertionError("parts of one run hold the same answers")
    kl = divergence(base.ids, base.logprobs, part.ids, part.logprobs)
    nll = -part.logprobs[:, -1].astype(np.float64)
    best, reference = (np.take_along_axis(p.ids, p.logprobs.argmax(1)[:, None], 1)[:, 0] for p in (part, base))
    same, right = best == reference, best == base.ids[:, -1]
    counts = base.lengths[base.lengths > 0]
    answers = iter(np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1]))  # where the tokens of each are
    talks = [[next(answers) for _ in range(np.count_nonzero(row))] for row in base.lengths]
    chosen = {"all": talks, "later": [talk[1:] for talk in talks]}
    chosen |= {f"turn {turn + 1}": [talk[turn : turn + 1] for talk in talks] for turn in range(base.lengths.shape[1])}
    out: Groups = {}
    for group, every in chosen.items():
        found: dict[str, list[float]] = {name: [] for name in ("kl", "first", "nll", "top1", "exact")}
        for turns in filter(None, every):
            at = np.concatenate(turns)
            first, exact = ([x[one] for one in turns] for x in (kl, right))
            row = (kl[at].mean(), np.mean([x[0] for x in first]), nll[at].mean(), same[at].mean())
            for name, value in zip(found, (*row, np.mean([x.all() for x in exact])), strict=True):
                found[name].append(round(float(value), 9))
        out[group] = found
    return out
