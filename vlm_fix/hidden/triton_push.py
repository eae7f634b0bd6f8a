"""The Triton kernel of `push`: a program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GATES = ("none", "away", "beta")


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _push(
    x, direction, length_of, cosine_of, out, rows, strength, k, c, low, xb, xr, db, dr, lb, lr, cb, cr,
    RELATIVE: tl.constexpr, KEEP: tl.constexpr, GATE: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    b, r, inside = row // rows, row % rows, tl.arange(0, P) < C
    old = tl.load(x + b * xb + r * xr + i, mask=inside, other=0.0)
    d = tl.load(direction + b * db + r * dr + i, mask=inside, other=0.0)
    share = strength
    if GATE:
        h = tl.load(cosine_of + b * cb + r * cr + i, mask=inside, other=0.0)
        sizes = tl.maximum(tl.sqrt(tl.sum(h * h, 0)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(d * d, 0)), 1e-8)
        s = tl.sum(h * d, 0) / sizes
        if GATE == 1:
            share = share * (1.0 + tl.maximum(-s, 0.0))
        else:
            one, other = _softplus(k * s + c), _softplus(-k * s + c)
            share = share * tl.maximum(one / (one + other), low)
    if RELATIVE:
        h = tl.load(length_of + b * lb + r * lr + i, mask=inside, other=0.0)
        share = share * tl.sqrt(tl.sum(h * h, 0))
    new = old + share * d
    if KEEP:
        new = new * (tl.sqrt(tl.sum(old * old, 0)) / tl.maximum(tl.sqrt(tl.sum(new * new, 0)), 1e-12))
    tl.store(out + row * C + i, new, mask=inside)


def launch(
    x: torch.Tensor,
    direction: torch.Tensor,
    length_of: torch.Tensor,
    cosine_of: torch.Tensor,
    strength: float,
    relative: bool,
    keep_norm: bool,
    kind: str,
    k: float,
    c: float,
    low: float,
) -> torch.Tensor:
    """`push.pushed`: float32 [B, R, C]; the direction broadcasts to it."""
    given = [t if t.stride(-1) == 1 else t.contiguous() for t in (x, direction.expand(x.shape), length_of, cosine_of)]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _push[(x.shape[0] * x.shape[1],)](
        *given, out, x.shape[1], strength, k, c, low, *(s for t in given for s in t.stride()[:2]),
        RELATIVE=relative, KEEP=keep_norm, GATE=GATES.index(kind), C=x.shape[2], P=triton.next_power_of_2(x.shape[2]),
    )  # fmt: skip
    return out
