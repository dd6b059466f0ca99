"""A tokenizer that knows some words, w0, w1 and so on, and a chat template of nothing but the messages."""

from __future__ import annotations

import warnings
from pathlib import Path


def save_tokenizer(folder: Path, words: int = 16) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template).save_pretrained(folder)
