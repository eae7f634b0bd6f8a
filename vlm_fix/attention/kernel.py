"""Row kernel: compute the edited rows of one attention layer exactly, without a q x K matrix of all rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vlm_fix.method import shaped
from vlm_fix.rows import Rows

from .edits import AttentionEdit, Changes, Unchanged
from .inputs import QueryRows
from .scores import Scores
from .stages import NO_EDITS, LayerEdits

__all__ = ["Scores", "column_means", "edited_heads", "edited_rows", "edited_weights", "note_changes"]

MIN_ROWS = 64  # of a chunk that leaves out columns
CHUNK_BYTES = 4 * 2**20  # float32 score memory per chunk of rows, twice that on CUDA; an edit may hold a few times that


def edited_rows(
    inputs: QueryRows,
    edits: LayerEdits = NO_EDITS,
    record: Callable[[torch.Tensor, int], None] | None = None,
    windowed: bool = False,
    unedited: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of R rows under `edits`, in float32 [B, H, R, D].

    Stages follow each other as in `attention.edits`; within a stage, edits follow the order of the stack.
    record(a [B, H, r, K], i): called with the edited weights of rows i to i + r, chunk by chunk.
    windowed: score edits see 0 in the columns that a row may not see, as if a sliding window had dropped them already.
    unedited() [B, H, R, D]: the output of rows whose weights no edit changes; called only where there may be some.
    """
    query, key, value, *_ = inputs
    step = _step(query, key)
    single_chunk = step >= query.shape[2]
    shape, compute = (*query.shape[:3], value.shape[-1]), torch.promote_types(query.dtype, torch.float32)
    # allocated before any chunk, whose memory is used again
    out = None if single_chunk else query.new_empty(shape, dtype=compute)
    for i in range(0, query.shape[2], step):
        part = slice(i, i + step)
        own, chunk = (edits, inputs) if single_chunk else (edits.part(part), inputs.part(part))
        changed: list[torch.Tensor] | None = None if unedited is None else []
        a = edited_weights(chunk, own, windowed, changed)
        if record:
            record(a, i)
        for place, reader in own.stages.weight_readers:
            reader.read_weights(a, own.rows[place])
        moved = functools.reduce(torch.logical_or, changed) if changed else None
        known = moved is not None and moved.device.type == "cpu"  # elsewhere asking would wait for the device
        if unedited is not None and (moved is None or (known and not bool(moved.any()))):
            mixed = unedited()[:, :, part].to(a.dtype)
        else:
            mixed = torch.bmm(_grouped(a, key.shape[1]), value.to(a.dtype).flatten(0, 1)).view(*a.shape[:3], -1)
            if unedited is not None and moved is not None and not (known and bool(moved.all())):
                mixed = torch.where(moved[:, None, :, None], mixed, unedited()[:, :, part].to(a.dtype))
        if out is None:
            return edited_heads(mixed, edits)
        out[:, :, part] = mixed
    assert out is not None
    return edited_heads(out, edits)


def edited_weights(
    inputs: QueryRows, edits: LayerEdits = NO_EDITS, windowed: bool = False, changed: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """The edited weights of one chunk of rows, [B, H, R, K]; `changed` gets the rows [B, R] that each edit changed."""
    query, key, _, allowed, scores, _ = inputs if inputs.first is None else inputs.part(slice(None))
    compute = torch.promote_types(query.dtype, torch.float32)
    packed, keys = _grouped(query.to(compute) * scores.scaling, key.shape[1]), key.to(compute).flatten(0, 1)
    # on a CPU a product with few columns is up to three times as fast as the same one with few rows, if keys are rows
    few = packed.shape[1] <= 8 and packed.device.type == "cpu" and keys.stride(-1) == 1
    z = torch.bmm(keys, packed.mT).mT if few else torch.bmm(packed, keys.mT)
    z = z.reshape(*query.shape[:3], -1)
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    if windowed and allowed is not None:
        z = z.masked_fill(~allowed, 0) if allowed.dtype == torch.bool else z.masked_fill(allowed < 0, 0)
    for i, score_edit in edits.stages.scores:
        z = _edited(
            edits,
            i,
            score_edit,
            shaped(score_edit.edit_scores(z, edits.rows[i]), z, score_edit, "edit_scores"),
            z,
            changed,
        )
    for i, log_edit in edits.stages.log_weights:  # they multiply what the scores became, whatever the stack's order
        bias = log_edit.log_weights(edits.rows[i])
        if bias is not None:
            new = z + shaped(bias, z, log_edit, "log_weights", broadcast=True)
            z = _edited(edits, i, log_edit, new, z, changed)
    if allowed is not None and allowed.dtype == torch.bool:
        own = not (edits.stages.scores or edits.stages.log_weights)  # no edit may hold these scores
        z = z.masked_fill_(~allowed, -torch.inf) if own else z.masked_fill(~allowed, -torch.inf)
    elif allowed is not None:
        z = z + allowed
    for i, total_reader in edits.stages.total_readers:
        total_reader.read_totals(z.logsumexp(dim=-1, keepdim=True), edits.rows[i])
    a = z.softmax(dim=-1)
    if allowed is not None:  # rows of padding attend to nothing; other NaN are an edit's
        seen = allowed if allowed.dtype == torch.bool else allowed != -torch.inf
        blind = ~seen.any(dim=-1, keepdim=True)
        if blind.device.type != "cpu" or bool(blind.any()):  # elsewhere asking would wait for the device
            a = a.masked_fill(blind, 0)
    for i, weight_edit in edits.stages.weights:
        new = shaped(weight_edit.edit_weights(a, edits.rows[i]), a, weight_edit, "edit_weights")
        a = _edited(edits, i, weight_edit, new, a, changed)
    return a


def column_means(inputs: QueryRows, real: torch.Tensor) -> torch.Tensor:
    """[B, H, K]: the plain attention weight of each column, mean over the rows that see it; `real` [B, R]: rows to count.

    Computed in chunks of rows, so that no R x K matrix is formed.
    """
    query, key, first = inputs.query, inputs.key, inputs.first
    step = _step(query, key)
    if first is not None:  # columns to the right of all rows of a chunk are left out: more chunks are less work
        step = min(step, max(MIN_ROWS, -(-query.shape[2] // 8)))
    total = torch.zeros(*query.shape[:2], key.shape[2], device=query.device)
    count = torch.zeros_like(total)
    for i in range(0, query.shape[2], step):
        part = slice(i, i + step)
        chunk = inputs.part(part, None if first is None else first + i + step)
        a, rows, seen = edited_weights(chunk), real[:, None, None, part], chunk.allowed
        total[..., : a.shape[-1]] += (rows.to(a.dtype) @ a)[:, :, 0]
        counted = rows.sum(dim=-1) if seen is None else (rows.to(total.dtype) @ _boolean(seen).to(total.dtype))[:, :, 0]
        count[..., : a.shape[-1]] += counted
    return total / count.clamp(min=1)


def _step(query: torch.Tensor, key: torch.Tensor) -> int:
    """Rows of one chunk: on a CPU their scores stay in its cache, on CUDA fewer chunks are faster."""
    return max(1, CHUNK_BYTES * (1 + query.is_cuda) // (4 * query.shape[0] * query.shape[1] * key.shape[2]))


def _boolean(allowed: torch.Tensor) -> torch.Tensor:
    return allowed if allowed.dtype == torch.bool else allowed >= 0


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H, R, n] -> [B Hkv, H / Hkv R, n]: the query heads that share a key head, as rows."""
    return x.reshape(x.shape[0] * kv_heads, -1, x.shape[-1])


def edited_heads(out: torch.Tensor, edits: LayerEdits) -> torch.Tensor:
    """Apply the head edits to per-head outputs [B, H, R, D]."""
    for i, edit in edits.stages.heads:
        new = shaped(edit.edit_heads(out, edits.rows[i]), out, edit, "edit_heads")
        out = _edited(edits, i, edit, new, out, None)
    return out


def _edited(
    edits: LayerEdits,
    i: int,
    edit: AttentionEdit,
    new: torch.Tensor,
    old: torch.Tensor,
    changed: list[torch.Tensor] | None,
) -> torch.Tensor:
    new = _where(edits.masks[i], new, old)
    if edits.effects and edit.may_leave_unchanged is Unchanged.NO_ROW:  # others tell by `changed_something`
        edits.effects.note(edit, new, old)
    if changed is not None and new is not old:
        changed.append(note_changes(edit, edits.rows[i], new, old))
    return new


def note_changes(edit: AttentionEdit, rows: Rows, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """[B, R]: the rows of scores or weights [B, H, R, K] that differ; kept for `edit.changed_something`."""
    moved = (new != old).any(dim=-1).any(dim=1)
    if edit.may_leave_unchanged is not Unchanged.NO_ROW:
        rows.memory(Changes).note(rows.layer, moved)
    return moved


def _where(mask: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return new if mask is None else torch.where(mask[:, None, :, None], new, old)
