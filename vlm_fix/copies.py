"""Copies, by deepcopy, pickle or torch.save. One of a wrapped model is wrapped with the same methods, by its own engine; one of
a part of it is plain, as is its config's: no method acts on a part alone."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from vlm_fix.method import Method
from vlm_fix.wing import Host

PROTOCOL = ("__deepcopy__", "__reduce_ex__")


class Lent(str):
    """The name of our attention in a wrapped model's config; copies of the config get the name `before` it."""

    before: str

    def __new__(cls, name: str, before: str) -> Lent:
        self = super().__new__(cls, name)
        self.before = before
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.before

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return str, (self.before,)


def install(engine: Any, wrap: Callable[[Any, list[Method]], Any]) -> None:
    """Let Python's copying of the model and its parts find its way around the engine; undone with the engine."""
    model = engine.model

    def protocol(part: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def deepcopied(memo: dict[int, Any]) -> Any:
            with engine.away():
                plain = copy.deepcopy(part, memo)
            return wrap(plain, engine.methods) if part is model else plain

        def reduced(protocol: int) -> Any:
            tensors = itertools.chain(part.parameters(), part.buffers())
            with engine.away():  # a second tree of modules over the same tensors, which can be pickled when we are back
                plain = copy.deepcopy(part, {id(t): t for t in tensors})
            return (wrap, (plain, engine.methods)) if part is model else (_itself, (plain,))

        return deepcopied, reduced

    for part in model.modules():
        vars(part).update(zip(PROTOCOL, protocol(part), strict=True))


def remove(host: Host) -> None:
    """Give the model and its parts Python's own copying back."""
    for part in host.model.modules():
        for name in PROTOCOL:
            vars(part).pop(name, None)


@contextlib.contextmanager
def removed(host: Host) -> Iterator[None]:
    """Python's own copying, for as long as this lasts."""
    own = [(part, {name: vars(part)[name] for name in PROTOCOL if name in vars(part)}) for part in host.model.modules()]
    remove(host)
    try:
        yield
    finally:
        for part, functions in own:
            vars(part).update(functions)


def _itself(part: Any) -> Any:
    return part
