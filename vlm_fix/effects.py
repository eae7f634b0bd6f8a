"""Whether each method changes anything at all: one that always gives back what it was given is told to the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class Effects:
    """What was seen of the methods on one model. Once one has changed something, it is looked at no more."""

    def __init__(self) -> None:
        self.moved: dict[Any, bool | torch.Tensor] = {}
        self.steps = 0  # tokens of the answer so far
        self.asked = True  # False: nobody will ask, so nothing is looked at

    def next_forward(self, answer: bool) -> None:
        """A forward begins, of an answer's token if `answer`. On an accelerator methods are asked now and then, not at every
        token: after the prompt, then after 1, 2, 4, ... tokens, until each has changed something."""
        self.steps = self.steps + 1 if answer else 0
        if not answer or self.steps & (self.steps - 1):
            return
        for method, moved in list(self.moved.items()):  # another thread's forward may add one
            if isinstance(moved, torch.Tensor):
                self.moved[method] = bool(moved)

    def asks(self, method: Any) -> bool:
        """False once the method is known to change something, or if nobody wants to know."""
        return self.asked and self.moved.get(method, False) is not True

    def note(self, method: Any, new: torch.Tensor, old: torch.Tensor) -> None:
        """`method` made `new` of `old`, tensors of one shape. On an accelerator nobody waits for the answer."""
        known = self.moved.get(method, False)
        if known is True or not self.asked:
            return
        if new is old:
            self.moved.setdefault(method, False)
            return
        moved = (new != old).any()
        if moved.device.type == "cpu" and isinstance(known, bool):
            self.moved[method] = bool(moved)
        else:
            self.moved[method] = moved if known is False else moved | known.to(moved.device)

    def idle(self) -> Iterator[Any]:
        """The methods that were asked for changes and have made none. This waits for the device, for each method until one."""
        for method, moved in list(self.moved.items()):
            self.moved[method] = bool(moved)
            if not self.moved[method]:
                yield method
