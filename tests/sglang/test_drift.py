"""What we use of SGLang is there, read from its source as Python would import it, and all that we use is looked up."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import pytest

import mixquant_sglang
from mixquant_sglang.host import refusals, refused
from mixquant_sglang.host.hooks import registry, table
from mixquant_sglang.versions import attention, lookup, machine
from mixquant_sglang.versions.surface import SURFACE
from tests.support.accesses import accesses

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = lookup.Package(Path(mixquant_sglang.__file__).parent)
PINS = sorted(p.stem.removeprefix("sglang-") for p in ROOT.rglob("pins/sglang-*.txt"))

DATA = ("lookup.py", "surface.py", "surface_models.py")  # which name what is looked up
# Attributes of objects annotated Any that are not SGLang's own, and why.
NOT_SGLANG = {
    "a tensor's or module's of torch": (
        *("data", "dtype", "index_copy_", "index_select", "new_empty", "numel", "shape", "to", "view", "modules"),
        "named_parameters",
        "split",
    ),
    "of a transformers config": ("architectures", "quantization_config", "to_dict"),
    "Python's own": (
        *(
            "__closure__",
            "__func__",
            "__globals__",
            "__wrapped__",
            "cell_contents",
            "environ",
            "get",
            "name",
            "value",
            "values",
        ),
    ),
    "ours": (
        *(
            "MIN_TOKENS_ENV",
            "RECIPE_ENV",
            "_mixquant",
            "activation_format",
            "gemm_shapes",
            "leaves_product_now",
            "mixquant",
            "mixquant_bf16",
            "mixquant_prompt",
            "runs",
            "whole",
        ),
    ),
}


@pytest.fixture(scope="module")
def site() -> Path:
    init = next(file for file in files("sglang") or [] if str(file) == "sglang/__init__.py")
    return Path(str(init.locate())).resolve().parents[1]


@pytest.fixture(scope="module")
def source(site: Path) -> lookup.Source:
    return lookup.Source(site)


# -- the reading -------------------------------------------------------------------------------------------------------


def test_what_is_there_and_what_is_not(source: lookup.Source) -> None:
    targets = [target for hook in table.HOOKS if hook.process != "http" for target in hook.targets]
    assert [source.exists(target) for target in targets] == [_imports(target) for target in targets]
    assert all(source.exists(target) for hook in registry.hooks_of("http") for target in hook.targets)
    for none in ("sglang.srt.server_args.ServerArgs.nope", "sglang.srt.nope.X.y", "sglang.srt.server_args.nope"):
        assert not source.exists(none)


def _imports(target: str) -> bool:
    import pkgutil

    owner, _, name = target.rpartition(".")
    try:
        return hasattr(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError):
        return False


def test_names_are_found_where_they_stand() -> None:
    found = lookup.names_used(
        "import sglang.a as b\nfrom sglang.c import d, e as f\nx = 'sglang.g.h'\nHook(only_with='sglang.gone')\n"
        "def function():\n    from sglang.i import J\n    return J.k, b.l, f.m, x.n\ns = 'sglang is said'\n"
    )
    assert {*found} == {
        *("sglang.a", "sglang.c.d", "sglang.c.e", "sglang.g.h", "sglang.i.J", "sglang.i.J.k", "sglang.a.l"),
        "sglang.c.e.m",
    }
    assert found["sglang.i.J"] == 6


def test_accesses_are_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "class C:\n    def __init__(self, a: Any, n: int):\n        self._a = a\n        n.not_me\n"
        "    def f(self):\n        return self._a.one, self.not_this\n"
        "def g(b: Any, own: Own):\n    c = b.two\n    for d in c.three():\n        d.four = 1\n"
        "    own.not_that\n    return getattr(b, 'five', None), [e.six for e in b.seven], (h := b.eight).nine\n"
    )
    assert {*accesses(file)} == {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}


# -- what we use is there ----------------------------------------------------------------------------------------------


def test_nothing_is_gone_from_the_installed_sglang(source: lookup.Source) -> None:
    assert machine.sglang_version() in PACKAGE.versions
    assert lookup.gone(source, PACKAGE, machine.sglang_version()) == []


def test_each_row_says_which_versions_have_it(source: lookup.Source) -> None:
    here = machine.sglang_version()
    for row in SURFACE:
        assert {*row.versions} <= {*PACKAGE.versions}
        for name in row.names:
            assert source.has(row.owner, name) == (not row.versions or here in row.versions), f"{row.owner}.{name}"


@pytest.mark.parametrize("version", PINS)
def test_nothing_is_gone_from_the_wheels(version: str, tmp_path: Path) -> None:
    if version == machine.sglang_version():
        return  # test_nothing_is_gone_from_the_installed_sglang
    from scripts.tools import drift

    try:
        assert drift.fetch(version, tmp_path) == version
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no wheel of SGLang {version} could be fetched here (network); the installed one was looked at")
    assert lookup.gone(lookup.Source(tmp_path), PACKAGE, version) == []


# -- and what goes is missed -------------------------------------------------------------------------------------------


def _doctored(site: Path, copy: Path, module: str, edit: Callable[[str], str]) -> lookup.Source:
    """SGLang with one module edited; all the rest are links."""
    here, there = site, copy
    parts = [*module.split(".")[:-1], module.rpartition(".")[2] + ".py"]
    for part in parts:
        there.mkdir(exist_ok=True)
        if here != site:
            for each in here.iterdir():
                if each.name != part:
                    (there / each.name).symlink_to(each)
        here, there = here / part, there / part
    text = here.read_text()
    changed = edit(text)
    assert changed != text, f"nothing to change in {module}"
    there.write_text(changed)
    return lookup.Source(copy)


@pytest.mark.parametrize(
    ("module", "old", "missed"),
    [
        ("sglang.srt.model_executor.forward_batch_info", "extend_seq_lens_cpu", "ForwardBatch.extend_seq_lens_cpu"),
        ("sglang.srt.layers.layernorm", "variance_epsilon", "RMSNorm.variance_epsilon"),
        ("sglang.srt.managers.schedule_batch", "origin_input_ids", "Req.origin_input_ids"),
        ("sglang.srt.layers.radix_attention", "class RadixAttention", "radix_attention.RadixAttention "),
        ("sglang.srt.models.qwen3", "class Qwen3DecoderLayer", "qwen3.Qwen3DecoderLayer "),
        ("sglang.srt.configs.model_config", "hf_text_config", "ModelConfig.hf_text_config"),
        ("sglang.srt.model_executor.model_runner", "def load_model", "ModelRunner.load_model"),
        ("sglang.benchmark.one_batch", "class TreeCacheNamespace", "one_batch.TreeCacheNamespace"),
        ("sglang.srt.layers.rotary_embedding.base", "_is_cpu ", "rotary_embedding.base._is_cpu"),
        ("sglang.srt.environ", "SGLANG_RUST_SERVER", "SGLANG_RUST_SERVER"),
    ],
)
def test_what_is_removed_is_missed(module: str, old: str, missed: str, site: Path, tmp_path: Path) -> None:
    def rename(text: str) -> str:
        return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", f"{old.rstrip()}_renamed ", text)

    lost = lookup.gone(_doctored(site, tmp_path, module, rename), PACKAGE, machine.sglang_version())
    assert any(missed in name for name in lost), lost


def test_an_unknown_version_is_asked_for_what_the_newest_has() -> None:
    newest = PACKAGE.versions[-1]
    assert [*PACKAGE.rows("99.0")] == [*PACKAGE.rows(newest)] != [*PACKAGE.rows(PACKAGE.versions[0])]
    assert [*PACKAGE.names("99.0")] == [*PACKAGE.names(newest)]


# -- all that we use is looked up --------------------------------------------------------------------------------------


def test_every_attribute_that_we_use_has_a_row() -> None:
    known = {name for row in SURFACE for name in row.names} | {n for names in NOT_SGLANG.values() for n in names}
    for room in ("host", "versions", "layers"):
        for file in sorted((PACKAGE.root / room).rglob("*.py")):
            if file.name in DATA:
                continue
            for name, line in accesses(file).items():
                assert name in known, f"{file}:{line}: {name} has no row in versions/surface.py"


def test_every_name_that_we_ask_for_in_lists_has_a_row() -> None:
    known: dict[str, set[str]] = {}
    for row in SURFACE:
        known.setdefault(row.owner.rpartition(".")[2], set()).update(row.names)
    assert {*attention._SPECIAL_BACKEND} <= known["FlashAttentionBackend"]
    assert {*attention._SPECIAL_METADATA} <= known["FlashAttentionMetadata"]
    fields = {field.partition(".")[0] for r in refused.REFUSALS for field in (r.field, r.beside, *r.unless)}
    assert (fields - {""}) | {*refusals.WATCHING} <= known["ServerArgs"]


def test_no_exception_and_no_row_is_left_over() -> None:
    written: set[str] = set()
    for file in PACKAGE.root.rglob("*.py"):
        if file.name not in DATA:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute):
                    written.add(node.attr)
                elif isinstance(node, ast.FunctionDef):
                    written.add(node.name)
                elif isinstance(node, ast.keyword):
                    written.add(node.arg or "")
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    written |= {node.value, node.value.partition(".")[0], node.value.upper()}
    assert {f"{row.owner}.{name}" for row in SURFACE for name in row.names if name not in written} == set()
    assert {name for names in NOT_SGLANG.values() for name in names} <= written
