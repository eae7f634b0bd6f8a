"""Edits that change a few columns one by one and all others alike, on one pass of SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import pad

from vlm_fix.rows import Rows

from .edits import FewColumnsEdit
from .inputs import AttentionInputs
from .kernel import note_changes

MAX_SEPARATE_COLUMNS = 24  # per key head: each is one more dimension of the values


def few_columns_attention(
    inputs: AttentionInputs, edit: FewColumnsEdit, rows: Rows, unedited: Callable[[], torch.Tensor] | None
) -> torch.Tensor | None:
    """All rows [B, H, q, D] under one edit; None if it separates more than MAX_SEPARATE_COLUMNS.

    unedited() [B, H, q, D]: the output of rows whose weights stay as they are.

    With values [v 1_rest | e_j for j separate | 1_rest] one causal pass gives sum_rest a_j v_j, the weights of the separate
    columns one by one, and the others' sum, which `reweight` treats as a single column. Nothing is subtracted.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    dim, groups = value.shape[-1], query.shape[1] // key.shape[1]
    separate = edit.separate_columns(rows).expand(len(query), query.shape[1], 1, key.shape[2])
    union = separate.reshape(*key.shape[:2], groups, -1).any(dim=2)  # [B, Hkv, K]
    count = int(union.sum(dim=-1).max())
    if count > MAX_SEPARATE_COLUMNS:
        return None
    index = union.to(torch.uint8).topk(count, dim=-1).indices  # [B, Hkv, n]
    units = value.new_zeros(*union.shape, count + 1)
    units.scatter_(2, index[:, :, None], union.gather(2, index)[:, :, None].to(value.dtype))
    units[..., count] = ~union
    width = max(query.shape[-1], dim + count + 1)
    width += -width % 8  # fused kernels want equal head sizes, multiples of 8
    wide = torch.cat([value * ~union[..., None], units], dim=-1)
    query, key, wide = (pad(x, (0, width - x.shape[-1])) for x in (query, key, wide))
    own = replace(inputs, query=query, key=key, value=wide, scaling=inputs.scores.scaling)
    out = own.sdpa().transpose(1, 2)
    a = out[..., dim : dim + count + 1]
    inside = separate.gather(3, index.repeat_interleave(groups, dim=1)[:, :, None])
    new = edit.reweight(a, pad(inside, (0, 1)), rows)
    rest = out[..., :dim] * (new[..., count:] / a[..., count:].clamp(min=torch.finfo(a.dtype).tiny))
    few = value.gather(2, index[..., None].expand(-1, -1, -1, dim)).repeat_interleave(groups, dim=1)
    rest = rest + new[..., :count] @ few
    if unedited is None:
        return rest
    return torch.where(note_changes(edit, rows, new, a)[:, None, :, None], rest, unedited())
