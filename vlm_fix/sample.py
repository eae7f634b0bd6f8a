"""A labelled question, as calibration takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One labelled question: the processor's output for one prompt (batch 1, ends where the answer begins).

    target is the token id of the right answer's first token, other that of the wrong one. vocabulary: word -> id of its
    first token, for the concept words that a method asks for (all samples share one). answers: token ids [1, t] of a
    truthful and of a hallucinated answer to the same prompt, for methods that calibrate on pairs.
    """

    inputs: dict[str, Tensor]
    target: int
    other: int
    vocabulary: dict[str, int] = field(default_factory=dict, repr=False)
    answers: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
