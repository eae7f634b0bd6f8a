"""Copies of a wrapped model, by deepcopy, pickle or torch.save: each is wrapped with the same methods, by its own engine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from vlm_fix.method import Method
from vlm_fix.wing import Host

PROTOCOL = ("__deepcopy__", "__reduce_ex__")


def install(engine: Any, wrap: Callable[[Any, list[Method]], Any]) -> None:
    """Let Python's copying find its way around the engine; undone with the engine."""
    model = engine.model

    def deepcopied(memo: dict[int, Any]) -> Any:
        with engine.away():
            plain = copy.deepcopy(model, memo)
        return wrap(plain, engine.methods)

    def reduced(protocol: int) -> Any:
        tensors = itertools.chain(model.parameters(), model.buffers())
        with engine.away():  # a second tree of modules over the same tensors, which can be pickled when we are back
            plain = copy.deepcopy(model, {id(t): t for t in tensors})
        return wrap, (plain, engine.methods)

    vars(model).update(zip(PROTOCOL, (deepcopied, reduced), strict=True))


def remove(host: Host) -> None:
    """Give the model Python's own copying back."""
    for name in PROTOCOL:
        vars(host.model).pop(name, None)
