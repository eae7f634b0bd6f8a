"""Attention of all rows with softly capped scores, which no kernel of SDPA makes, in one pass of flex_attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .edits import ColumnFactors
from .inputs import QueryRows


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def block_mask(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None) -> BlockMask:
    """Of booleans [B or 1, 1, q, K] (float masks: what is not below 0); None: every column. Shared by layers."""
    batch, count, width = query.shape[0], query.shape[2], key.shape[2]
    if allowed is None:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    seen = (allowed if allowed.dtype == torch.bool else allowed >= 0).expand(batch, 1, count, width)

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return seen[b, 0, i, j]

    return create_block_mask(visible, batch, None, count, width, device=str(query.device))


def flex_rows(inputs: QueryRows, visible: BlockMask, factors: list[ColumnFactors]) -> torch.Tensor:
    """`edited_rows` [B, H, q, D] of all rows under `factors` alone; `visible` stands in place of `inputs.allowed`.

    Nothing of size q x K is formed on CUDA, where the pass is compiled; elsewhere flex_attention runs uncompiled, and does.
    """
    query, key, value, _, scores, _ = inputs
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    scales = [x.expand(shape) for own in factors for x in (own.scale, own.row_factor) if x is not None]
    every = torch.ones(query.shape[1], device=query.device)
    biases = [
        (own.bias.expand(shape), every if own.heads is None else own.heads) for own in factors if own.bias is not None
    ]
    cap = scores.softcap

    def score(z: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        z = z if cap is None else cap * torch.tanh(z / cap)
        for scale in scales:
            z = z * scale[b, 0, i, j]
        for bias, heads in biases:
            z = z + bias[b, 0, i, j] * heads[h]
        return z

    run = _compiled() if query.is_cuda else flex_attention
    return run(query, key, value, score, visible, scale=scores.scaling, enable_gqa=query.shape[1] != key.shape[1])
