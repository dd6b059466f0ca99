"""Which attributes our code reads or writes on objects that SGLang hands it, found by reading the code.

Such an object is a parameter or a variable that is annotated ``Any``, and whatever is taken out of one: by attribute,
by a call of its method, by a loop, and what a method keeps of it in ``self``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_NAMED = {"getattr", "hasattr", "setattr", "delattr"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef)


def accesses(file: Path) -> dict[str, int]:
    """Name of an attribute -> line of its first access."""
    found: dict[str, int] = {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            kept = _kept(node)
            for each in node.body:
                if isinstance(each, _SCOPES):
                    _of_function(each, kept, found)
        elif isinstance(node, _SCOPES):
            _of_function(node, set(), found)
    return found


def _any(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def _given(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and _any(node.annotation):
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and _any(node.annotation) and isinstance(node.target, ast.Name):
            yield node.target.id


def _root(node: ast.expr) -> str | None:
    """``x`` of x.a.b[0].c(), ``self.x`` of self.x.a."""
    while True:
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return f"self.{node.attr}"
            node = node.value
        elif isinstance(node, ast.Subscript | ast.Starred | ast.Await):
            node = node.value
        elif isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id in {"getattr", "next", "iter", "zip", "enumerate"}
            node = node.args[0] if named and node.args else node.func
        elif isinstance(node, ast.BoolOp):
            node = node.values[0]
        elif isinstance(node, ast.NamedExpr):
            node = node.value
        elif isinstance(node, ast.Name):
            return node.id
        else:
            return None


def _targets(node: ast.expr) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id


def _spread(function: ast.AST, objects: set[str]) -> set[str]:
    before = -1
    while len(objects) != before:
        before = len(objects)
        for node in ast.walk(function):
            pairs: list[tuple[ast.expr, ast.expr]] = []
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
                if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = [*zip(node.targets[0].elts, node.value.elts, strict=False)]
            elif isinstance(node, ast.For | ast.comprehension):
                sources = [node.iter]
                if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name):
                    sources = node.iter.args or sources
                if isinstance(node.target, ast.Tuple) and len(sources) == len(node.target.elts):
                    pairs = [*zip(node.target.elts, sources, strict=True)]
                else:
                    pairs = [(node.target, source) for source in sources]
            elif isinstance(node, ast.NamedExpr):
                pairs = [(node.target, node.value)]
            for target, value in pairs:
                if _root(value) in objects:
                    if isinstance(target, ast.Attribute):
                        if isinstance(target.value, ast.Name) and target.value.id == "self":
                            objects.add(f"self.{target.attr}")
                    else:
                        objects.update(_targets(target))
    return objects - {"self"}


def _kept(node: ast.ClassDef) -> set[str]:
    kept: set[str] = set()
    for function in node.body:
        if isinstance(function, _SCOPES):
            kept |= {name for name in _spread(function, {*_given(function)}) if name.startswith("self.")}
    return kept


def _of_function(function: ast.AST, kept: set[str], found: dict[str, int]) -> None:
    objects = _spread(function, {*_given(function), *kept})
    for node in ast.walk(function):
        name: str | None = None
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not own and _root(node.value) in objects:
                name = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMED:
            constant = node.args[1] if len(node.args) > 1 else None
            if isinstance(constant, ast.Constant) and _root(node.args[0]) in objects:
                name = str(constant.value)
        if name is not None:
            found.setdefault(name, node.lineno)
