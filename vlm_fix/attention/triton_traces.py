"""The Triton kernel of `traces.row_factor`: a program for each sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _traces(
    q, k, known, out, total, at, gamma, heads, kv_heads, qb, qh, kb, kh, kn, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    b, d = tl.program_id(0), tl.arange(0, P)
    squares, others = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    for h in range(0, heads):
        x = tl.load(q + b * qb + h * qh + d, mask=d < D, other=0.0).to(tl.float32)
        squares += x * x
    for h in range(0, kv_heads):
        x = tl.load(k + b * kb + h * kh + at * kn + d, mask=d < D, other=0.0).to(tl.float32)
        others += x * x
    trace = tl.load(known + b) + tl.sum(others, 0) / kv_heads
    tl.store(total + b, trace)
    one = 1.0 + gamma / tl.maximum(tl.log(tl.sum(squares, 0) / heads), 1.0)
    tl.store(out + b, one * (1.0 + gamma / tl.maximum(tl.log(trace), 1.0)))


def launch(
    query: torch.Tensor, key: torch.Tensor, at: int, known: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`traces.row_factor`: query [B, H, 1, D], key [B, Hkv, K, D]."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    (batch, heads, _, dim), total = query.shape, torch.empty_like(known)
    out = torch.empty(batch, 1, 1, 1, dtype=torch.float32, device=query.device)
    _traces[(batch,)](
        query, key, known, out, total, at, gamma, heads, key.shape[1], *query.stride()[:2], *key.stride()[:3],
        D=dim, P=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out, total
