"""The ways to compute the edited rows of one attention layer; `plan.strategy_for` chooses one."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from vlm_fix.effects import Effects
from vlm_fix.memory import ForwardCache
from vlm_fix.session import SLACK

from .columns import column_attention
from .edits import AttentionEdit, Changes, ColumnFactors, FewColumnsEdit, Unchanged
from .few_columns import few_columns_attention
from .flex import block_mask, flex_rows
from .forms import ScoreForm
from .fused import decode_row, raw_scores
from .inputs import AttentionInputs
from .kernel import edited_heads, edited_rows
from .stages import LayerEdits


class AttentionPath(enum.Enum):
    """Which strategies an engine may choose; tests force one of them to compare it with the others."""

    AUTO = "auto"
    KERNEL = "kernel"  # the row kernel wherever weights are needed
    COLUMNS = "columns"  # SDPA over changed keys wherever that is exact
    FUSED = "fused"  # decode rows in one launch wherever the edits have such a form
    FLEX = "flex"  # as COLUMNS, and flex_attention for softly capped scores


@dataclass(slots=True)
class LayerWork:
    """One layer of one forward: what a strategy works on."""

    inputs: AttentionInputs
    edits: LayerEdits
    first: int  # the first edited row
    cache: ForwardCache
    path: AttentionPath
    keeps_rows: bool = False  # an edit may leave some rows unchanged
    record: Callable[[torch.Tensor, int], None] | None = None  # see `edited_rows`
    known_output: torch.Tensor | None = None

    def output(self) -> torch.Tensor:
        """All rows without edits, [B, q, H, D]; computed on the first call."""
        if self.known_output is None:
            self.known_output = unedited(self.inputs, self.cache, self.path)
        return self.known_output

    def unedited_rows(self) -> torch.Tensor:
        """[B, H, R, D] without edits."""
        return (self.output()[:, self.first :] if self.first else self.output()).transpose(1, 2)

    @property
    def unedited(self) -> Callable[[], torch.Tensor] | None:
        """`unedited_rows` if some rows may keep it, None if every row is computed."""
        return self.unedited_rows if self.keeps_rows else None

    def factors(self) -> list[ColumnFactors]:
        """The factors of all column edits, for all rows of the forward."""
        made = [edit.cached_column_factors(self.edits.rows[i]) for i, edit in self.edits.stages.columns]
        return [
            own
            if own.row_factor is None
            else own._replace(row_factor=pad(own.row_factor, (0, 0, self.first, 0), value=1))
            for own in made
        ]


Strategy = Callable[[LayerWork], torch.Tensor]
"""work -> the edited rows [B, H, R, D]"""


def unedited(inputs: AttentionInputs, cache: ForwardCache, path: AttentionPath) -> torch.Tensor:
    """All rows without edits, [B, q, H, D]: SDPA, which has no kernel for softly capped scores, or what stands in for it."""
    if inputs.scores.softcap is None:
        return inputs.sdpa()
    rows = capped_rows(inputs, cache, []) if by_flex(inputs.query, path) else edited_rows(inputs.rows_from(0))
    return rows.transpose(1, 2).to(inputs.query.dtype)


def capped_rows(inputs: AttentionInputs, cache: ForwardCache, factors: list[ColumnFactors]) -> torch.Tensor:
    """All rows [B, H, q, D] of softly capped scores, by flex_attention."""
    rows, place = inputs.rows_from(0), (id(inputs.mask), inputs.key.shape[2], inputs.query.device)
    if place not in cache.block_masks:  # layers with and without a window take turns
        cache.block_masks[place] = inputs.mask, block_mask(rows.query, rows.key, rows.part(slice(None)).allowed)
    return flex_rows(rows, cache.block_masks[place][1], factors)


def by_flex(query: torch.Tensor, path: AttentionPath) -> bool:
    """Capped scores of a prompt: compiled on CUDA; elsewhere the row kernel forms less at once."""
    return query.shape[2] > 1 and (path is AttentionPath.FLEX or (path is AttentionPath.AUTO and query.is_cuda))


def head_scaling(work: LayerWork) -> torch.Tensor:
    """Edit what the heads made of the unedited weights."""
    return edited_heads(work.unedited_rows(), work.edits)


def column_factors(work: LayerWork) -> torch.Tensor:
    """Run SDPA over changed queries and keys, all rows of them."""
    rows = column_attention(work.inputs, work.factors()).transpose(1, 2)
    return edited_heads(rows[:, :, work.first :], work.edits)


def capped_column_factors(work: LayerWork) -> torch.Tensor:
    """`column_factors` of softly capped scores, by flex_attention."""
    rows = capped_rows(work.inputs, work.cache, work.factors())
    return edited_heads(rows[:, :, work.first :], work.edits)


def some_heads(strategy: Strategy, work: LayerWork) -> torch.Tensor:
    """By `strategy`, but only those heads that the one edit there is changes: the others stay SDPA's."""
    ((place, edit),) = work.edits.stages.weights
    assert isinstance(edit, FewColumnsEdit)
    inputs, rows = work.inputs, work.edits.rows[place]
    heads = edit.heads_in(rows.layer)
    if heads is None or len(heads) == inputs.query.shape[1] or torch.is_grad_enabled():
        return strategy(work)
    chosen, output = list(heads), work.unedited_rows()
    edits = replace(work.edits, rows=[replace(rows, heads=heads)])
    kept = output[:, chosen].transpose(1, 2)
    part = replace(work, inputs=inputs.of_heads(heads), edits=edits, known_output=kept)
    output[:, chosen] = strategy(part).to(output.dtype)
    return output


def few_columns(work: LayerWork) -> torch.Tensor:
    """Run SDPA over values with a dimension for each separate column; the row kernel if there are too many."""
    ((place, edit),) = work.edits.stages.weights
    assert isinstance(edit, FewColumnsEdit)
    rows = few_columns_attention(work.inputs, edit, work.edits.rows[place], work.unedited)
    return row_kernel(work) if rows is None else rows


def fused_row(work: LayerWork) -> torch.Tensor:
    """Run the one decode row in one launch, or in two where an edit has to see all heads' scores first."""
    edits, inputs = work.edits, work.inputs.rows_from(0)
    stages = edits.stages
    alone = next(((i, e) for i, e in (*stages.scores, *stages.weights) if e.has("form_of_scores")), None)
    form: ScoreForm | None
    if alone:
        known: list[torch.Tensor] = []

        def scores() -> torch.Tensor:
            known.append(raw_scores(inputs))
            return known[0]

        form = alone[1].form_of_scores(scores, edits.rows[alone[0]])
        if form is None:
            return row_kernel(work)
        if edits.effects and alone[1].may_leave_unchanged is Unchanged.NO_ROW:
            note_form(edits.effects, alone[1], form)
        rows = decode_row(inputs, form, z=known[0] if known else None)
    else:
        form, transfer, moved = form_of(work), None, None
        for i, edit in stages.weights:
            transfer = edit.transfer(edits.rows[i])
            if transfer is not None and edit.may_leave_unchanged is Unchanged.ANY_ROW:
                moved = edits.rows[i].memory(Changes).flag(edits.rows[i].layer, inputs.query.device)
        if form is None or (stages.weights and transfer is None):
            return row_kernel(work)
        rows = decode_row(inputs, form, transfer, moved)
    rows = rows.transpose(1, 2)
    return edited_heads(rows, edits) if stages.heads else rows


def note_form(effects: Effects, edit: AttentionEdit, form: ScoreForm) -> None:
    """Tell whether the form changes anything."""
    if effects.asks(edit):
        for x, neutral in ((form.up, 1.0), (form.down, 1.0), (form.bias, 0.0)):
            if x is not None:
                effects.note(edit, x, torch.full_like(x, neutral))


def form_of(work: LayerWork) -> ScoreForm | None:
    """What all edits do to the row's scores, made once a call if it holds so long; None if one has no such form."""
    edits = work.edits
    acting = {i: edit for i, edit in (*edits.stages.scores, *edits.stages.log_weights)}
    if not acting:
        return ScoreForm()
    rows = edits.rows[next(iter(acting))]
    session, width = rows.session, work.inputs.key.shape[2]
    layer = None if all(edit.same_in_all_layers for edit in acting.values()) else rows.layer
    place = (
        tuple(map(id, acting.values())),
        layer,
        width if width < session.types.shape[1] else 0,
        work.inputs.query.device,
    )
    holds = not place[2] and all(edit.form_holds for edit in acting.values())  # a window moves on with every token
    kept: dict[Any, Any] = session.columns.forms if holds else work.cache.forms
    if place in kept and (kept[place] is None or kept[place][0] >= width):
        return kept[place] and kept[place][1]
    whole = ScoreForm()
    for i, edit in sorted(acting.items()):
        own = edit.form(edits.rows[i])
        if own is None:
            kept[place] = None
            return None
        if edits.effects and edit.may_leave_unchanged is Unchanged.NO_ROW:
            note_form(edits.effects, edit, own)
        whole = whole.then(own)
    kept[place] = width + SLACK, whole.widened(width + SLACK) if holds else whole
    return kept[place][1]


def row_kernel(work: LayerWork) -> torch.Tensor:
    """Compute scores, weights and outputs of the edited rows one by one."""
    inputs = work.inputs
    return edited_rows(inputs.rows_from(work.first), work.edits, work.record, inputs.windowed, work.unedited)
