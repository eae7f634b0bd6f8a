"""What the vision tower makes of a batch of images, made once in a search and shared by its candidates."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

ROOM = 1 << 30
"""Bytes of features that are kept; the oldest go first."""


@dataclasses.dataclass
class Kept:
    """One call of `get_image_features`: what it was given, what it gave, and the seconds that it took."""

    given: tuple[Any, ...]
    made: Any
    seconds: float
    bytes: int


class SharedFeatures:
    """Shares the features of a batch between runs that ask about the same batch, bit for bit.

    A run is served only where it gives the tower the same tensors and reads nothing in it: methods with hooks in the tower
    (pruners, edits of its MLPs) and noised images run it themselves. `saved` counts the seconds of the calls that were served,
    so that a candidate's time can be told as if it had run alone. A model without `get_image_features` shares nothing.
    """

    def __init__(self, model: Any, clock: Callable[[], float], room: int = ROOM):
        self.clock, self.room, self.saved = clock, room, 0.0
        inner = getattr(model, "model", None)
        self.inner = inner if hasattr(inner, "get_image_features") else None
        self.kept: OrderedDict[Hashable, list[Kept]] = OrderedDict()

    @contextlib.contextmanager
    def of(self, batch: Hashable) -> Iterator[None]:
        """Share within this batch, which every run names alike."""
        if self.inner is None or "get_image_features" in vars(self.inner):  # somebody else has replaced it
            yield
            return
        run = self.inner.get_image_features

        @functools.wraps(run)  # `generate` reads the names of its arguments
        def get_image_features(*given: Any, **named: Any) -> Any:
            return self._features(batch, run, given, named)

        self.inner.get_image_features = get_image_features
        try:
            yield
        finally:
            del self.inner.get_image_features

    def _features(self, batch: Hashable, run: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() or self._watched():
            return run(*given, **named)
        asked = (*given, *(named[key] for key in sorted(named)))
        for kept in self.kept.get(batch, ()):
            if _same(kept.given, asked):
                self.kept.move_to_end(batch)
                self.saved += kept.seconds
                return kept.made
        start = self._now()
        made = _lean(run(*given, **named))
        seconds = self._now() - start
        size = sum(t.numel() * t.element_size() for t in _tensors((asked, made)))
        if size <= self.room:
            self.kept.setdefault(batch, []).append(Kept(asked, made, seconds, size))
            self.kept.move_to_end(batch)
            while sum(k.bytes for calls in self.kept.values() for k in calls) > self.room:
                self.kept.popitem(last=False)
        return made

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()

    def _watched(self) -> bool:
        """Whether a hook that is not transformers' own sits outside of the language model."""
        assert self.inner is not None
        decoder = getattr(self.inner, "language_model", None)
        language = {*decoder.modules()} if isinstance(decoder, torch.nn.Module) else set()
        return any(
            not str(getattr(hook, "__module__", "")).startswith("transformers.")
            for module in self.inner.modules()
            if module is not self.inner and module not in language
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )


def _lean(made: Any) -> Any:
    """The output without what only an observer of the tower reads."""
    for name in ("hidden_states", "attentions"):
        if getattr(made, name, None) is not None:
            setattr(made, name, None)
    return made


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _tensors(each)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return bool(type(a) is type(b) and a == b)
