"""The edits of one layer, sorted by the stage they act in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlm_fix.effects import Effects
from vlm_fix.rows import Rows

from .edits import (
    AttentionEdit,
    ColumnEdit,
    ColumnMasker,
    HeadEdit,
    LogWeightEdit,
    QueryKeyReader,
    ScoreEdit,
    TotalReader,
    WeightEdit,
    WeightReader,
)


class Stages(NamedTuple):
    """Per stage, the edits that act in it, each with its place in the stack. Sorted once a forward, not in every layer."""

    maskers: list[tuple[int, ColumnMasker]]
    query_key_readers: list[tuple[int, QueryKeyReader]]
    scores: list[tuple[int, ScoreEdit]]
    log_weights: list[tuple[int, LogWeightEdit]]
    columns: list[tuple[int, ColumnEdit]]  # these are in `scores` and `log_weights`, too
    total_readers: list[tuple[int, TotalReader]]
    weights: list[tuple[int, WeightEdit]]
    weight_readers: list[tuple[int, WeightReader]]
    heads: list[tuple[int, HeadEdit]]

    @classmethod
    def of(cls, edits: Iterable[AttentionEdit]) -> Stages:
        stack = list(enumerate(edits))
        return cls(
            [(i, e) for i, e in stack if isinstance(e, ColumnMasker)],
            [(i, e) for i, e in stack if isinstance(e, QueryKeyReader)],
            [(i, e) for i, e in stack if isinstance(e, ScoreEdit)],
            [(i, e) for i, e in stack if isinstance(e, LogWeightEdit)],
            [(i, e) for i, e in stack if isinstance(e, ColumnEdit)],
            [(i, e) for i, e in stack if isinstance(e, TotalReader)],
            [(i, e) for i, e in stack if isinstance(e, WeightEdit) and e.edits_weights],
            [(i, e) for i, e in stack if isinstance(e, WeightReader)],
            [(i, e) for i, e in stack if isinstance(e, HeadEdit)],
        )

    @property
    def need_weights(self) -> bool:
        """True if scores or weights of the edited rows must be known."""
        return bool(self.scores or self.log_weights or self.weights or self.weight_readers)

    @property
    def change_output(self) -> bool:
        """True if the edited rows come out different; else they are only read."""
        return bool(self.scores or self.log_weights or self.weights or self.heads)

    @property
    def only_columns(self) -> bool:
        """True if all that is done to scores and weights is `ColumnEdit.column_factors`."""
        raw = (*self.scores, *self.log_weights)
        return not (self.weights or self.weight_readers) and all(isinstance(edit, ColumnEdit) for _, edit in raw)


@dataclass(slots=True)
class LayerEdits:
    """A stack of edits in one layer: what each sees, and the rows [B, R] it applies to (None: all of them)."""

    stages: Stages
    rows: list[Rows]
    masks: list[torch.Tensor | None]
    effects: Effects | None = None  # told of what each edit changes

    def part(self, part: slice) -> LayerEdits:
        """The same for a part of the rows."""
        rows = [
            dataclasses.replace(r, positions=r.positions[part], first=None if r.first is None else r.first + part.start)
            for r in self.rows
        ]
        return LayerEdits(self.stages, rows, [m if m is None else m[:, part] for m in self.masks], self.effects)


NO_EDITS = LayerEdits(Stages.of(()), [], [])
