"""SGLang's source read without importing it: whether a name, or an attribute of a class, is there.

``Source`` is of one unpacked wheel or installed package.  A class has what its body defines or annotates (fields of
dataclasses and msgspec structs, properties), what its methods assign to ``self``, and what its bases have.  Bases
outside of SGLang are not read.  ``names_used`` finds by itself what a file of ours rests on by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

from mixquant_sglang.versions.surface import SURFACE

_SETATTR = ("setattr", "object.__setattr__")
_DOTTED = re.compile(r"sglang(\.[A-Za-z_]\w*)+")


def names_of(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or class body defines, also under ``if``, ``try`` and ``with``, and what it imports."""
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
        elif isinstance(node, ast.If):
            found |= names_of([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            found |= names_of([*node.body, *node.orelse, *(line for each in node.handlers for line in each.body)])
        elif isinstance(node, ast.With):
            found |= names_of(node.body)
    return found


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


class Source:
    """Below ``site``, the folder that holds the package ``sglang``."""

    def __init__(self, site: Path) -> None:
        self.site = site
        self._names: dict[Path, dict[str, ast.stmt]] = {}
        self._members: dict[tuple[str, str], frozenset[str]] = {}

    def exists(self, target: str) -> bool:
        """Whether there is a module ``target``, such a name of a module, or such an attribute of a class or of an
        object that a module makes (``envs = Envs()``)."""
        if self._file(target) or self.site.joinpath(*target.split(".")).is_dir():
            return True
        owner, _, name = target.rpartition(".")
        if not owner:
            return False
        if self._file(owner):
            return self._find(owner, name) is not None
        found = self._class(owner)
        return found is not None and name in self.members(*found)

    def has(self, owner: str, name: str) -> bool:
        """Whether the class ``owner`` has the attribute, or the module ``owner`` defines it or sets it on an object."""
        file = self._file(owner)
        return self.exists(f"{owner}.{name}") or (file is not None and name in _assigned(self._tree(file)))

    def elsewhere(self, target: str) -> bool:
        """Whether ``target`` belongs to a function, or to an object whose class is none of SGLang's."""
        owner = target.rpartition(".")[0]
        return self.exists(owner) and self._file(owner) is None and self._class(owner) is None

    def members(self, module: str, node: ast.ClassDef) -> frozenset[str]:
        """The attributes of a class and of its objects."""
        key = module, node.name
        if key not in self._members:
            self._members[key] = frozenset()  # bases that lead back here
            found = {*names_of(node.body), *_assigned(node, "self")}
            for base in self._bases(module, node):
                found |= self.members(*base)
            self._members[key] = frozenset(found)
        return self._members[key]

    # -- reading -------------------------------------------------------------------------------------------------------

    def _file(self, module: str) -> Path | None:
        base = self.site.joinpath(*module.split("."))
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.exists():
                return file
        return None

    @staticmethod
    def _tree(file: Path) -> ast.Module:
        return _parsed(file.resolve())

    def _find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """Where ``name`` of ``module`` is defined, followed through imports: the module there, and the definition."""
        file = self._file(module)
        if file is None:
            return None
        if file not in self._names:
            self._names[file] = names_of(self._tree(file).body)
        names = self._names[file]
        node = names.get(name)
        if isinstance(node, ast.ImportFrom):
            source = self._absolute(module, file, node)
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            if not source.startswith("sglang") or self._file(f"{source}.{original}"):
                return module, node
            return self._find(source, original)
        if node is None and isinstance(names.get("*"), ast.ImportFrom):
            for each in self._tree(file).body:
                if isinstance(each, ast.ImportFrom) and each.names[0].name == "*":
                    found = self._find(self._absolute(module, file, each), name)
                    if found:
                        return found
        return (module, node) if node is not None else None

    def _absolute(self, module: str, file: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _class(self, target: str) -> tuple[str, ast.ClassDef] | None:
        module, _, name = target.rpartition(".")
        if not module:
            return None
        found = self._find(module, name)
        if found is None and not self._file(module):  # a class in a class
            outer = self._class(module)
            inner = names_of(outer[1].body).get(name) if outer else None
            found = (outer[0], inner) if outer and inner else None
        if found is None:
            return None
        where, node = found
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            return self._class(f"{where}.{node.value.func.id}")
        return (where, node) if isinstance(node, ast.ClassDef) else None

    def _bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        names = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        for base in [*names, *self._namespaces(module, node.name)]:
            found = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield found[0], found[1]

    def _namespaces(self, module: str, name: str) -> list[ast.expr]:
        """The classes in the list ``name._NAMESPACES``, whose fields 0.5.23 gives to ServerArgs."""
        file = self._file(module)
        assert file is not None
        for node in self._tree(file).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{name}._NAMESPACES":
                listed = self._find(module, ast.unparse(node.value))
                if listed and isinstance(listed[1], ast.Assign) and isinstance(listed[1].value, ast.List):
                    return listed[1].value.elts
        return []


def _assigned(node: ast.AST, owner: str = "") -> Iterator[str]:
    """Attributes that are set on ``owner``, or on anything, by a statement or by ``setattr``."""
    for each in ast.walk(node):
        on: ast.expr | None = None
        name = ""
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            on, name = each.value, each.attr
        elif isinstance(each, ast.Call) and len(each.args) == 3 and ast.unparse(each.func) in _SETATTR:
            on, constant = each.args[0], each.args[1]
            name = str(constant.value) if isinstance(constant, ast.Constant) else ""
        if on is not None and name and owner in ("", ast.unparse(on)):
            yield name


# -- what we rest on by name -------------------------------------------------------------------------------------------


class _Names(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._bound: list[dict[str, str]] = [{}]

    def _add(self, name: str, line: int) -> None:
        self.found.setdefault(name, line)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and (node.module or "").partition(".")[0] == "sglang":
            for alias in node.names:
                self._add(f"{node.module}.{alias.name}", node.lineno)
                self._bound[-1][alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == "sglang":
                self._add(alias.name, node.lineno)
                if alias.asname:
                    self._bound[-1][alias.asname] = alias.name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._bound.append({})
        self.generic_visit(node)
        self._bound.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            for bound in reversed(self._bound):
                if node.value.id in bound:
                    self._add(f"{bound[node.value.id]}.{node.attr}", node.lineno)
                    break
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "only_with":  # what a version may lack
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            self._add(node.value, node.lineno)


@cache
def names_used(source: str) -> dict[str, int]:
    """The dotted names of SGLang in a Python file of ours, each with the line of its first use: what it imports, in
    functions too, attributes of what it imports, and strings that are such a name (targets of hooks, classes of
    blocks); not those of ``only_with``."""
    visitor = _Names()
    visitor.visit(ast.parse(source))
    return visitor.found


class Package:
    """Our own files, each with the SGLang versions that it is for: ``versions/v0_5_17.py`` for 0.5.17 alone."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> dict[Path, str]:
        """File -> the one version that it is for, or nothing."""
        return {file: self._version(file) for file in sorted(self.root.rglob("*.py"))}

    @staticmethod
    def _version(file: Path) -> str:
        named = re.fullmatch(r"v(\d+(?:_\d+)+)", file.stem)
        return named[1].replace("_", ".") if named else ""

    @property
    def versions(self) -> list[str]:
        """Those that have a file, the oldest first."""
        found = {version for version in self.files.values() if version}
        return sorted(found, key=lambda version: [int(part) for part in version.split(".")])

    def like(self, version: str) -> str:
        """The version with a file whose names ``version`` is asked for: the newest for one that has none."""
        return version if version in self.versions else self.versions[-1]

    def names(self, version: str) -> Iterator[tuple[str, str]]:
        """(dotted name, file and line) of what we use of SGLang ``version``."""
        for file, only in self.files.items():
            if only in ("", self.like(version)):
                for name, line in names_used(file.read_text(encoding="utf-8")).items():
                    yield name, f"{file.relative_to(self.root).as_posix()}:{line}"

    def rows(self, version: str) -> Iterator[tuple[str, str, str]]:
        """(class or module, attribute, where it is used) of ``SURFACE`` for SGLang ``version``."""
        for row in SURFACE:
            if not row.versions or self.like(version) in row.versions:
                yield from ((row.owner, name, row.used_in) for name in row.names)


def gone(source: Source, package: Package, version: str) -> list[str]:
    """What ``package`` uses of SGLang ``version`` and ``source`` does not have, each with where it is used."""
    names = dict(reversed([*package.names(version)]))
    lost = [f"{n} ({at})" for n, at in names.items() if not source.exists(n) and not source.elsewhere(n)]
    return lost + [f"{owner}.{n} ({at})" for owner, n, at in package.rows(version) if not source.has(owner, n)]
