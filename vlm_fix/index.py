"""The methods' names, kinds and first sentences, read from their source: importing them would import torch, which is slow.

A name or kind is a string in the body of a class or of one it derives from, in this package or in a third party's module.
Where that is not so, `entries` says None, and the registry, which imports everything, has to be asked.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

METHODS, ROOT = "vlm_fix.methods", ("vlm_fix.method", "Method")


class Entry(NamedTuple):
    """A method class, as its file has it; `about` is the docstring's first line."""

    name: str
    kind: str
    about: str
    module: str
    cls: str


class _Unreadable(Exception):
    """What is sought is not written down as a plain string."""


class _Module:
    """Classes and imported names of a source file."""

    def __init__(self, name: str, file: Path) -> None:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.imported: dict[str, tuple[str, str]] = {}
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        guarded = [inner for node in tree.body if isinstance(node, ast.If) for inner in node.body]  # if TYPE_CHECKING
        for node in (*tree.body, *guarded):
            if isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                where = ".".join(filter(None, (base, node.module)))
                self.imported |= {each.asname or each.name: (where, each.name) for each in node.names}


def entries() -> list[Entry] | None:
    """All methods by kind and name, the baseline too; None where the source of one of them does not say enough."""
    try:
        files = {ROOT[0]: _file(ROOT[0]), **dict(_own())}
        files |= {point.value: _file(point.value) for point in entry_points(group=METHODS)}
        found = [entry for name, file in files.items() for entry in _methods(name, file)]
    except (_Unreadable, OSError, SyntaxError, ValueError, ImportError):
        return None
    return sorted(found, key=lambda entry: (entry.kind, entry.name))


def _own() -> Iterator[tuple[str, Path]]:
    folder = _file(METHODS).parent
    for file in sorted(folder.rglob("*.py")):
        if file.name != "__init__.py":
            yield ".".join([METHODS, *file.relative_to(folder).with_suffix("").parts]), file


def _methods(name: str, file: Path) -> Iterator[Entry]:
    for cls, node in _read(name, file).classes.items():
        if (name, cls) != ROOT and _is_method(name, cls) and (called := _text(name, cls, "name")) != "method":
            lines = (ast.get_docstring(node) or "").splitlines() or [""]
            yield Entry(called, _text(name, cls, "kind"), lines[0], name, cls)


@functools.cache
def _read(name: str, file: Path) -> _Module:
    return _Module(name, file)


@functools.cache
def _file(name: str) -> Path:
    """The source of a module; nothing but the package at its top is asked where it lies."""
    top, *rest = (METHODS, *name.removeprefix(METHODS).split(".")[1:]) if name.startswith(METHODS) else name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.origin:
        raise _Unreadable(name)
    if not rest:
        return Path(spec.origin)
    place = Path(spec.origin).parent.joinpath(*rest)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _home(module: str, name: str) -> tuple[str, str] | None:
    """The module that defines the class known as `name` in `module`; None for what comes from elsewhere."""
    try:
        source = _read(module, _file(module))
    except (_Unreadable, OSError):
        return None
    if name in source.classes:
        return module, name
    return _home(*source.imported[name]) if name in source.imported else None


def _bases(module: str, cls: str) -> Iterator[tuple[str, str]]:
    for base in _read(module, _file(module)).classes[cls].bases:
        base = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
        if isinstance(base, ast.Name) and (home := _home(module, base.id)):
            yield home


@functools.cache
def _is_method(module: str, cls: str) -> bool:
    return (module, cls) == ROOT or any(_is_method(*base) for base in _bases(module, cls))


@functools.cache
def _text(module: str, cls: str, attribute: str) -> str:
    """The string that the class or the nearest class above it gives the attribute."""
    for node in _read(module, _file(module)).classes[cls].body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == attribute and isinstance(node, ast.AnnAssign | ast.Assign):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
            raise _Unreadable(f"{module}.{cls}.{attribute}")
    for base in _bases(module, cls):
        if base == ROOT or _is_method(*base):
            return _text(*base, attribute)
    raise _Unreadable(f"{module}.{cls}.{attribute}")
