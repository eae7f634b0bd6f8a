"""Row kernel: the edited rows of one attention layer, exactly, without ever forming a q x K matrix for all rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from vlm_fix.session import Rows

from .edits import AttentionEdit
from .scores import Scores

CHUNK_BYTES = 4 * 2**20  # float32 score memory per chunk of rows, twice that on CUDA; an edit may hold a few times that


def edited_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    scores: Scores,
    edits: list[tuple[AttentionEdit, Rows, torch.Tensor | None]],
    probe: Callable[[torch.Tensor, int], None] | None = None,
    windowed: bool = False,
    plain: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of R rows under `edits`, applied in order.

    query [B, H, R, D], key and value [B, Hkv, K, D] (grouped-query heads are not repeated), allowed [B or 1, 1 or H, R, K]
    booleans or an additive float mask, or None. Each edit comes with what it sees and the rows [B, R] it applies to
    (None: all). Returns float32 [B, H, R, D]: logit edits, log-weights, mask, softmax, weight edits, value product, head
    edits.
    `probe(a [B, H, r, K], i)` sees the edited weights of rows i to i + r, chunk by chunk. `windowed`: logit edits see 0 in
    the columns a row may not see, as if a sliding window had dropped them already. `plain() [B, H, R, D]`: what rows keep
    whose weights no edit changes, asked for where there may be some.
    """
    step = _step(query, key)
    whole = step >= query.shape[2]
    shape, compute = (*query.shape[:3], value.shape[-1]), torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(shape, dtype=compute) if not whole else None  # before any chunk, whose memory is used again
    for i in range(0, query.shape[2], step):
        part, seen, visible = slice(i, i + step), edits, allowed
        if not whole:
            seen = [
                (e, dataclasses.replace(r, positions=r.positions[part]), m if m is None else m[:, part])
                for e, r, m in edits
            ]
            visible = allowed if allowed is None else allowed[:, :, part]
        changed: list[torch.Tensor] | None = None if plain is None else []
        a = edited_weights(query[:, :, part], key, visible, scores, seen, windowed, changed)
        if probe:
            probe(a, i)
        for edit, rows, _ in seen:
            if edit.edits("see"):
                edit.see(a, rows)
        moved = functools.reduce(torch.logical_or, changed) if changed else None
        known = moved is not None and moved.device.type == "cpu"  # elsewhere asking would wait for the device
        if plain is not None and (moved is None or (known and not bool(moved.any()))):
            mixed = plain()[:, :, part].to(a.dtype)
        else:
            mixed = (_grouped(a, key.shape[1]) @ value.to(a.dtype)).view(*a.shape[:3], -1)
            if plain is not None and moved is not None and not (known and bool(moved.all())):
                mixed = torch.where(moved[:, None, :, None], mixed, plain()[:, :, part].to(a.dtype))
        if out is None:
            return edited_heads(mixed, edits)
        out[:, :, part] = mixed
    assert out is not None
    return edited_heads(out, edits)


def edited_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    allowed: torch.Tensor | None,
    scores: Scores,
    edits: list[tuple[AttentionEdit, Rows, torch.Tensor | None]],
    windowed: bool,
    changed: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The edited weights of one chunk of rows, [B, H, R, K]; `changed` gets the rows [B, R] that each edit changed."""
    compute = torch.promote_types(query.dtype, torch.float32)
    packed, keys = _grouped(query.to(compute) * scores.scaling, key.shape[1]), key.to(compute)
    # on a CPU a product with few columns is up to three times as fast as the same one with few rows
    z = (keys @ packed.mT).mT if packed.shape[2] <= 8 and not packed.is_cuda else packed @ keys.mT
    z = z.reshape(*query.shape[:3], -1)
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    if windowed and allowed is not None:
        z = z.masked_fill(~allowed, 0) if allowed.dtype == torch.bool else z.masked_fill(allowed < 0, 0)
    for edit, rows, mask in edits:
        if edit.edits("logits"):
            z = _edited(edit, rows, mask, edit.logits(z, rows), z, changed)
    for edit, rows, mask in edits:  # log-weights multiply what the scores became, in whatever order edits are listed
        if edit.edits("log_weights"):
            bias = edit.log_weights(rows)
            z = z if bias is None else _edited(edit, rows, mask, z + bias, z, changed)
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else z + allowed
    a = z.softmax(dim=-1)
    if allowed is not None:
        a = a.nan_to_num(0.0)  # rows of padding attend to nothing
    for edit, rows, mask in edits:
        if edit.edits("weights"):
            a = _edited(edit, rows, mask, edit.weights(a, rows), a, changed)
    return a


def column_means(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, scores: Scores, real: torch.Tensor
) -> torch.Tensor:
    """[B, H, K]: the plain attention weight of each column, mean over the rows that see it; `real` [B, R]: rows to count.

    Arguments as in `edited_rows`; chunks of rows, so that no R x K matrix is formed.
    """
    step = _step(query, key)
    total = torch.zeros(*query.shape[:2], key.shape[2], device=query.device)
    count = torch.zeros_like(total[:, :1])
    for i in range(0, query.shape[2], step):
        rows = real[:, None, i : i + step, None]
        seen = rows if allowed is None else rows & _boolean(allowed[:, :, i : i + step])
        visible = allowed if allowed is None else allowed[:, :, i : i + step]
        total += (edited_weights(query[:, :, i : i + step], key, visible, scores, [], False) * rows).sum(dim=2)
        count = count + seen.sum(dim=2)
    return total / count.clamp(min=1)


def _step(query: torch.Tensor, key: torch.Tensor) -> int:
    """Rows of one chunk: on a CPU their scores stay in its cache, on CUDA fewer chunks are faster."""
    return max(1, CHUNK_BYTES * (1 + query.is_cuda) // (4 * query.shape[0] * query.shape[1] * key.shape[2]))


def _boolean(allowed: torch.Tensor) -> torch.Tensor:
    return allowed if allowed.dtype == torch.bool else allowed >= 0


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H, R, n] -> [B, Hkv, H / Hkv * R, n]: the query heads that share a key head, as rows."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def edited_heads(out: torch.Tensor, edits: list[tuple[AttentionEdit, Rows, torch.Tensor | None]]) -> torch.Tensor:
    """Apply the head edits to per-head outputs [B, H, R, D]."""
    for edit, rows, mask in edits:
        if edit.edits("heads"):
            out = _where(mask, edit.heads(out, rows), out)
    return out


def _edited(
    edit: AttentionEdit,
    rows: Rows,
    mask: torch.Tensor | None,
    new: torch.Tensor,
    old: torch.Tensor,
    changed: list[torch.Tensor] | None,
) -> torch.Tensor:
    new = _where(mask, new, old)
    if changed is not None and new is not old:
        changed.append(note_changes(edit, rows, new, old))
    return new


def note_changes(edit: AttentionEdit, rows: Rows, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """[B, R]: the rows of scores or weights [B, H, R, K] that differ; whether any did is kept for `edit.acted`."""
    moved = (new != old).any(dim=-1).any(dim=1)
    state, key = rows.state, ("changed", rows.layer)
    if edit.spares and state.get(key) is not True:
        some = moved.any() | state.get(key, False)
        state[key] = some if some.is_cuda else bool(some)
    return moved


def _where(mask: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return new if mask is None else torch.where(mask[:, None, :, None], new, old)
