"""name <-> method class; spec strings such as "pai:alpha=0.2,layers=2-31"; methods of others.

A package adds methods with the entry-point group `vlm_fix.methods` (name = module that defines Method subclasses), a
script with `register`, and a spec with its file, as in "boost.py:Boost:bonus=2".
The core finds its own methods by walking the folders of `vlm_fix.methods`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from vlm_fix.errors import VlmFixError
from vlm_fix.method import Baseline, Method
from vlm_fix.spelling import STACK, split

Spec = str | Path | Method | type[Method] | Sequence["str | Path | Method | type[Method]"]
Class = TypeVar("Class", bound=type[Method])
FILE = re.compile(r"\s*([^:]*\.py)\s*(?::\s*([A-Za-z_]\w*)\s*(?=:|$))?:?(.*)", re.DOTALL)  # file, class, settings

_given: dict[str, type[Method]] = {}  # of `register`


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


def _known() -> dict[str, type[Method]]:
    return {**_classes(), **_given}


def list_methods() -> list[type[Method]]:
    """All registered method classes, by kind and name."""
    return sorted(_known().values(), key=lambda c: (c.kind, c.name))


def register(cls: Class) -> Class:
    """Make a method of your own known by its name for as long as Python runs; also a decorator, above `@dataclass`.

    `wrap(model, "its_name:bonus=2")`, `evaluate` and `list_methods` then find it. A class that is defined again, as in
    a notebook, takes the place of the old one. Returns the class. Raises VlmFixError for what is no method, for one that
    cannot be made without arguments, and for a name that is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise VlmFixError(
            f"register takes the class of a method, not {cls!r}: derive it from vlm_fix.ScoreEdit, for one."
        )
    try:
        method = cls()
    except TypeError as error:
        if "required" not in str(error):
            raise
        raise VlmFixError(f"{cls.__name__} needs a default for every parameter: {error}.") from None
    _check_name(method)
    _given[cls.name] = cls
    return cls


def get_method(name: str) -> type[Method]:
    """The class registered under `name`, or that of "file.py:Class"; VlmFixError with the nearest name if there is none."""
    known = _known()
    if name in known:
        return known[name]
    if (file := FILE.fullmatch(name)) and not file[3]:
        return _from_file(file[1], file[2])
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`vlm-fix methods` lists them."
    raise VlmFixError(f"there is no method {name!r}; {hint}")


def _from_file(file: str, cls: str | None) -> type[Method]:
    """The class `cls` of a Python file, registered; without a name the file's only method. A file is run once."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise VlmFixError(f"there is no file {file}: give its path, as in --method path/to/{path.name}:Class.")
    name = f"vlm_fix_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, VlmFixError) or not isinstance(error, Exception):
                raise
            raise VlmFixError(f"{file} cannot be run: {type(error).__name__}: {error}.") from error
    found = {
        key: value
        for key, value in vars(sys.modules[name]).items()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == name
    }
    if cls is None and len(found) == 1:
        (cls,) = found
    if cls not in found:
        what = f"no method {cls}" if cls else f"{len(found) or 'no'} methods"
        near = f"write {file}:{next(iter(found))}" if found else "derive a class from vlm_fix.ScoreEdit, for one"
        raise VlmFixError(f"{file} has {what}; {near}.")
    return register(found[cls])


def parse_spec(spec: str) -> Method:
    """ "var:sink_dims=1415|2533,rho=0.5" -> VAR(sink_dims=(1415, 2533), rho=0.5); "boost.py:Boost:bonus=2" too.

    A text with a comma, a + or a | stands in double quotes: 'marine:prompt="It shows {objects}, so"'.
    """
    if file := FILE.fullmatch(spec):
        cls = _from_file(file[1], file[2])
        name, rest = cls.name, file[3]
    else:
        name, _, rest = spec.strip().partition(":")
    if not name.strip():
        raise VlmFixError(f'{spec!r} names no method; pass a name such as "var", or "baseline".')
    if "," in name:
        raise _comma(spec, name.partition(",")[2].strip())
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in split(rest, ","))):
        key, equals, value = item.partition("=")
        if (":" in key or not equals) and key.partition(":")[0].strip() in _known():
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
    """VlmFixError for a method of one's own under another method's name, under which results would be filed."""
    cls, other = type(method), _known().get(method.name)
    if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise VlmFixError(
            f"{cls.__name__} is called {method.name!r}, as {other.__name__} of {other.__module__} is: give it a name of its "
            "own."
        )


def split_stack(text: str) -> list[str]:
    """ "var+pai:alpha=1e+2" -> ["var", "pai:alpha=1e+2"]: a + before what can be a method's spec parts them."""
    if text.strip().startswith("+") or text.strip().endswith("+"):
        raise VlmFixError(f"{text!r} has a + without a method on one side: leave it out, or name the method.")
    return [piece.strip() for piece in split(text, STACK)]


def file_of(text: str) -> str:
    """The path of a file of `vlm-fix recommend`, "@vlm-fix.yaml" or "vlm-fix.yaml"; "" for any other spec."""
    text = text.strip()
    return text.removeprefix("@") if text.startswith("@") or text.endswith((".yaml", ".yml")) else ""


def read_file(path: str | Path) -> dict[str, Any]:
    """The content of such a file (see `presets`); VlmFixError if it is none."""
    import yaml

    remedy = "make it with `vlm-fix recommend --out FILE`."
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError:
        raise VlmFixError(f"the file {path} cannot be read; {remedy}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):  # of bytes, numbers and dates, and depth
        raise VlmFixError(f"{path} is not YAML; {remedy}") from None
    stack = content.get("stack") if isinstance(content, dict) else None
    if not isinstance(stack, list) or not all(
        isinstance(row, dict) and isinstance(row.get("method"), str) for row in stack
    ):
        raise VlmFixError(f"{path} holds no stack of methods; {remedy}")
    return content


def read_stack(path: str | Path) -> list[Method]:
    """The methods of such a file; none where the model itself was best."""
    found = []
    for row in read_file(path)["stack"]:
        if FILE.fullmatch(row["method"]):  # a file of settings must not start programs
            raise VlmFixError(
                f"{path} names a program, {row['method']}: read it, then give it yourself, as in --method {row['method']}."
            )
        cls, given = get_method(row["method"]), row.get("parameters") or {}
        if not isinstance(given, dict):
            raise VlmFixError(
                f"{path}: the parameters of {cls.name} are {given!r}, where names with their values belong."
            )
        given = dict(given)
        if strange := [name for name in row if name not in ("method", "parameters")]:
            raise VlmFixError(
                f"{path}: {strange[0]} of {cls.name} has no meaning there: write parameters: {{{strange[0]}: ...}}."
            )
        unknown = [name for name in given if name not in {f.name for f in dataclasses.fields(cls)}]
        if unknown:
            raise VlmFixError(f"{path}: {cls.name} has no parameter {unknown[0]!r}; was it written by another vlm-fix?")
        if isinstance(given.get("file"), str):
            given["file"] = str(Path(path).expanduser().parent / given["file"])
        found.append(cls(**given))
    return found


def parse(spec: Spec, settings: Mapping[str, Any] | None = None) -> list[Method]:
    """A spec string, "pai+vcd" for a stack, "@vlm-fix.yaml", a Method, its class or a list of these -> methods, in that order.

    settings: parameters by name, if `spec` is a single method.
    """
    items: list[Any] = list(spec) if isinstance(spec, list | tuple) else [spec]
    items = [f"@{item}" if isinstance(item, Path) else item for item in items]
    items = [item() if isinstance(item, type) and issubclass(item, Method) else item for item in items]
    for item in items:
        if not isinstance(item, str | Method):
            raise VlmFixError(f'{item!r} is no method: pass a name such as "var", a Method, or a list of them.')
    if not items:
        raise VlmFixError('no method was given; pass a name such as "var", or "baseline".')
    for item in items:
        if isinstance(item, Method):
            _check_name(item)
    parts = [part for item in items for part in (split_stack(item) if isinstance(item, str) else [item])]
    methods: list[Method] = []
    for part in parts:
        if isinstance(part, str) and (path := file_of(part)):
            methods += read_stack(path)
        else:
            methods.append(part if isinstance(part, Method) else parse_spec(part))
    methods = methods or [Baseline()]
    if not settings:
        return methods
    if len(methods) > 1:
        stack = "+".join(method.spec() for method in methods)
        raise VlmFixError(
            f"{', '.join(settings)} may be meant for any of {stack}: write it in the spec, such as "
            f"{methods[0].name}:{next(iter(settings))}=...+{methods[1].name}."
        )
    return [methods[0].also(settings)]


def split_methods(text: str) -> list[list[str]]:
    """ "vcd,var+pai:alpha=.3,gamma=1.1" -> [["vcd"], ["var", "pai:alpha=.3,gamma=1.1"]]: runs, each a stack.

    A comma piece with "=" and no ":" is one more option of the spec before it.
    """
    runs: list[list[str]] = []
    for piece in filter(None, (p.strip() for p in split(text, ","))):
        first, *more = split_stack(piece)
        if "=" in first and ":" not in first.partition("=")[0] and runs:
            runs[-1][-1] += "," + first
            runs[-1] += more
        else:
            runs.append([first, *more])
    if text.strip() and not runs:
        raise VlmFixError(f"{text!r} names no method; `vlm-fix methods` lists them.")
    return runs
