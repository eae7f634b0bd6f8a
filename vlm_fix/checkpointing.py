"""Gradient checkpointing: layers that are computed again in the backward pass find the session of their forward.

A layer's second run must do what its first did, so it gets the session as it stood before the first. transformers runs
layers through `_gradient_checkpointing_func`, of their own or of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.memory import with_rows
from vlm_fix.session import Session
from vlm_fix.wing import Host

NAME = "_gradient_checkpointing_func"


@dataclass
class Given:
    """A part of a session: what methods knew before its first checkpointed layer, if no gradient is owed to it."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    known: bool = False


class Kept:
    """transformers' function, which also carries what runs on the model over to the second run."""

    def __init__(self, host: Host, function: Callable[..., Any]):
        self.host, self.function = host, function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session = self.host.session
        if session is None:
            return self.function(run, *args, **kwargs)
        given = session.part(Given)
        if not given.known:
            given.tensors, given.known = [x for x in numbers(session) if not x.requires_grad], True
        before, running = session.copied(), vars(self.host.running).copy()
        again = reentrant = False

        def once_more(*args: Any, **kwargs: Any) -> Any:
            nonlocal again, reentrant
            if not again:
                again, reentrant = True, not torch.is_grad_enabled()
                return run(*args, **kwargs)
            mine, now = vars(self.host.running).copy(), before.copied()
            owed = marked(now, given.tensors) if reentrant else []
            vars(self.host.running).update(running, session=now)
            try:
                output = run(*args, **kwargs)
            finally:
                vars(self.host.running).update(mine)
            if owed and depends(output[0] if isinstance(output, tuple) else output, owed):
                names = ", ".join(m.name for m in self.host.active)
                raise VlmFixError(
                    f"{names}: reentrant gradient checkpointing loses the gradients of what one layer tells later ones; call "
                    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
                )
            return output

        return self.function(once_more, *args, **kwargs)


def numbers(session: Session) -> Iterator[torch.Tensor]:
    """The floating-point tensors that methods remember in a session."""
    found: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return x

    with_rows(session.states, note)
    return (x for x in found if x.is_floating_point())


def marked(session: Session, but: list[torch.Tensor]) -> list[torch.Tensor]:
    """Let the numbers that layers have told be leaves of the graph, so that it shows who used them; returns them."""
    leaves: list[torch.Tensor] = []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or any(x is other for other in but):
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    states = with_rows(session.states, leaf)
    for one in (session, *session.views.values()):
        one.states = states
    return leaves


def depends(output: torch.Tensor, leaves: list[torch.Tensor]) -> bool:
    """True if `output` was computed from one of the leaves."""
    ids, seen, todo = {id(x) for x in leaves}, set[Any](), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in ids:
            return True
        todo += [n for n, _ in node.next_functions]
    return False


def keep(host: Host) -> None:
    """Before a forward: have every checkpointed layer keep its session."""
    for module in (host.language, *host.language.layers):
        function = vars(module).get(NAME)
        if function is not None and not isinstance(function, Kept):
            setattr(module, NAME, Kept(host, function))


def remove(host: Host) -> None:
    """Give the layers transformers' own function back."""
    for module in (host.language, *host.language.layers):
        function = vars(module).get(NAME)
        if isinstance(function, Kept):
            setattr(module, NAME, function.function)


def refuse_unknown() -> None:
    """VlmFixError if a backward pass computes a layer again whose session is not known."""
    if torch._C._current_graph_task_id() != -1:
        raise VlmFixError(
            "activation checkpointing of this kind computes layers again without what the methods know: use "
            "model.gradient_checkpointing_enable(), or unwrap the model for training."
        )
