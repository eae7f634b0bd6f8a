"""How a model makes its raw attention scores."""

from __future__ import annotations

from typing import NamedTuple


class Scores(NamedTuple):
    """How a model makes its raw scores: z = scaling q . k, with a soft cap c (Gemma 2) c tanh(z / c)."""

    scaling: float
    softcap: float | None = None
