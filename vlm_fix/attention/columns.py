"""Edits by column or by row, on plain SDPA: scaled keys and queries, and log-weights in a few more head dimensions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from .edits import ColumnFactors
from .inputs import AttentionInputs


def column_attention(inputs: AttentionInputs, factors: list[ColumnFactors]) -> torch.Tensor:
    """Attention of all rows [B, q, H, D] with z <- scale row_factor z + bias, scales first.

    scale (q . k) = q . (scale k), and scaling [q, 1] . [k, bias / scaling] = scaling q . k + bias: the matrix of scores
    is never formed and the causal kernels stay. Below float32 the bias is split in two parts, high and low.
    """
    query, key, value, scaling = inputs.query, inputs.key, inputs.value, inputs.scores.scaling
    dim = value.shape[-1]  # latent attention has values smaller than its keys
    biases: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for scale, bias, heads, row_factor in factors:
        if scale is not None:
            key = (key * scale.transpose(2, 3)).to(key.dtype)
        if row_factor is not None:
            query = (query * row_factor).to(query.dtype)
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
    if biases:
        width = max(query.shape[-1], dim)
        width += -width % 8  # fused kernels want equal head sizes, multiples of 8
        query, key, value = (pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return replace(inputs, query=query, key=key, value=value, scaling=scaling).sdpa()[..., :dim]
