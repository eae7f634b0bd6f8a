"""Edits that treat a few columns apart and all others alike, on one pass of SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_fix.session import Rows

from .edits import AttentionEdit
from .kernel import note_changes

MOST = 24  # columns apart per key head: each is one more dimension of the values


def apart_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    edit: AttentionEdit,
    rows: Rows,
    plain: Callable[[], torch.Tensor] | None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """All rows of an edit with `apart`. Shapes as `attention`: -> [B, H, q, D], None if more than MOST are apart.

    `plain() [B, H, q, D]`: what rows keep whose weights stay as they are.

    With values [v 1_rest | e_j for j apart | 1_rest] one causal pass gives sum_rest a_j v_j, the weights of the columns
    apart one by one, and the others' sum, which `reweigh` then treats as a single column. Nothing is subtracted.
    """
    dim, groups = query.shape[-1], query.shape[1] // key.shape[1]
    apart = edit.apart(rows).expand(len(query), query.shape[1], 1, key.shape[2])
    union = apart.reshape(*key.shape[:2], groups, -1).any(dim=2)  # [B, Hkv, K]
    count = int(union.sum(dim=-1).max())
    if count > MOST:
        return None
    index = union.to(torch.uint8).topk(count, dim=-1).indices  # [B, Hkv, n]
    units = value.new_zeros(*union.shape, count + 1)
    units.scatter_(2, index[:, :, None], union.gather(2, index)[:, :, None].to(value.dtype))
    units[..., count] = ~union
    extra = count + 1 + -(dim + count + 1) % 8  # fused kernels want equal head sizes, multiples of 8
    wide = pad(torch.cat([value * ~union[..., None], units], dim=-1), (0, extra - count - 1))
    query, key = pad(query, (0, extra)), pad(key, (0, extra))
    out = sdpa_attention_forward(module, query, key, wide, mask, scaling=scaling, **kwargs)[0].transpose(1, 2)
    a = out[..., dim : dim + count + 1]
    inside = apart.gather(3, index.repeat_interleave(groups, dim=1)[:, :, None])
    new = edit.reweigh(a, pad(inside, (0, 1)), rows)
    rest = out[..., :dim] * (new[..., count:] / a[..., count:].clamp(min=torch.finfo(a.dtype).tiny))
    few = value.gather(2, index[..., None].expand(-1, -1, -1, dim)).repeat_interleave(groups, dim=1)
    rest = rest + new[..., :count] @ few
    return rest if plain is None else torch.where(note_changes(edit, rows, new, a)[:, None, :, None], rest, plain())
