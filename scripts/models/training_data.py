"""What the tiny model is trained on: the prepared folder, and batches that are a function of the seed and the step."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.models.tiny_model import (
    Shape,
)
from scripts.models.tiny_tasks import TASKS, segments, training_example
from scripts.models.tiny_text import END_OF_TEXT, SPECIAL, Tokenizer, stdlib_files, usable_lines

VOCAB = Shape().vocab_size
KINDS = ("text", *TASKS)
SHARES = {"text": 0.3} | dict.fromkeys(TASKS, 0.14)  # of a batch's documents, and of its loss
LIMITS = ((0.1, 512), (0.25, 1024), (0.5, 2048), (1.0, 4096))  # until this part of the ramp: the longest prompt
LONGEST = 8192


def prepare(out: Path, vocab: int = VOCAB, most: int | None = None) -> None:
    """Tokenizer files, the corpus in tokens, and the lines that tasks quote. `most` cuts the text, for tests."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from scripts.models.make_tiny_model import CHAT_TEMPLATE

    out.mkdir(parents=True, exist_ok=True)
    texts = {split: list(stdlib_files(split, most).values()) for split in ("train", "eval")}
    lines = usable_lines(texts["train"])
    shown = [training_example(task, random.Random(i), 1024, lines) for task in TASKS for i in range(20)]
    library = Library(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tasks = [text for example in shown for text, _ in segments(example)]
    for special in SPECIAL:
        tasks = [text.replace(special, "") for text in tasks]
    library.train_from_iterator(texts["train"] + tasks, trainer)
    if library.get_vocab_size() != vocab:
        raise SystemExit(f"the tokenizer learnt {library.get_vocab_size()} tokens, not {vocab}: too little text")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=Shape().max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(out / "tokenizer")
    # in tokenizer_config.json, where old and new readers look, and one file less
    template = out / "tokenizer" / "chat_template.jinja"
    template.unlink(missing_ok=True)
    config = out / "tokenizer" / "tokenizer_config.json"
    content = json.loads(config.read_text()) | {"chat_template": CHAT_TEMPLATE}
    config.write_text(json.dumps(content, indent=1) + "\n")

    ours = Tokenizer(out / "tokenizer" / "tokenizer.json")
    for split, files in texts.items():
        ids = [token for text in files for token in (*ours.encode(text), END_OF_TEXT)]
        np.savez_compressed(out / f"{split}.npz", tokens=np.array(ids, dtype=np.uint16))
        text = "\n".join(usable_lines(files)) + "\n"
        (out / f"{split}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{split}: {len(files)} files, {sum(map(len, files)) / 1e6:.1f} MB of text, {len(ids) / 1e6:.2f}M tokens")
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


@dataclass(frozen=True)
class Batch:
    tokens: np.ndarray[Any, Any]  # int64 [N]
    weights: np.ndarray[Any, Any]  # float32 [N]: of the loss at each place, which predicts the next token
    kinds: np.ndarray[Any, Any]  # int64 [N]: index into KINDS
    lengths: list[int]  # of the packed documents


class Data:
    """What --prepare wrote, and the batches made from it."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.tokenizer = Tokenizer(folder / "tokenizer" / "tokenizer.json")
        self.corpus = np.load(folder / f"{split}.npz")["tokens"]
        self.lines = gzip.decompress((folder / f"{split}.txt.gz").read_bytes()).decode().splitlines()

    def document(self, kind: str, rng: random.Random, length: int, most: int) -> tuple[list[int], list[bool]] | None:
        """Tokens of one document and which of them are learnt; None if it would have more than `most` tokens."""
        if kind == "text":
            start = rng.randrange(max(1, len(self.corpus) - length))
            tokens = self.corpus[start : start + length].tolist()
            return tokens, [True] * len(tokens)
        for _ in range(2):
            example = training_example(kind, rng, length, self.lines)
            tokens, learnt = list[int](), list[bool]()
            for text, learns in segments(example):
                ids = self.tokenizer.encode(text)
                tokens += ids
                learnt += [learns] * len(ids)
            if len(tokens) <= most:
                return tokens, learnt
        return None

    def batch(self, seed: int, step: int, size: int, limit: int) -> Batch:
        """`size` tokens of documents with prompts of at most `limit` tokens; text fills the rest."""
        rng = random.Random(f"{seed}/{step}")
        tokens, learnt, kinds, lengths = list[int](), list[bool](), list[int](), list[int]()
        while (room := size - len(tokens)) > 0:
            kind = rng.choices(KINDS, [SHARES[name] for name in KINDS])[0]
            length = max(160, int(limit * 2 ** -rng.uniform(0, 4)))
            made = self.document(kind, rng, length, min(room, limit + limit // 2)) if room > length else None
            if made is None:
                kind, made = "text", self.document("text", rng, min(room, length), room)
            assert made
            tokens += made[0]
            learnt += [*made[1][1:], False]
            kinds += [KINDS.index(kind)] * len(made[0])
            lengths.append(len(made[0]))
        kind_of, learns = np.array(kinds), np.array(learnt)
        counts = np.bincount(kind_of[learns], minlength=len(KINDS))
        share = np.array([SHARES[name] for name in KINDS]) / np.maximum(counts, 1)
        weights = np.where(learns, share[kind_of], 0).astype(np.float32)
        return Batch(np.array(tokens, dtype=np.int64), weights, kind_of, lengths)


def limit_at(step: int, ramp: int, longest: int) -> int:
    """The longest prompt at a step: short contexts first, the look-up is learnt there many times faster."""
    return min(longest, next((size for part, size in LIMITS if step < part * ramp), longest))


_worker_data: Data


def _work(job: tuple[int, int, int, int]) -> Batch:
    return _worker_data.batch(*job)


def batches(data: Data, args: argparse.Namespace, first: int) -> Iterator[Batch]:
    """The batches from step `first` on, made ahead by processes that never touch the GPU."""
    global _worker_data
    jobs = (
        (args.seed, step, args.batch_tokens, limit_at(step, args.ramp, args.longest)) for step in itertools.count(first)
    )
    if args.workers == 0:
        yield from (data.batch(*job) for job in jobs)
        return
    _worker_data = data
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        waiting = [pool.apply_async(_work, (job,)) for job in itertools.islice(jobs, 3 * args.workers)]
        for job in jobs:
            yield waiting.pop(0).get()
            waiting.append(pool.apply_async(_work, (job,)))
