"""The order of generate's logits processors: ours first, as in official code, then generate's own and the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

ALWAYS_LEAVE_ONE = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)


class Ordered(LogitsProcessorList):
    """`ours`, then `theirs`. Where these forbid every token that ours have left, the model's own scores stand in for ours."""

    def __init__(self, ours: Sequence[Any], theirs: Sequence[Any], check: Callable[[torch.Tensor], None]):
        super().__init__([*ours, *theirs])
        self.check, self.ours, self.theirs = check, LogitsProcessorList(ours), LogitsProcessorList(theirs)
        self.may_forbid = not all(isinstance(p, ALWAYS_LEAVE_ONE) or getattr(p, "reads_only", False) for p in theirs)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        new = self.ours(input_ids, scores)
        self.check(new)
        new = self.theirs(input_ids, new, **kwargs)
        if self.ours and self.may_forbid:
            nothing = torch.isneginf(new).all(dim=-1, keepdim=True)
            if bool(nothing.any()):
                new = torch.where(nothing, self.theirs(input_ids, scores, **kwargs), new)
        return new


def kept_apart(function: Any, outside: Callable[[], AbstractContextManager[None]]) -> Any:
    """`function`, which may run the model, called in `outside()`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with outside():
            return function(*args, **kwargs)

    run.reads_only = getattr(function, "reads_only", False)  # type: ignore[attr-defined]
    return run


class StreamerApart(BaseStreamer):
    """A caller's streamer, whose code may run the model, called in `outside()`."""

    def __init__(self, inner: Any, outside: Callable[[], AbstractContextManager[None]]):
        self.inner, self.outside = inner, outside

    def put(self, value: Any) -> None:
        with self.outside():
            self.inner.put(value)

    def end(self) -> None:
        with self.outside():
            self.inner.end()


def ordered(
    ours: Sequence[Any],
    theirs: Sequence[Any],
    outside: Callable[[], AbstractContextManager[None]],
    check: Callable[[torch.Tensor], None],
) -> Ordered:
    """The list that generate calls; its own guidance, which runs the model, does so in `outside()`.

    check: gets the scores [B, V] that methods have left, before generate's own processors.
    """
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor
    return Ordered(ours, [kept_apart(p, outside) if isinstance(p, guidance) else p for p in theirs], check)
