"""A Qwen3-VL of random weights with a tokenizer and a processor of its own, so that a server takes images offline."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.models.families import FAMILIES
from scripts.models.make_family_models import write

VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
VOCABULARY = 4224  # 4096 and the four, rounded up
CHAT = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make(folder: Path, words: Path) -> Path:
    """``folder/vision``, with the tokenizer of ``words``.  Patches are 16 pixels wide, and 2 x 2 are a token."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    out = folder / "vision"
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.add_special_tokens({"additional_special_tokens": [*VISION_TOKENS.values()]})
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    family = FAMILIES["qwen3_vl"]
    names = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    assert family.whole is not None
    write(replace(family, text={**family.text, **names, "vocab_size": VOCABULARY}, whole={**family.whole, **ids}), out)
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    patches: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=Qwen3VLVideoProcessor(**patches),
        tokenizer=tokenizer,
        chat_template=CHAT,
    ).save_pretrained(out)
    return out


def picture(seed: int, width: int, height: int) -> str:
    """A PNG of noise, as a data URL."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
