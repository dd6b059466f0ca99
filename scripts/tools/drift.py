"""Looks up every hook's target in SGLang's wheels, by source and without importing them.

    scripts/drift [VERSION ...]      default: the versions that have pins, and the newest that the registry offers

A hook needs one of its targets.  Exit status 1 if a version that has pins lacks one; for any other it is only said.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mixquant_sglang.host.hooks.table import HOOKS, Hook

ROOT = Path(__file__).resolve().parents[2]
PINS = sorted(p.stem.removeprefix("sglang-") for p in (ROOT / "scripts" / "pins").glob("sglang-*.txt"))
NEWEST = "newest"


def fetch(version: str, folder: Path) -> str:
    """Unpacks the wheel of ``version`` without what it depends on; returns the version that came."""
    uv = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
    asked = "sglang" if version == NEWEST else f"sglang=={version}"
    subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--target", folder, asked], check=True)
    return next(folder.glob("sglang-*.dist-info")).name.split("-")[1].removesuffix(".dist")


def names_of(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or class body defines, also under ``if`` and ``try``, and what it imports."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            # a class that is built again from itself (ServerArgs in 0.5.23) stays the class
            found = {**{target.id: node for target in node.targets if isinstance(target, ast.Name)}, **found}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.If | ast.Try):
            found |= names_of([*node.body, *node.orelse])
    return found


def file_of(site: Path, module: str) -> Path | None:
    base = site.joinpath(*module.split("."))
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.exists():
            return file
    return None


def find(site: Path, module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Where ``name`` of ``module`` is defined, followed through imports: the module there, and the definition."""
    file = file_of(site, module)
    node = names_of(ast.parse(file.read_text(encoding="utf-8")).body).get(name) if file else None
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        return find(site, node.module, original)
    return (module, node) if node is not None else None


def has(site: Path, module: str, node: ast.ClassDef, name: str) -> bool:
    """Whether the class has ``name``, itself or from a base that can be found."""
    if name in names_of(node.body):
        return True
    for base in node.bases:
        found = find(site, module, base.id) if isinstance(base, ast.Name) else None
        if found and isinstance(found[1], ast.ClassDef) and has(site, found[0], found[1], name):
            return True
    return False


def exists(site: Path, target: str) -> bool:
    """Whether the dotted ``target`` is defined below ``site``: a name of a module, or of a class of a module."""
    owner, _, name = target.rpartition(".")
    if file_of(site, owner):
        return find(site, owner, name) is not None
    module, _, cls = owner.rpartition(".")
    found = find(site, module, cls)
    return found is not None and isinstance(found[1], ast.ClassDef) and has(site, found[0], found[1], name)


def wanted(site: Path, hook: Hook) -> bool:
    name = hook.only_with
    return not name or file_of(site, name) is not None or exists(site, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=[*PINS, NEWEST], metavar="VERSION")
    status, seen = 0, set()
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as folder:
            got = fetch(version, Path(folder))
            if got in seen:
                print(f"SGLang {got} is the {version}")
                continue
            seen.add(got)
            gone = [
                hook
                for hook in HOOKS
                if wanted(Path(folder), hook) and not any(exists(Path(folder), target) for target in hook.targets)
            ]
        print(f"SGLang {got}: {len(HOOKS) - len(gone)} of {len(HOOKS)} hooks have a target")
        for hook in gone:
            print(f"  {hook.handler}: no {' nor '.join(hook.targets)}; it {hook.why}")
        status |= bool(gone) and got in PINS
    return status


def command() -> None:
    sys.exit(main())
