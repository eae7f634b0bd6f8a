"""What a stack of edits does in one forward: the rows it reaches, its stages, and how these rows are computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.effects import Effects
from vlm_fix.rows import Rows
from vlm_fix.session import Session

from .edits import AttentionEdit, Changes, FewColumnsEdit, Unchanged
from .fused import usable
from .inputs import AttentionInputs
from .stages import LayerEdits, Stages
from .strategies import (
    AttentionPath,
    Strategy,
    by_flex,
    capped_column_factors,
    column_factors,
    few_columns,
    fused_row,
    head_scaling,
    row_kernel,
    some_heads,
)


@dataclass(frozen=True)
class Plan:
    """Made once a forward and shared by the layers that have the same stack."""

    edits: list[AttentionEdit]
    masks: list[torch.Tensor | None]  # per edit, the rows [B, R] it applies to; None: all from `first` on
    stages: Stages
    first: int  # the first row that any edit applies to
    positions: torch.Tensor  # [R]
    kinds: dict[str, torch.Tensor]  # Session.masks
    reached: torch.Tensor | None  # [B, R] rows that any edit applies to; None: all
    keeps_rows: bool  # an edit may leave rows unchanged
    strategy: Strategy | None  # None: the rows stay as they are
    effects: Effects

    @property
    def edits_all_rows(self) -> bool:
        return self.first == 0 and self.reached is None

    def for_layer(self, layer: int, session: Session) -> LayerEdits:
        """The edits with what they see in `layer`."""
        first = session.start + self.first
        rows = [
            Rows(layer, session, edit, self.positions, **self.kinds, first=first, heads=None) for edit in self.edits
        ]
        return LayerEdits(self.stages, rows, self.masks, self.effects)


def plan_of(handle: Any, session: Session, inputs: AttentionInputs, recorded: bool) -> Plan | None:
    """The plan of the layer's edits in this forward; None if none of them acts. recorded: somebody reads the weights."""
    if not handle.stack:
        return None
    place = (id(handle.stack), inputs.key.shape[2], inputs.query.device, recorded)
    if place not in session.forward.plans:
        session.forward.plans[place] = _made(handle, session, inputs, recorded)
    return session.forward.plans[place]


def _made(handle: Any, session: Session, inputs: AttentionInputs, recorded: bool) -> Plan | None:
    acting = [
        (edit, session.rows_in(edit.row_scope, edit.needs_image))
        for edit in handle.stack
        if edit.acts_in(session.branch)
    ]
    acting = [(edit, rows) for edit, rows in acting if rows.first < rows.end]
    if not acting:
        return None
    device, edits = inputs.query.device, [edit for edit, _ in acting]
    first = min(rows.first for _, rows in acting)
    masks = {rows: rows.mask(first, device) for _, rows in acting}
    handle.engine.touched.update(edits)
    prompt = session.start < session.prompt_len
    for edit in edits:
        if edit.may_leave_unchanged is Unchanged.PROMPT_ROWS and not prompt:
            session.memory(edit, Changes).in_decode_rows = True
    unchanged = {Unchanged.ANY_ROW, Unchanged.PROMPT_ROWS} if prompt else {Unchanged.ANY_ROW}
    partial = [m for m in masks.values() if m is not None]
    reached = torch.stack(partial).any(dim=0) if len(partial) == len(masks) else None
    stages, all_rows = Stages.of(edits), first == 0 and reached is None
    return Plan(
        edits,
        [masks[rows] for _, rows in acting],
        stages,
        first,
        session.positions(first, session.length, device),
        session.masks(inputs.key.shape[2], device),
        reached,
        any(edit.may_leave_unchanged in unchanged for edit in edits),
        strategy_for(stages, inputs, first, len(masks) == 1, all_rows, recorded, handle.path),
        handle.engine.effects,
    )


def strategy_for(
    stages: Stages,
    inputs: AttentionInputs,
    first: int,
    same_rows: bool,
    all_rows: bool,
    recorded: bool,
    path: AttentionPath,
) -> Strategy | None:
    """How to compute the rows from `first` on. same_rows: all edits act in the same rows; all_rows: in every row.

    SDPA over changed keys costs one more pass over all rows, the row kernel a few times its rows' share. Edits that are no
    `ColumnEdit` always go through the kernel, in chunks of rows.
    """
    if not stages.need_weights:
        return head_scaling if stages.heads else None
    if _is_fused(stages, inputs, same_rows and all_rows and not recorded, path):
        return fused_row
    query, capped = inputs.query, inputs.scores.softcap is not None
    if not recorded and stages.only_columns and same_rows and (not capped or by_flex(query, path)):
        count = query.shape[2] - first
        many = count > 1 and 4 * count >= query.shape[2]
        if path in (AttentionPath.COLUMNS, AttentionPath.FLEX) or (path is AttentionPath.AUTO and many):
            return capped_column_factors if capped else column_factors
    plain = not recorded and not capped and path is not AttentionPath.KERNEL
    exact = torch.finfo(query.dtype).bits >= 32  # below float32 its sums would be rounded
    if all_rows and query.shape[2] > 1 and _only_few_columns(stages):
        way = few_columns if plain and exact else row_kernel
        return way if recorded or capped else functools.partial(some_heads, way)
    return row_kernel


def _is_fused(stages: Stages, inputs: AttentionInputs, plain: bool, path: AttentionPath) -> bool:
    """True for one row, of which all edits see nothing but scores, on a device that runs it in one launch."""
    if not plain or inputs.query.shape[2] != 1 or inputs.windowed or torch.is_grad_enabled():
        return False
    acting = dict.fromkeys(edit for _, edit in (*stages.scores, *stages.log_weights, *stages.weights))
    if (
        stages.weight_readers
        or stages.maskers
        or not acting
        or not all(map(functools.partial(_has_form, stages), acting))
    ):
        return False
    return path is AttentionPath.FUSED or (path is AttentionPath.AUTO and usable(inputs.query))


def _has_form(stages: Stages, edit: AttentionEdit) -> bool:
    """True if one launch, or two, can run the edit of one row together with the others."""
    raw = {other for _, other in (*stages.scores, *stages.log_weights)}
    if edit.has("form_of_scores"):
        return len(raw | {other for _, other in stages.weights}) == 1
    if edit.has("transfer"):
        return len(stages.weights) == 1 and edit not in raw
    return edit.has("form") and edit.may_leave_unchanged is not Unchanged.ANY_ROW


def _only_few_columns(stages: Stages) -> bool:
    """True for a single edit of weights, of few columns, which no other edit accompanies."""
    others = stages.maskers or stages.scores or stages.log_weights or stages.weight_readers or stages.heads
    return not others and len(stages.weights) == 1 and isinstance(stages.weights[0][1], FewColumnsEdit)
