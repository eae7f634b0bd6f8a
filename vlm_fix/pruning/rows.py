"""Attention of chosen rows of a prompt, recomputed from what went into a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.projections import queries_and_keys

from .encoder import chunk_bytes


@dataclass
class Seen:
    """One layer's self-attention over the prompt: what went into it [B, n, C], the rotary tables, the keys if cached."""

    attn: Any
    x: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor | None = None
    positions: torch.Tensor | None = None  # [..., B or 1, n] position ids, which some modules ask for beside the tables
    queries: torch.Tensor | None = None  # [B, H, n, D] as the module attended with them, if they were heard


def rows_attention(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention of chosen rows, float32 [B, R, n], mean over heads, R = the most rows of a sample.

    rows, valid [B, n]. Only the chosen rows are ever formed, in chunks; shorter samples end in rows of zeros.
    """
    return torch.cat([a.mean(dim=1) for a in attention_chunks(*_chosen(seen, rows, valid))], dim=1)


def received(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, n] causal softmax attention that columns get from chosen rows: summed over them and a key head's queries.

    rows, valid [B, n]; float32, in chunks as in `rows_attention`.
    """
    query, keys, *rest = _chosen(seen, rows, valid)
    parts = [a.unflatten(1, (keys.shape[1], -1)).sum(dim=(2, 3)) for a in attention_chunks(query, keys, *rest)]
    return torch.stack(parts).sum(dim=0)


def strongest(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, H, n] the largest causal softmax attention that columns get from chosen rows; as `received`."""
    return torch.stack([a.amax(dim=2) for a in attention_chunks(*_chosen(seen, rows, valid))]).amax(dim=0)


def _chosen(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> tuple[Any, ...]:
    """What `attention_chunks` takes for chosen rows; the rows that a sample has less than others may look nowhere."""
    attn, x = seen.attn, seen.x
    count = max(1, int(rows.sum(dim=1).max()))
    index = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]  # [B, R], chosen ones first
    real, columns = rows.gather(1, index), torch.arange(x.shape[1], device=x.device)
    allowed = (columns <= index[..., None]) & valid[:, None] & real[..., None]
    if seen.queries is not None and seen.keys is not None:
        shape = (-1, seen.queries.shape[1], -1, seen.queries.shape[-1])
        return seen.queries.gather(2, index[:, None, :, None].expand(shape)), seen.keys, allowed, attn.scaling
    cos, sin = (t.expand(len(x), -1, -1) for t in seen.rotary)
    keys = keys_of(seen) if seen.keys is None else seen.keys
    picked, cos, sin = (t.gather(1, index[..., None].expand(-1, -1, t.shape[-1])) for t in (x, cos, sin))
    query, _ = queries_and_keys(attn, picked, (cos, sin), at_columns(seen.positions, index))
    return query, keys, allowed, attn.scaling


def keys_of(seen: Seen) -> torch.Tensor:
    """[B, Hkv, n, D] the layer's keys, made anew."""
    cos, sin = (t.expand(len(seen.x), -1, -1) for t in seen.rotary)
    return queries_and_keys(seen.attn, seen.x, (cos, sin), seen.positions)[1]


def attention_chunks(
    query: torch.Tensor, keys: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> Iterator[torch.Tensor]:
    """Softmax attention of rotated queries [B, H, R, D] to keys [B, Hkv, n, D]: [B, H, r, n], chunk by chunk of rows.

    allowed [B, R, n], None: all. In float32; a row without any allowed column is zero.
    """
    batch, heads, count, dim = query.shape
    keys = keys.float().transpose(2, 3)
    step = max(1, chunk_bytes(query) // (4 * batch * heads * keys.shape[-1]))
    for i in range(0, count, step):
        part = query[:, :, i : i + step].float().reshape(batch, keys.shape[1], -1, dim)
        z = (part @ keys).view(batch, heads, -1, keys.shape[-1]) * scaling
        if allowed is None:
            yield z.softmax(dim=-1)
        else:
            yield z.masked_fill(~allowed[:, None, i : i + step], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def at_columns(positions: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """Position ids [..., B or 1, n] of the columns `index` [B, R] -> [..., B, R]."""
    if positions is None:
        return None
    index = index.to(positions.device).expand(*positions.shape[:-2], *index.shape)
    return positions.expand(*index.shape[:-1], -1).gather(-1, index)


def unrotated(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Inputs of self-attention [B, n, C] -> queries [B, H, n, D] before the rotary embedding, if the module is `turned`."""
    return by_head(attn, attn.q_proj(x))


def by_head(attn: Any, y: torch.Tensor) -> torch.Tensor:
    """What `q_proj` made [B, n, H D] -> [B, H, n, D], normalised where the model does so."""
    y = y.view(*y.shape[:2], -1, attn.head_dim)
    return getattr(attn, "q_norm", torch.nn.Identity())(y).transpose(1, 2)


def half_turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, H, n, D] turned by the rotary tables [B, n, D], the two halves of D against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


@torch.no_grad()
def is_turned(seen: Seen) -> bool:
    """True if the module's queries are q_proj's, normalised or not, and then `half_turned`; looked at in the last row."""
    attn, x, (cos, sin) = seen.attn, seen.x[:, -1:], (t[:, -1:].expand(len(seen.x), -1, -1) for t in seen.rotary)
    norm = getattr(getattr(attn, "q_norm", None), "weight", cos[0, 0])
    if not hasattr(attn, "q_proj") or attn.head_dim != cos.shape[-1] or norm.shape != cos.shape[-1:]:
        return False
    query, _ = queries_and_keys(attn, x, (cos, sin), None if seen.positions is None else seen.positions[..., -1:])
    if query.shape[-1] != cos.shape[-1]:
        return False
    plain = unrotated(attn, x)
    if plain.shape != query.shape:  # such as a projection that holds a gate as well
        return False
    own, scale = half_turned(plain, cos, sin), query.abs().amax()
    return bool((own - query).abs().amax() <= 100 * torch.finfo(query.dtype).eps * scale)
