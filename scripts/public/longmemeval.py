#!/usr/bin/env python3
"""LongMemEval (arXiv 2410.10813) against a running server: 500 questions over some 40 dated chat sessions, 110k tokens.

First generation, then, with --judge-model, an LLM judge at another OpenAI endpoint says yes or no to each answer, by
the instruction of its question type.  Prompt, order of sessions, truncation of the middle and sampling are Mix-Quant's
(github.com/haiquanlu/Mix-Quant, evaluation/LongMemEval); the judge's instructions are those of the benchmark
(github.com/xiaowu0162/LongMemEval, MIT), whose judge is gpt-4o-2024-08-06.

    scripts/eval_longmemeval --out results/mix --data longmemeval_s_cleaned.json --judge-model gpt-4o-2024-08-06
    scripts/eval_longmemeval --out results/mix --data longmemeval_s_cleaned.json --judge-only --judge-model ...

Writes OUT/longmemeval.generated.jsonl and OUT/longmemeval.jsonl, judged (run.py); the same command goes on where
it was cut short.  --judge-only needs no server but the judge.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from scripts.public.data import Row, file_from_hub, rows_of
from scripts.public.grading import after_thinking
from scripts.public.report import last_line, other_arm, show, summarise
from scripts.public.run import Example, Record, Records, run, start
from scripts.public.server import Sampling, Server, Stop, Tokenizer, arguments

NAME = "longmemeval"
HUB, HUB_FILE = "xiaowu0162/longmemeval-cleaned", "longmemeval_s_cleaned.json"
FIELDS = ("question_id", "question_type", "question", "answer", "question_date", "haystack_dates", "haystack_sessions")
ASK = "I will give you several history chats between you and a user. Please answer the question based on the relevant "
ASK += "chat history.\n\n\nHistory Chats:\n\n{}\n\nCurrent Date: {}\nQuestion: {}\nAnswer:"

# The judge's instructions are put together from the sentences that its prompts share.
CORRECT = (
    "I will give you a question, a correct answer, and a response from a model. Please answer yes if the response "
)
CORRECT += "contains the correct answer. Otherwise, answer no. "
STEPS = "If the response is equivalent to the correct answer or contains all the intermediate steps to get the correct "
STEPS += (
    "answer, you should also answer yes. If the response only contains a subset of the information required by the "
)
STEPS += "answer, answer no. "
DAYS = "In addition, do not penalize off-by-one errors for the number of days. If the question asks for the number of "
DAYS += "days/weeks/months, etc., and the model makes off-by-one errors (e.g., predicting 19 days when the answer is "
DAYS += "18), the model's response is still correct. "
UPDATED = "If the response contains some previous information along with an updated answer, the response should be "
UPDATED += "considered as correct as long as the updated answer is the required answer."
RUBRIC = "I will give you a question, a rubric for desired personalized response, and a response from a model. Please "
RUBRIC += "answer yes if the response satisfies the desired response. Otherwise, answer no. The model does not need to "
RUBRIC += "reflect all the points in the rubric. The response is correct as long as it recalls and utilizes the user's "
RUBRIC += "personal information correctly."
ABSTAIN = "I will give you an unanswerable question, an explanation, and a response from a model. Please answer yes if "
ABSTAIN += "the model correctly identifies the question as unanswerable. The model could say that the information is "
ABSTAIN += "incomplete, or some other information is given but the asked information is not."
INSTRUCTIONS = {
    "single-session-user": CORRECT + STEPS,
    "single-session-assistant": CORRECT + STEPS,
    "multi-session": CORRECT + STEPS,
    "temporal-reasoning": CORRECT + STEPS + DAYS,
    "knowledge-update": CORRECT + UPDATED,
    "single-session-preference": RUBRIC,
    "abstention": ABSTAIN,
}
HEADINGS = {"single-session-preference": "Rubric", "abstention": "Explanation"}
IS_RIGHT = "Is the model response correct? Answer yes or no only."
IS_ABSTAINED = "Does the model correctly identify the question as unanswerable? Answer yes or no only."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, "eval_longmemeval", max_tokens=19072, temperature=0.6, thinking=True)
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help=f"local file (default: {HUB_FILE} of {HUB} on the hub)")
    add("--max-context", type=int, default=112_000, help="prompt tokens (default: %(default)s)")
    add("--tokenizer", help="folder or hub name (default: the server's)")
    add("--judge-base-url", default="https://api.openai.com/v1", help="default: %(default)s")
    add("--judge-model", help="gpt-4o-2024-08-06 is the benchmark's (default: no judging)")
    add("--judge-key-env", metavar="VARIABLE", help="with the judge's key (OpenAI's default: OPENAI_API_KEY)")
    add("--judge-only", action="store_true", help="judge what was generated before")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.judge_only and not args.judge_model:
        raise Stop("--judge-only: name the --judge-model")
    if not args.judge_key_env and "api.openai.com" in args.judge_base_url:
        args.judge_key_env = "OPENAI_API_KEY"
    return args


def session_order(session: tuple[str, Any]) -> tuple[int, datetime, str]:
    try:
        return 0, datetime.strptime(session[0], "%Y/%m/%d (%a) %H:%M"), ""
    except ValueError:
        return 1, datetime.min, str(session[0])


def history(row: Row) -> str:
    text = ""
    sessions = sorted(zip(row["haystack_dates"], row["haystack_sessions"], strict=True), key=session_order)
    for place, (date, turns) in enumerate(sessions, 1):
        said = "".join(f"\n\n{turn['role']}: {str(turn['content']).strip()}" for turn in turns)
        text += f"\n### Session {place}:\nSession Date: {date}\nSession Content:\n{said}\n"
    return text


def kind(row: Row) -> str:
    return "abstention" if "_abs" in str(row["question_id"]) else str(row["question_type"])


def example(row: Row) -> Example:
    if kind(row) not in INSTRUCTIONS:
        raise Stop(f"{row['question_id']}: question type {kind(row)!r} is none of {', '.join(INSTRUCTIONS)}")
    try:
        prompt = ASK.format(history(row), row["question_date"], row["question"])
    except (KeyError, TypeError, ValueError) as error:
        raise Stop(f"{row['question_id']}: haystack_dates and haystack_sessions do not fit ({error!r})") from None
    return Example(str(row["question_id"]), prompt, str(row["answer"]), (kind(row),))


def judge_prompt(row: Row, response: str) -> str:
    which = kind(row)
    shown = f"Question: {row['question']}\n\n{HEADINGS.get(which, 'Correct Answer')}: {row['answer']}"
    asked = IS_ABSTAINED if which == "abstention" else IS_RIGHT
    return f"{INSTRUCTIONS[which]}\n\n{shown}\n\nModel Response: {response}\n\n{asked}"


async def generate(args: argparse.Namespace, every: list[Example], file: Path) -> Records:
    sampling = Sampling.of(args)
    server = Server(args.base_url, args.model, args.api_key_env, args.timeout)
    tokenizer = Tokenizer(server, args.tokenizer)
    identity = {"model": server.model, "server": server.identity(), "sampling": asdict(sampling)}
    records = Records(file, {"benchmark": NAME, **identity, "max_context": args.max_context})
    one_at_a_time = asyncio.Lock()

    async def work(example: Example, seed: int) -> Record:
        async with one_at_a_time:
            prompt = await asyncio.to_thread(tokenizer.cut_middle, example.prompt, args.max_context)
        said = await server.chat(prompt, sampling, seed)
        return {**said, "extracted": after_thinking(said["output"]), "correct": None, "score": None}

    await run("generation", every, args.seeds, records, work, args.concurrency)
    return records


async def judge(
    args: argparse.Namespace, rows: list[Row], every: list[Example], made: Records, server: Server
) -> list[Record]:
    sampling = Sampling(10, temperature=0, top_p=1, top_k=0, thinking=None)
    by_id = {str(row["question_id"]): row for row in rows}
    records = Records(args.out / f"{NAME}.jsonl", {**made.identity, "judge": server.model})
    for key, record in records.matching(every, args.seeds).items():
        if record["extracted"] != made.by_key[key]["extracted"]:
            raise Stop(f"{records.file}: {key[0]} was judged on another answer; remove that file")

    async def work(example: Example, seed: int) -> Record:
        answer = made.by_key[example.id, seed]
        verdict = (await server.chat(judge_prompt(by_id[example.id], answer["extracted"]), sampling, 0))["output"]
        correct = "yes" in verdict.lower()
        return {**answer, "verdict": verdict, "correct": correct, "score": float(correct)}

    return await run("judging", every, args.seeds, records, work, args.concurrency)


async def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    judging = None
    if args.judge_model:  # before hours of generation
        flags = ("--judge-base-url", "--judge-model", "--judge-key-env")
        judging = Server(args.judge_base_url, args.judge_model, args.judge_key_env, args.timeout, flags)
    rows = rows_of(args.data or file_from_hub(HUB, HUB_FILE), FIELDS)[: args.limit]
    every = [example(row) for row in rows]
    other = other_arm(args.against, NAME)
    file = args.out / f"{NAME}.generated.jsonl"
    if args.judge_only:
        made = Records(file, None)
        missing = len(every) * len(args.seeds) - len(made.matching(every, args.seeds))
        if missing:
            raise Stop(f"{file} lacks {missing} answers: generate them without --judge-only")
    else:
        made = await generate(args, every, file)
    if judging is None:
        count = len(every) * len(args.seeds)
        print(f"{file}: {count} answers, not judged; the same command with --judge-model goes on")
        print(json.dumps({"model": made.identity["model"], "results": {}, "files": [str(file)]}))
        return
    result = summarise(NAME, await judge(args, rows, every, made, judging), other)
    how = f"{Sampling(**made.identity['sampling'])}; judged by {judging.model}"
    show(NAME, result, made.identity, how)
    last_line({NAME: result}, made.identity, [file, args.out / f"{NAME}.jsonl"])


def command() -> None:
    start(main)
