"""Make tiny random checkpoints of many families of models: scripts/make_family_models OUT [FAMILY ...]

A few MB each, BF16, without tokenizers; for tests that load each family with SGLang (``families.py`` has the shapes).
Same interpreter and library versions: same files. A complete one is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scripts.models.families import FAMILIES, TEXT, Family

SEED = 20260117


def _config(family: Family) -> Any:
    import transformers

    text = TEXT | family.text
    if family.whole is None:
        return getattr(transformers, family.config)(**text)
    shared = {name: text[name] for name in ("tie_word_embeddings", "initializer_range")}
    return getattr(transformers, family.config)(text_config=text, **shared, **family.whole)


def write(family: Family, out: Path) -> None:
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    model = getattr(transformers, family.model)(_config(family)).to(torch.bfloat16)
    model.save_pretrained(out)
    if family.written:
        file = out / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | family.written, indent=1) + "\n")
    if family.extra or family.renamed or family.transposed:
        _as_published(family, out / "model.safetensors")
    if family.indexed:
        _index(out / "model.safetensors")


def _index(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        where = dict.fromkeys(tensors.keys(), file.name)
    about = {"metadata": {"total_size": file.stat().st_size}, "weight_map": where}
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(about, indent=1) + "\n")


def _as_published(family: Family, file: Path) -> None:
    """Names and layouts of the family's own checkpoints."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(file).items():
        if family.renamed and family.renamed[1] not in name:
            name = name.replace(*family.renamed)
        if name.endswith(family.transposed or "none"):
            tensor = tensor.transpose(-1, -2).contiguous()
        tensors[name] = tensor
    for name, shape in family.extra.items():
        tensors[name] = (0.1 * torch.randn(shape)).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})


def make(folder: Path, name: str) -> Path:
    """Make ``folder/name`` unless it is there; a run that is cut short leaves no half of one behind."""
    out = folder / name
    if (out / "config.json").exists():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder))
    try:
        write(FAMILIES[name], work)
        work.chmod(0o755)
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("family", nargs="*", choices=[[], *FAMILIES], help="default: all")
    args = parser.parse_args()
    for name in args.family or FAMILIES:
        made = make(args.out.resolve(), name)
        print(f"{made}: {sum(f.stat().st_size for f in made.iterdir()) / 1e6:.1f} MB", flush=True)
