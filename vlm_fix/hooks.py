"""Hooks that are taken off again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Take hooks off again at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mine(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook in this thread alone: a forward of another thread through the same module goes on as if it were not there."""
    thread = threading.get_ident()

    @torch.compiler.disable(reason="vlm-fix keeps what a hook has seen in Python, outside of graphs.")
    def here(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return here


def made(args: Any, output: Any) -> Tensor:
    """What a module made of its input [B, q, C], alone or first in a tuple; a layer of experts may put it out as [B q, C]."""
    x: Tensor = output[0] if isinstance(output, tuple) else output
    return x.view(args[0].shape) if x.dim() == 2 and args and args[0].dim() == 3 else x


def overwrite(module: torch.nn.Module, value: Tensor) -> Any:
    """A hook on `module` that writes `value` [B, C] over the last row of its output."""

    def replace(module: Any, args: Any, output: Any) -> Any:
        x = made(args, output).clone()
        x[:, -1] = value
        x = x.view_as(output[0] if isinstance(output, tuple) else output)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return module.register_forward_hook(replace)
