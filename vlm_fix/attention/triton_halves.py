"""The Triton kernel of `halves.raised`: a program for each sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _top(m, h, heads, half):
    """1.0 for the `half` largest of m [P], the first of equal ones."""
    more = (m[None, :] > m[:, None]) | ((m[None, :] == m[:, None]) & (h[None, :] < h[:, None]))
    rank = tl.sum((more & (h < heads)[None, :]).to(tl.int32), 1)
    return tl.where((rank < half) & (h < heads), 1.0, 0.0)


@triton.jit
def _halves(z, columns, out, heads, half, width, cb, cg, P: tl.constexpr, N: tl.constexpr):
    b, h = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    best = tl.full((P,), float("-inf"), tl.float32)
    total, first = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    second, grown = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    for start in range(0, width, N):
        n = start + tl.arange(0, N)
        inside = n < width
        at = z + (b * heads + h)[:, None] * width + n[None, :]
        x = tl.load(at, mask=(h < heads)[:, None] & inside[None, :], other=float("-inf"))
        new = tl.maximum(best, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        before, a = tl.exp(best - safe), tl.exp(x - safe[:, None])
        one = tl.load(columns + b * cb + n, mask=inside, other=0.0)
        two = tl.load(columns + b * cb + cg + n, mask=inside, other=0.0)
        factor = one * tl.exp(tl.load(columns + b * cb + 2 * cg + n, mask=inside, other=0.0))
        total = total * before + tl.sum(a, 1)
        first = first * before + tl.sum(a * one[None, :], 1)
        second = second * before + tl.sum(a * two[None, :], 1)
        grown = grown * before + tl.sum(a * factor[None, :], 1)
        best = new
    whole = tl.where(total == 0, 1.0, total)
    first, second, grown = first / whole, second / whole, grown / whole
    seeing, reading = _top(first, h, heads, half), _top(second, h, heads, half)
    growth = tl.sum(grown * seeing, 0) / tl.maximum(tl.sum(first * seeing, 0), TINY)
    tl.store(out + (b * heads + h) * 2, seeing, mask=h < heads)
    tl.store(out + (b * heads + h) * 2 + 1, reading * tl.log(tl.maximum(growth, TINY)), mask=h < heads)


def launch(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`halves.raised`: contiguous float32 z [B, H, 1, K], float32 columns [B, 3, K or more]."""
    (batch, heads, _, width), columns = z.shape, columns if columns.stride(-1) == 1 else columns.contiguous()
    out = torch.empty(batch, heads, 2, dtype=torch.float32, device=z.device)
    _halves[(batch,)](
        z, columns, out, heads, max(1, heads // 2), width, columns.stride(0), columns.stride(1),
        P=triton.next_power_of_2(heads), N=64,
    )  # fmt: skip
    return out
