"""A sweep over heads: which of them answer more questions right when a method acts in them alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import vlm_fix
from vlm_fix import Sample, VlmFixError
from vlm_fix.calibration.search import accuracy, answer_scores
from vlm_fix.families import arch_of


def better_heads(
    model: Any, method: Any, layers: Sequence[int], samples: Sequence[Sample], progress: Callable[[str, float], None]
) -> tuple[str, ...]:
    """The heads of `layers` as layer.head; `method` has a `head_list`. VlmFixError where no head answers more."""
    heads = arch_of(model).heads

    def right(tried: Any) -> float:
        with vlm_fix.wrapped(model, tried if tried else "baseline"):
            return accuracy(answer_scores(model, samples))

    before = right(None)
    names = [f"{layer}.{h}" for layer in layers for h in range(heads)]
    gains = {}
    for i, name in enumerate(names):
        progress(name, i / len(names))
        gains[name] = right(dataclasses.replace(method, head_list=(name,), layers=None)) - before
    better = tuple(name for name, gain in gains.items() if gain > 0)
    if not better:
        raise VlmFixError(
            f"{method.name}: calibrating no head alone answered more samples right; try another threshold, or more samples."
        )
    return better
