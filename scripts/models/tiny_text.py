"""The text and the tokens of the trained tiny model: Python's own sources, and a byte-level BPE in plain Python.

Training runs where there is nothing but torch and numpy, so the tokenizer that ``tokenizers`` trained is applied here
from its tokenizer.json: special tokens are cut out first, each digit is a piece of its own, the rest is split as GPT-2
splits it, and each word goes through the merges in their order. Equal to the library for ASCII text, which is all that
the corpus and the tasks hold; anything else is refused.
"""

from __future__ import annotations

import json
import re
import sysconfig
import zlib
from itertools import pairwise
from pathlib import Path

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in make_tiny_model.py; their ids are their places
END_OF_TEXT, IM_START, IM_END = range(3)
HELD_OUT = 40  # one file in so many is kept for evaluation
SKIP = {"site-packages", "__pycache__", "encodings", "lib2to3"}  # not Python's own, or tables of code points

_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
_DIGIT = re.compile("([0-9])")
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[^\s0-9A-Za-z]+|\s+(?!\S)|\s+")


def held_out(name: str) -> bool:
    """Whether the file with this path, relative to the library and with slashes, is for evaluation only."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def stdlib_files(split: str, most: int | None = None) -> dict[str, str]:
    """Name and text of this Python's own source files, "train" or "eval", `most` of them; other characters than ASCII
    are dropped."""
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: allowed are 'train' and 'eval'")
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if len(files) == most:
            break
        if SKIP & set(name.split("/")) or held_out(name) != (split == "eval"):
            continue
        raw = path.read_bytes()
        text = raw.decode("ascii", "ignore").replace("\r\n", "\n")
        if len(text) > 200 and len(text) > 0.98 * len(raw) and not _SPECIAL.search(text):
            files[name] = text
    return files


def usable_lines(texts: list[str]) -> list[str]:
    """The lines that tasks use as filler: not blank, neither short nor long, without indentation."""
    return [line for text in texts for line in map(str.strip, text.splitlines()) if 12 <= len(line) <= 72]


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


class Tokenizer:
    """Encode and decode with a tokenizer.json that ``prepare`` in training_data.py wrote."""

    def __init__(self, path: Path) -> None:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        self._ids: dict[str, int] = model["vocab"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
        letters = _byte_letters()
        self._letters = {chr(byte): letters[byte] for byte in range(128)}
        self._bytes = {letter: byte for byte, letter in letters.items()}
        self._tokens = {number: token for token, number in self._ids.items()}
        self._words: dict[str, list[int]] = {}
        self._pieces: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def encode(self, text: str) -> list[int]:
        """The ids of ASCII text, special tokens included."""
        if not text.isascii():
            raise ValueError("the tiny model's tokenizer encodes ASCII only here: use tokenizers for other text")
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in SPECIAL:
                ids.append(SPECIAL.index(part))
                continue
            for piece in _DIGIT.split(part):
                found = self._pieces.get(piece)
                if found is None:
                    found = [token for word in _WORD.findall(piece) for token in self._word(word)]
                    found = found if piece not in "0123456789" or not piece else [self._ids[piece]]
                    if len(piece) <= 24 and len(self._pieces) < 1_000_000:
                        self._pieces[piece] = found
                ids += found
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        letters = "".join(self._tokens[token] for token in ids if token >= len(SPECIAL))
        return bytes(self._bytes[letter] for letter in letters).decode("utf-8", "replace")

    def _word(self, word: str) -> list[int]:
        found = self._words.get(word)
        if found is None:
            parts = [self._letters[letter] for letter in word]
            while len(parts) > 1:
                ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
                best = min(ranks)
                if best == len(self._ranks):
                    break
                left, right = parts[ranks.index(best)], parts[ranks.index(best) + 1]
                merged, i = [], 0
                while i < len(parts):
                    both = i + 1 < len(parts) and parts[i] == left and parts[i + 1] == right
                    merged.append(left + right if both else parts[i])
                    i += 2 if both else 1
                parts = merged
            found = [self._ids[part] for part in parts]
            if len(self._words) < 1_000_000:
                self._words[word] = found
        return found
