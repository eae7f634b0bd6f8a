"""name <-> method class; spec strings such as "pai:alpha=0.2,layers=2-31"; third-party methods by entry point.

A package adds methods with the entry-point group `vlm_fix.methods` (name = module that defines Method subclasses).
The core finds its own methods the same way, by walking the folders of `vlm_fix.methods`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Sequence
from importlib.metadata import entry_points

from vlm_fix.errors import VlmFixError
from vlm_fix.method import Baseline, Method

Spec = str | Method | Sequence["str | Method"]


@functools.cache
def _classes() -> dict[str, type[Method]]:
    package = importlib.import_module("vlm_fix.methods")
    found_in = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules = [importlib.import_module(m.name) for m in found_in if not m.ispkg]
    modules += [point.load() for point in entry_points(group="vlm_fix.methods")]
    found: dict[str, type[Method]] = {Baseline.name: Baseline}
    for module in modules:
        for value in vars(module).values():
            if not (isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__):
                continue
            if value.name == Method.name:
                if inspect.isabstract(value):  # a base of others
                    continue
                raise VlmFixError(
                    f'{value.__qualname__} in {module.__name__} has no name: add name: ClassVar[str] = "...".'
                )
            other = found.setdefault(value.name, value)
            if other is not value:
                raise VlmFixError(f"two methods are called {value.name!r}: {other} and {value}; rename one.")
    return found


def list_methods() -> list[type[Method]]:
    """All registered method classes, by kind and name."""
    return sorted(_classes().values(), key=lambda c: (c.kind, c.name))


def get_method(name: str) -> type[Method]:
    """The class registered under `name`; VlmFixError with the nearest name if there is none."""
    if name in _classes():
        return _classes()[name]
    near = difflib.get_close_matches(name.lower(), _classes(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`vlm-fix methods` lists them."
    raise VlmFixError(f"there is no method {name!r}; {hint}")


def parse_spec(spec: str) -> Method:
    """ "var:sink_dims=1415|2533,rho=0.5" -> VAR(sink_dims=(1415, 2533), rho=0.5)."""
    name, _, rest = spec.strip().partition(":")
    if "," in name:
        raise _comma(spec, name.partition(",")[2].strip())
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if (":" in key or not equals) and key.partition(":")[0].strip() in _classes():
            raise _comma(spec, item)
        if not equals:
            raise VlmFixError(f"{item!r} in {spec!r} is not of the form name=value.")
        if key.strip() in options:
            raise VlmFixError(f"{key.strip()} is given twice in {spec!r}; give it once.")
        options[key.strip()] = value.strip()
    return get_method(name.strip()).from_options(options)


def _comma(spec: str, second: str) -> VlmFixError:
    stack = re.sub(rf"\s*,\s*(?={re.escape(second)})", "+", spec, count=1)
    return VlmFixError(f"{spec!r} has a comma before {second!r}: write {stack!r} for a stack, or a list.")


def _check_name(method: Method) -> None:
    """VlmFixError for a method of one's own under a registered method's name, under which results would be filed."""
    cls, other = type(method), _classes().get(method.name)
    if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise VlmFixError(
            f"{cls.__name__} is called {method.name!r}, as {other.__name__} of {other.__module__} is: give it a name of its "
            "own."
        )


def split_stack(text: str) -> list[str]:
    """ "var+pai:alpha=1e+2" -> ["var", "pai:alpha=1e+2"]: a + before what can be a method's spec parts them."""
    return [piece.strip() for piece in re.split(r"\+(?=\s*[A-Za-z_][\w-]*\s*(?:[:+,]|$))", text)]


def parse(spec: Spec) -> list[Method]:
    """A spec string, "pai+vcd" for a stack, a Method or a list of these -> methods, in the given order."""
    items: list[str | Method] = list(spec) if isinstance(spec, list | tuple) else [spec]  # type: ignore[list-item]
    for item in items:
        if not isinstance(item, str | Method):
            raise VlmFixError(f'{item!r} is no method: pass a name such as "var", a Method, or a list of them.')
    if not items:
        raise VlmFixError('no method was given; pass a name such as "var", or "baseline".')
    for item in items:
        if isinstance(item, Method):
            _check_name(item)
    parts = [part for item in items for part in (split_stack(item) if isinstance(item, str) else [item])]
    return [part if isinstance(part, Method) else parse_spec(part) for part in parts]


def split_methods(text: str) -> list[list[str]]:
    """ "vcd,var+pai:alpha=.3,gamma=1.1" -> [["vcd"], ["var", "pai:alpha=.3,gamma=1.1"]]: runs, each a stack.

    A comma piece with "=" and no ":" is one more option of the spec before it.
    """
    runs: list[list[str]] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        first, *more = split_stack(piece)
        if "=" in first and ":" not in first and runs:
            runs[-1][-1] += "," + first
            runs[-1] += more
        else:
            runs.append([first, *more])
    if text.strip() and not runs:
        raise VlmFixError(f"{text!r} names no method; `vlm-fix methods` lists them.")
    return runs
