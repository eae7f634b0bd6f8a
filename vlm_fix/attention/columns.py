"""Edits by column or by row, on plain SDPA: scaled keys and queries, and log-weights in a few more head dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .edits import Columns


def column_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    forms: list[Columns],
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of all rows with z <- scale rows z + bias, scales first. Shapes as `attention`: -> [B, q, H, D].

    scale (q . k) = q . (scale k), and scaling [q, 1] . [k, bias / scaling] = scaling q . k + bias: the matrix of scores
    is never formed and the causal kernels stay. Below float32 the bias is split in two parts, high and low.
    """
    dim = query.shape[-1]
    biases: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for scale, bias, heads, rows in forms:
        if scale is not None:
            key = (key * scale.transpose(2, 3)).to(key.dtype)
        if rows is not None:
            query = (query * rows).to(query.dtype)
        if bias is not None:
            biases.append((bias, heads))
    for bias, heads in biases:
        on = query.new_ones(query.shape[1]) if heads is None else heads.to(query.dtype)
        rest = bias.transpose(2, 3).expand(-1, key.shape[1], -1, -1) / scaling  # [B, Hkv, K, 1]
        for _ in range(1 if torch.finfo(key.dtype).bits >= 32 else 2):
            part = rest.to(key.dtype)
            rest = rest - part
            key = torch.cat([key, part.expand(key.shape[0], -1, -1, -1)], dim=-1)
            query = torch.cat([query, on[None, :, None, None].expand(*query.shape[:3], 1)], dim=-1)
    extra = -query.shape[-1] % 8 if biases else 0  # fused kernels want equal head sizes, multiples of 8
    query, key, value = (pad(x, (0, query.shape[-1] + extra - x.shape[-1])) for x in (query, key, value))
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0][..., :dim]
