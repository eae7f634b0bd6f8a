"""What a method is. The dataclass of a method is its configuration, its command-line options and its demo sliders.

A method never stores run-time state on itself: what it must remember lives in the Session of one call
(`rows.memory`, `session.memory`), as tensors that lead with the batch dimension.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.sample import Sample
from vlm_fix.spelling import spelled, split, unquoted

Layers = str | tuple[int, ...] | None
"""0-based layer indices: "2-31", "1|18-31", "2-" (to the last), or a tuple; None = the method's default."""


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Any = None,
    above: float | None = None,
    counts: bool = False,
    by_name: bool = False,
    of: str = "",
) -> Any:
    """A dataclass field with its help text and legal range, `low` and `high` included, `above` not; shown by
    `vlm-fix methods` and the demo. counts: up to 1 it is a share, above 1 a count, which must be whole. by_name: of a kind,
    so that the order of a method's own parameters stays theirs. of: it counts the model's "layers" or "token ids", from 0,
    and `resolve` refuses one that the model does not have."""
    meta = {"help": help, "low": low if above is None else above, "high": high, "choices": choices}
    meta |= {"open": above is not None, "counts": counts, "of": of}
    return dataclasses.field(default=default, metadata=meta, kw_only=by_name)


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclass one of the kinds below, as a frozen dataclass of `param` fields."""

    name: ClassVar[str] = "method"
    kind: ClassVar[str] = "method"
    paper: ClassVar[str] = ""
    needs_image: ClassVar[bool] = True
    calibrates_on: ClassVar[str] = "questions"  # what calibrate's samples ask for; "captions", or "pairs" of them
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()  # of a kind: names of which each group needs one to be written
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field -> other strengths for `recommend`
    given: ClassVar[frozenset[str]] = frozenset()  # on an instance: the fields it was made with, which no file may fill

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        _check_class(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable
        self = super().__new__(cls)
        names = [f.name for f in dataclasses.fields(cls) if not f.kw_only]
        object.__setattr__(self, "given", frozenset((*names[: len(args)], *kwargs)))
        return self

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]
        for f in dataclasses.fields(self):
            value, meta = _plain(getattr(self, f.name)), f.metadata
            object.__setattr__(self, f.name, value)
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if meta.get("choices") and value not in meta["choices"]:
                raise VlmFixError(
                    f"{self.name}: {f.name}={value!r} is not one of {', '.join(map(str, meta['choices']))}."
                )
            low, high = meta.get("low"), meta.get("high")
            if (low is not None or high is not None) and (
                not number
                or not math.isfinite(value)
                or (low is not None and (value < low or (meta.get("open") and value == low)))
                or (high is not None and value > high)
            ):
                span = (
                    f"above {low} and at most {high}"
                    if high is not None and low is not None and meta.get("open")
                    else f"between {low} and {high}"
                    if high is not None and low is not None
                    else f"at most {high}"
                    if low is None
                    else f"above {low}"
                    if meta.get("open")
                    else f"at least {low}"
                )
                raise VlmFixError(f"{self.name}: {f.name}={value!r} must be a number {span}.")
            if any(
                isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))
            ):
                raise VlmFixError(f"{self.name}: {f.name}={value!r} must be a finite number.")
            if meta.get("counts") and any(v > 1 and v % 1 for v in (value if isinstance(value, tuple) else (value,))):
                raise VlmFixError(
                    f"{self.name}: {f.name}={value!r} is neither a share up to 1 nor a count, which must be whole."
                )
            if not _fits(value, hints[f.name]):
                raise VlmFixError(f"{self.name}: {f.name}={value!r} must be {_words(hints[f.name])}.")

    def resolve(self, arch: Arch) -> Method:
        """A copy with the paper's defaults for this model filled in (layers as a tuple of indices)."""
        values = {k: v for k, v in self.defaults(arch).items() if getattr(self, k) is None}
        method = dataclasses.replace(self, **values)
        for f in dataclasses.fields(method):
            if count := {"layers": arch.depth, "token ids": arch.vocab}.get(f.metadata.get("of", "")):
                value = getattr(method, f.name)
                for index in value if isinstance(value, tuple) else () if value is None else (value,):
                    if not 0 <= index < count:
                        raise VlmFixError(
                            f"{self.name}: {f.name}={index} does not exist; there are {f.metadata['of']} 0 to {count - 1}."
                        )
        if any(f.name == "layers" for f in dataclasses.fields(method)):
            layers = parse_layers(getattr(method, "layers"), arch.depth, self.name)  # noqa: B009
            method = dataclasses.replace(method, **{"layers": layers})
        return method

    def but(self, **changes: Any) -> Self:
        """A copy with these fields changed, for which a calibration still fills the others (dataclasses.replace gives all)."""
        method = dataclasses.replace(self, **changes)
        object.__setattr__(method, "given", self.given | changes.keys())
        return method

    def also(self, settings: Mapping[str, Any]) -> Self:
        """A copy with parameters that were not given yet; VlmFixError for one that was, or that there is not."""
        for name in settings:
            self.check_parameter(name)
            if name in self.given:
                raise VlmFixError(f"{self.name}: {name} is given twice, in the spec and by name; give it once.")
        return self.but(**settings)

    @classmethod
    def check_parameter(cls, name: str) -> None:
        """VlmFixError with the nearest name for a parameter that there is not."""
        known = sorted(f.name for f in dataclasses.fields(cls))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'no parameters'}."
            raise VlmFixError(f"{cls.name} has no parameter {name!r}; {hint}")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        """Values for the fields left at None, for this model."""
        return {}

    def encoder_layers(self, arch: Arch) -> tuple[int, ...] | None:
        """Vision layers whose attention scores this method needs; None: it does not look at the vision tower."""
        return None

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """Find this method's parameters for an unwrapped model: field name -> value, as `calibrated.Calibration.found`.

        samples are labelled questions (`sample.Sample`), on the model's device; seed is for whatever is drawn;
        progress(what, share done) is called now and then. The model is left as it was. Raises VlmFixError where nothing
        is found.
        """
        floats = [
            (f.name, f.default) for f in dataclasses.fields(self) if isinstance(f.default, float) and not f.kw_only
        ]
        example = next((f", as in --search {name}={value / 2:g}|{value:g}" for name, value in floats if value), "")
        raise VlmFixError(f"{self.name} has nothing to find; search a strength with --search{example}.")

    def bake(self, model: Any) -> None:
        """Write this method into the weights of an unwrapped model, in place, so that the plain model answers as a wrapped one.

        Raises VlmFixError for methods that are no change of weights.
        """
        raise VlmFixError(f"{self.name} is no change of the weights, so no checkpoint can hold it; use it at run time.")

    @property
    def control(self) -> str:
        """The spec of what this method has to beat, at its own strength: itself without what it chooses; "": there is none."""
        return ""

    @property
    def neutral(self) -> bool:
        """True if these parameters change nothing: the engine then leaves the model's path untouched."""
        return False

    @property
    def whole_prompt(self) -> bool:
        """True if it needs the whole prompt in one forward (`Session.need_whole_prompt`)."""
        return False

    def spec(self) -> str:
        """The spec string that `parse_spec` turns back into this method, `layers` as text; tensors in memory have none."""
        hints, changed = _hints(type(self)), []  # type: ignore[arg-type]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                text = value if hints[f.name] == Layers and isinstance(value, str) else spelled(value)
                changed.append(f"{f.name}={text}")
        return self.name + (":" + ",".join(changed) if changed else "")

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Method:
        """Build from text options, as in "pai:alpha=0.2,layers=2-31"; one sentence for an unknown name or bad value."""
        hints, values = _hints(cls), {}  # type: ignore[arg-type]
        for key, text in options.items():
            cls.check_parameter(key)
            values[key] = _coerce(text, hints[key], f"{cls.name}: {key}")
        return cls(**values)


def _plain(value: Any) -> Any:
    """A field's value as Python's own: NumPy's numbers, and lists, since methods are hashable."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


@functools.cache
def _hints(cls: type[Method]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # types that were imported for type checkers alone
        return {f.name: Any for f in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    """True if a plain value is of the type `hint`; a float may be given as an int. True too for hints that are not known here."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(part, typing.get_args(hint)[0]) for part in value)
    if hint is float or hint is int:
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str) else hint is not types.NoneType


def _words(hint: Any) -> str:
    """What `_fits` accepts, as the end of a sentence."""
    if hint == Layers:
        return 'layers such as "2-31" or "1|18-31", or a tuple of whole numbers such as (2, 3)'
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    parts = [words.get(o) or f"a tuple, each of it {words.get(typing.get_args(o)[0], 'of its type')}" for o in options]
    return " or ".join(parts)


@functools.cache
def _check_class(cls: type[Method]) -> None:
    """VlmFixError for what is easily forgotten in a method of one's own: the decorator, the name, a function, its spelling."""
    for base in cls.__mro__[: cls.__mro__.index(Method)]:
        own = vars(base).get("__annotations__", {}) if issubclass(base, Method) else {}
        fields = [field for field, kind in own.items() if "ClassVar" not in str(kind)]
        if fields and "__dataclass_fields__" not in vars(base):
            raise VlmFixError(
                f"{base.__name__} has parameters ({', '.join(fields)}), but is no dataclass: write @dataclass(frozen=True) "
                "above it."
            )
    if not isinstance(cls.name, str) or cls.name == Method.name:
        raise VlmFixError(f'{cls.__name__} has no name: add name: ClassVar[str] = "{cls.__name__.lower()}" to it.')
    if not re.fullmatch(r"\w[\w-]*", cls.name):
        raise VlmFixError(f"{cls.__name__}: name={cls.name!r} does not fit a spec; use letters, digits, - and _.")
    _check_spelling(cls)
    _check_arguments(cls)
    groups = [(base, names) for base in cls.__mro__ for names in vars(base).get("one_of", ())]
    missing = [names for base, names in groups if all(getattr(cls, n) is getattr(base, n) for n in names)]
    missing += [(name,) for name in sorted(getattr(cls, "__abstractmethods__", ()))]
    if missing:
        what = ", ".join(" or ".join(names) for names in missing)
        raise VlmFixError(f"{cls.__name__} does not say what it does: write {what}, which its kind calls.")


def _check_spelling(cls: type[Method]) -> None:
    """VlmFixError for what nothing asks for, since its name is nearly that of what the kind of the method asks for."""
    fields = {f.name for f in dataclasses.fields(cls)}

    def names(base: type) -> set[str]:
        return {name for name in vars(base) if not name.startswith("_")} - fields

    theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] != "vlm_fix"]
    known = set[str]().union(*(names(base) for base in cls.__mro__ if base not in theirs))
    for base in theirs:
        for name in names(base) - known:
            if near := difflib.get_close_matches(name, known - names(base), n=1, cutoff=0.85):
                raise VlmFixError(
                    f"{base.__name__}.{name} would never be asked for: did you mean {near[0]}? If not, choose another name."
                )


def _check_arguments(cls: type[Method]) -> None:
    """VlmFixError for a function of a method of one's own that does not take what its kind hands it."""
    theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] != "vlm_fix"]
    for base in theirs:
        for name, own in vars(base).items():
            asked = next((vars(kind)[name] for kind in cls.__mro__ if kind not in theirs and name in vars(kind)), None)
            if not (isinstance(own, types.FunctionType) and isinstance(asked, types.FunctionType)) or name.startswith(
                "__"
            ):
                continue
            needed = [p for p in inspect.signature(asked).parameters.values() if p.default is p.empty and p.kind <= 1]
            try:
                inspect.signature(own).bind(*needed)
            except TypeError:
                told = ", ".join(p.name for p in needed)
                raise VlmFixError(f"{base.__name__}.{name} gets other arguments: write def {name}({told}).") from None


def shaped(new: Any, like: torch.Tensor, method: Method, function: str, broadcast: bool = False) -> Any:
    """`new`, what `function` of the method returned: VlmFixError unless it has the shape of `like`, or can be broadcast to it."""
    if isinstance(new, torch.Tensor):
        if new.shape == like.shape:
            return new
        sizes = zip(reversed(new.shape), reversed(like.shape), strict=False)
        if broadcast and new.dim() <= like.dim() and all(a in (1, b) for a, b in sizes):
            return new
    what = f"a tensor of shape {list(new.shape)}" if isinstance(new, torch.Tensor) else f"{type(new).__name__}"
    raise VlmFixError(
        f"{method.name}: {function} must return a tensor of shape {list(like.shape)}; it returned {what}."
    )


def _coerce(text: str, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in ("none", "auto"):
        return None
    if hint == Layers:
        return text
    for option in options:
        try:
            if option is bool and text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
                return text.lower() in ("true", "1", "yes", "on")
            if typing.get_origin(option) is tuple:
                return (
                    tuple(typing.get_args(option)[0](unquoted(part)) for part in split(text, r"\|"))
                    if text != "()"
                    else ()
                )
            if option in (int, float, str):
                return option(unquoted(text))
        except ValueError:
            continue
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names = " or ".join(plain.get(o, "values joined by |") for o in options if o is not type(None))
    raise VlmFixError(f"{where}={text!r} is not a valid value; it takes {names}.")


def parse_layers(value: Layers, depth: int, where: str) -> tuple[int, ...]:
    """("1|18-31", 32) -> (1, 18, ..., 31). "2-" runs to the last layer.

    Raises VlmFixError for anything else or for layers the model does not have.
    """
    if value is None:
        return tuple(range(depth))
    if isinstance(value, str):
        indices: list[int] = []
        for part in value.split("|"):
            match = re.fullmatch(r"(\d{1,18})(-(\d{1,18})?)?", part.strip())
            if not match:
                raise VlmFixError(f'{where}: layers={value!r} is not of the form "2-31", "1|18-31" or "2-".')
            first = int(match[1])
            last = first if match[2] is None else depth - 1 if match[3] is None else int(match[3])
            if match[3] and last < first:
                raise VlmFixError(f"{where}: {part.strip()} in layers={value!r} is reversed; write {last}-{first}.")
            indices += [first, *range(first, min(last, depth) + 1)]
    else:
        indices = [int(i) for i in value]
    outside = [i for i in indices if not 0 <= i < depth]
    if outside or not indices:
        raise VlmFixError(f"{where}: layers={value!r} does not fit this model, which has layers 0 to {depth - 1}.")
    return tuple(sorted(set(indices)))


def with_weights(name: str, layers: Sequence[int], arch: Arch) -> tuple[int, ...]:
    """Those of `layers` that have attention weights; VlmFixError without any."""
    found = tuple(i for i in layers if i in arch.attention)
    if not found:
        raise VlmFixError(
            f"{name}: none of the layers {', '.join(map(str, layers))} has attention weights; in this model "
            f"layers {', '.join(map(str, arch.attention))} do."
        )
    return found


def parse_heads(name: str, items: Sequence[str], arch: Arch) -> list[tuple[int, int]]:
    """("16.29", "26.9") -> [(16, 29), (26, 9)]; VlmFixError for a head that the model does not have."""
    heads = []
    for item in items:
        layer, _, head = item.partition(".")
        if not (
            layer.isdecimal()
            and head.isdecimal()
            and len(item) < 40
            and int(layer) < arch.depth
            and int(head) < arch.heads
        ):
            raise VlmFixError(
                f"{name}: {item!r} is not layer.head; layers end at {arch.depth - 1}, heads at {arch.heads - 1}."
            )
        if int(layer) not in arch.attention:
            raise VlmFixError(
                f"{name}: layer {layer} of {item!r} has no attention weights; layers {arch.attention} do."
            )
        heads.append((int(layer), int(head)))
    return heads


@dataclass(frozen=True)
class Baseline(Method):
    """The model as it is."""

    name: ClassVar[str] = "baseline"
    kind: ClassVar[str] = "baseline"
    needs_image: ClassVar[bool] = False

    @property
    def neutral(self) -> bool:
        return True
