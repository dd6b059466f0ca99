"""Make a small random-weight Qwen3 checkpoint: scripts/make_tiny_model OUT

For tests and demos on machines without a model hub: a real SGLang server loads it like any other Qwen3 (BF16
safetensors, a byte-level BPE tokenizer, a ChatML template with tools), and its greedy text is noise that depends on the
whole context. Same interpreter and library versions: same files. A complete OUT is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path

SEED = 20260117
VOCAB = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Standard library modules that every Python from 3.10 on has as one file: the text that the tokenizer learns.
CORPUS = "argparse ast calendar configparser dataclasses decimal difflib email.message enum fractions functools"
CORPUS += " heapq http.client inspect ipaddress json.decoder logging.config optparse random shutil statistics string"
CORPUS += " subprocess tarfile textwrap threading traceback turtle typing unittest.case urllib.request zipfile"

CHAT_TEMPLATE = """\
{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro -%}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if tools -%}
  {%- set ns = namespace(text=system + '\\n\\n# Tools\\nEach line is one function that you may call.\\n<tools>\\n') -%}
  {%- for tool in tools %}{% set ns.text = ns.text + (tool | tojson) + '\\n' %}{% endfor -%}
  {%- set ns.text = ns.text + '</tools>\\nTo call one, write:\\n<tool_call>\\n' -%}
  {%- set ns.text = ns.text + '{"name": "...", "arguments": {...}}\\n</tool_call>' -%}
  {{- turn('system', ns.text | trim) -}}
{%- elif system -%}
  {{- turn('system', system) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set text = message.content or '' -%}
  {%- if message.role == 'tool' -%}
    {{- turn('user', '<tool_response>\\n' + text + '\\n</tool_response>') -}}
  {%- elif message.role == 'assistant' and message.tool_calls -%}
    {%- set ns = namespace(text=text) -%}
    {%- for call in message.tool_calls -%}
      {%- set function = call.function or call -%}
      {%- set arguments = function.arguments -%}
      {%- if arguments is not string %}{% set arguments = arguments | tojson %}{% endif -%}
      {%- set ns.text = ns.text + '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -%}
      {%- set ns.text = ns.text + arguments + '}\\n</tool_call>' -%}
    {%- endfor -%}
    {{- turn('assistant', ns.text | trim) -}}
  {%- elif message.role != 'system' or not loop.first -%}
    {{- turn(message.role, text) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def corpus() -> list[str]:
    specs = [importlib.util.find_spec(name) for name in CORPUS.split()]
    return [Path(spec.origin).read_text(encoding="utf-8") for spec in specs if spec and spec.origin]


def make_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"the tokenizer learnt {tokenizer.get_vocab_size()} tokens, not {VOCAB}: CORPUS is too small")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)


def make_model(out: Path) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
        dtype="bfloat16",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # plain noise gives flat logits and attends to all alike: greedy text would repeat itself
        model.model.embed_tokens.weight *= 10
        model.lm_head.weight *= 3
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight *= 2
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")],
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(out)


def make(out: Path) -> Path:
    """Make the checkpoint in `out` unless it is there; a run that is cut short leaves no half of one behind."""
    if (out / "config.json").exists():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} is there and is no checkpoint (it has no config.json): name another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        make_tokenizer(work)
        make_model(work)
        work.chmod(0o755)
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    made = make(parser.parse_args().out.resolve())
    print(f"{made}: {sum(f.stat().st_size for f in made.iterdir()) / 1e6:.1f} MB")
