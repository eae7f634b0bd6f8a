"""The queries and keys of a self-attention module, made by the module itself."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_fix.errors import VlmFixError


def queries_and_keys(
    attn: Any, x: torch.Tensor, rotary: Any, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of self-attention [B, n, C] -> queries [B, H, n, D] and keys [B, Hkv, n, D] as the module attends with them.

    The module itself makes them, whatever it does to them; its attention function (`ask`) stops it there. `positions`
    [B, n] are its position ids.
    """
    outer, _asked.module = getattr(_asked, "module", None), attn
    try:
        attn.forward(hidden_states=x, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    except _Answer as answer:
        return answer.query, answer.key
    finally:
        _asked.module = outer
    raise VlmFixError(f"{type(attn).__name__} does not use transformers' attention interface.")


class _Answer(Exception):
    """Carries queries and keys out of a self-attention module."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor):
        self.query, self.key = query, key


_asked = threading.local()  # .module: the self-attention that is asked for its queries and keys


def ask(module: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """The attention function calls this first: it ends a run that was only meant to make queries and keys."""
    for queries in HEARD.get(module, ()):
        queries[threading.get_ident()] = query
    if getattr(_asked, "module", None) is module:
        raise _Answer(query, key)


HEARD: weakref.WeakKeyDictionary[Any, list[dict[int, torch.Tensor]]] = weakref.WeakKeyDictionary()
"""Self-attention modules whose queries [B, H, q, D] are wanted, and for each listener those of a thread's last run."""


@dataclass
class Heard:
    """Listens to a module until it is removed, like a hook."""

    module: Any
    queries: dict[int, torch.Tensor] = field(default_factory=dict)  # by thread

    def __post_init__(self) -> None:
        HEARD.setdefault(self.module, []).append(self.queries)

    def taken(self) -> torch.Tensor | None:
        """The module's last queries [B, H, q, D] in this thread, of which this lets go: ask after each of its runs."""
        return self.queries.pop(threading.get_ident(), None)

    def remove(self) -> None:
        HEARD[self.module] = [queries for queries in HEARD[self.module] if queries is not self.queries]
