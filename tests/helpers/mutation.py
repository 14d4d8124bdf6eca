"""Programs with one call taken out: some test must miss each call of a collective, replaced by its first argument."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).parents[2]


LATER = frozenset({"start_all_gather", "start_reduce_scatter", "pass_on"})
"""Calls whose result is waited for; replaced by something that has nothing to wait for."""


@dataclass(frozen=True, order=True)
class Site:
    """A call in the source: the `occurrence`-th call of `name` in `function` of `module`."""

    module: str
    function: str
    name: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.module}:{self.function}:{self.name}#{self.occurrence}"


def sites(module: str, names: frozenset[str]) -> list[Site]:
    """Every call of one of `names`, as a function or a method, in the functions of `module`."""
    tree = ast.parse(_source(module))
    found = []
    for function, node in _functions(tree):
        counts: dict[str, int] = {}
        for call in _calls(node, names):
            name = _name(call)
            found.append(Site(module, function, name, counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1
    return found


@contextmanager
def without(site: Site) -> Iterator[None]:
    """Inside, the call at `site` returns its first argument and does nothing."""
    target = _function_at(site)
    kept = target.__code__
    target.__code__ = _mutated(site, kept)
    try:
        yield
    finally:
        target.__code__ = kept


def _mutated(site: Site, like: CodeType) -> CodeType:
    tree = ast.parse(_source(site.module))
    node = dict(_functions(tree))[site.function]
    call = [call for call in _calls(node, frozenset({site.name}))][site.occurrence]
    _Replace(call).visit(tree)
    module = compile(ast.fix_missing_locations(tree), like.co_filename, "exec")
    return _code_at(module, site.function.split("."), like)


def _code_at(code: CodeType, path: list[str], like: CodeType) -> CodeType:
    for name in path:
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    assert code.co_freevars == like.co_freevars, f"{path}: a closure cannot be replaced"
    return code


class _Replace(ast.NodeTransformer):
    def __init__(self, call: ast.Call) -> None:
        self.call = call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if node is not self.call:
            return self.generic_visit(node)
        if _name(node) in LATER:
            at_once = ast.parse("(lambda kept: type('AtOnce', (), {'wait': lambda self: kept})())", mode="eval").body
            return ast.copy_location(ast.Call(at_once, [node.args[0]], []), node)
        return node.args[0]


def _function_at(site: Site) -> FunctionType:
    found = importlib.import_module(site.module)
    for name in site.function.split("."):
        found = inspect.getattr_static(found, name)
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found)  # type: ignore[arg-type]
    assert isinstance(found, FunctionType), site
    return found


def _source(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _calls(node: ast.AST, names: frozenset[str]) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call) and _name(call) in names and call.args]


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
