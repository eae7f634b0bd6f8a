"""What a request may ask of the server's methods: to leave them out, or another strength; and what a server says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.hidden.edit import VisionMLPEdit
from vlm_fix.method import Method
from vlm_fix.pruning.kinds import TokenPruner
from vlm_fix.tensors import Tensors

from .engine import ServedEngine
from .refusals import check_engine
from .settings import KEY


def off(asked: Any) -> bool:
    """True if this asks for a method to be left out; 0 is a number."""
    return asked is False or asked == "off"


@dataclass(frozen=True)
class Variant:
    """The methods as one request wants them."""

    key: str
    methods: list[Method]


def variant(asked: Any, engine: ServedEngine) -> Variant:
    """asked: "off", {"alpha": 0.5} where one method is served, {"pai": {"alpha": 0.5}, "vcd": "off"}, or a spec "pai:alpha=0.5".

    Raises VlmFixError for anything else.
    """
    names = [m.name for m in engine.methods]
    if off(asked):
        changes: dict[str, Any] = dict.fromkeys(names, "off")
    elif isinstance(asked, str):
        changes = _spec(asked, names, engine)
    elif isinstance(asked, Mapping) and asked:
        changes = dict(asked) if set(asked) <= set(names) else _only(dict(asked), names)
    else:
        raise VlmFixError(f"{KEY} is {asked!r}: {_choices(engine)}")
    methods = []
    for method in engine.methods:
        told, wanted = method.name in changes, changes.get(method.name)
        if told and of_images(method, engine.arch):
            raise VlmFixError(
                f"{method.name} changes what images are for all requests of this server: it cannot change for one."
            )
        if not off(wanted):
            methods.append(_changed(method, wanted) if told else method)
    key = json.dumps({n: changes[n] for n in sorted(changes)}, sort_keys=True, default=str)
    return Variant(key, methods)


def check(asked: Any, engine: ServedEngine | None) -> None:
    """Raise VlmFixError for what this server cannot do for one request."""
    if engine is None:
        raise VlmFixError(f"{KEY} is set, but this server runs no method: start it with one, or leave {KEY} out.")
    made = ServedEngine(engine.model, variant(asked, engine).methods)
    check_engine(made)
    more = [what for what, needed in made.needs.items() if needed and not engine.needs[what]]
    if more:
        raise VlmFixError(
            f"this server was started without {more[0]}, which {KEY}={asked!r} needs: start it with that setting."
        )


def _spec(asked: str, names: list[str], engine: ServedEngine) -> dict[str, Any]:
    name, colon, rest = asked.partition(":")
    if not colon and "=" in name:
        name, rest = "", asked
    pairs = [part.partition("=") for part in rest.split(",") if part.strip()]
    wanted = {key.strip(): value.strip() for key, _, value in pairs}
    if not wanted:
        raise VlmFixError(f"{KEY} is {asked!r}: {_choices(engine)}")
    return {name.strip(): wanted} if name.strip() in names else _only({name.strip(): wanted} if name else wanted, names)


def _only(wanted: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Settings of the one method that is served."""
    if len(names) == 1 and not any(isinstance(v, Mapping) for v in wanted.values()):
        return {names[0]: wanted}
    unknown = next((n for n in wanted if n not in names), "")
    raise VlmFixError(f"{KEY}: this server runs {', '.join(names)}, not {unknown!r}.")


def _changed(method: Method, wanted: Any) -> Method:
    if not isinstance(wanted, Mapping) or not wanted:
        such = f" or settings such as {json.dumps(_strength(method))}" if strengths_of(method) else ""
        raise VlmFixError(f'{KEY}: {method.name} is {wanted!r}: give "off"{such}.')
    strengths = strengths_of(method)
    values = {}
    for name, value in wanted.items():
        if name not in strengths:
            raise VlmFixError(
                f"{KEY}: {name!r} of {method.name} cannot change for one request; "
                f"{', '.join(strengths) or 'none of its settings'} can."
            )
        try:
            values[name] = float("" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            raise VlmFixError(f"{KEY}: {method.name}'s {name} is {value!r}, which is no number.") from None
    return method.but(**values)


def strengths_of(method: Method) -> list[str]:
    """The settings that may differ from request to request: numbers that are no counts."""
    hints = typing.get_type_hints(type(method))
    return [name for name in vars(method) if hints.get(name) in (float, float | None)]


def _choices(engine: ServedEngine) -> str:
    """What a request may give, as the end of a sentence, with settings of the first method that has any."""
    shared = [m for m in engine.methods if of_images(m, engine.arch)]
    first = next((m for m in engine.methods if m not in shared and strengths_of(m)), None)
    given = [] if shared else ['"off"']
    given += [f"settings such as {json.dumps({first.name: _strength(first)})}"] if first else []
    return f"give {', or '.join(given)}." if given else f"leave it out, {shared[0].name} is for all requests."


def _strength(method: Method) -> dict[str, float]:
    """One setting as it is: alpha, or the first that the method does not share with others of its kind."""
    names = strengths_of(method)
    own = [n for n in names if n == "alpha"] or [n for n in names if n in type(method).__annotations__] or names
    value = getattr(method, own[0])
    return {own[0]: 0.5 if value is None else value}


# ---- between a server and a client that measures it ------------------------------------------------------------------


def of_images(method: Method, arch: Arch) -> bool:
    """True if the method changes an image's features, which requests share."""
    own = method.resolve(arch)
    return isinstance(own, TokenPruner) or (isinstance(own, VisionMLPEdit) and bool(own.vision_layers))


def described(methods: Sequence[Method], arch: Arch) -> list[dict[str, Any]]:
    """Methods with every setting as JSON, which a server lists with its model (GET /v1/models) and a client compares."""
    found = []
    for method in methods:
        resolved = method.resolve(arch)
        settings = {f.name: _json(getattr(resolved, f.name)) for f in dataclasses.fields(resolved)}
        found.append({"method": method.name, "images": of_images(method, arch), "settings": settings})
    return found


def wanted(methods: Sequence[Method], served: Sequence[Mapping[str, Any]], arch: Arch) -> Any:
    """What a request says to a server of `served` methods (`described`) to be answered by `methods`; None: nothing.

    Raises VlmFixError, a clause to follow the server's name, where no request can have that.
    """
    own = {one["method"]: one["settings"] for one in described(methods, arch)}
    kinds, theirs = {m.name: m for m in methods}, [one["method"] for one in served]
    missing = [name for name in own if name not in theirs]
    if missing:
        raise VlmFixError(f"serves {'+'.join(theirs) or 'no method'}, not {missing[0]}")
    if [name for name in theirs if name in own] != [*own]:
        raise VlmFixError(f"serves {'+'.join(theirs)} in this order, not {'+'.join(own)}")
    changes: dict[str, Any] = {}
    for one in served:
        name, settings = one["method"], one["settings"]
        if one.get("images") and own.get(name) != settings:
            raise VlmFixError(f"runs {name} as it is on every image")
        if name not in own:
            changes[name] = "off"
            continue
        other = {key: value for key, value in own[name].items() if settings.get(key) != value}
        for key, value in other.items():
            if key not in strengths_of(kinds[name]) or value is None:
                raise VlmFixError(
                    f"serves {name} with {key}={settings.get(key)}, not {value}, which no request can change"
                )
        if other:
            changes[name] = other
    return "off" if changes and not own else changes or None


def _json(value: Any) -> Any:
    """A setting as it comes out of JSON again; tensors as their digest."""
    if isinstance(value, Tensors):
        digest = hashlib.sha256()
        for name, tensor in sorted(value.named.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()
    return json.loads(json.dumps(value, default=str))
