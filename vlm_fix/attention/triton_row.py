"""The Triton kernel of one decode row: a program for each head and, on long caches, for each part of the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64  # columns at once
PART = 2048  # columns of one program; longer caches are split, and a second launch puts the parts together


@triton.jit
def _row(
    q, k, v, mask, up, down, bias, out, sums,
    scaling, softcap, width, heads, group, part, parts,
    qb, qh, kb, kh, kn, vb, vh, vn, mb, mh, mn, ub, uh, un, db, dh, dn, bb, bh, bn,
    MASK: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr,
    KD: tl.constexpr, VD: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    kd, vd = tl.arange(0, KP), tl.arange(0, VP)
    query = tl.load(q + batch * qb + head * qh + kd, mask=kd < KD, other=0.0).to(tl.float32) * scaling
    keys = k + batch * kb + (head // group).to(tl.int64) * kh
    values = v + batch * vb + (head // group).to(tl.int64) * vh
    best = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((VP,), tl.float32)
    first = piece * part
    for start in range(first, tl.minimum(first + part, width), N):
        n = start + tl.arange(0, N)
        inside = n < width
        columns = n.to(tl.int64)
        at = keys + columns[:, None] * kn + kd[None, :]
        z = tl.sum(tl.load(at, mask=inside[:, None] & (kd < KD)[None, :], other=0.0).to(tl.float32) * query[None, :], 1)
        if CAP:  # tanh by way of the exponential, of a number that is never above 1
            small = tl.exp(-2.0 * tl.abs(z / softcap))
            z = softcap * tl.where(z >= 0, 1.0, -1.0) * (1.0 - small) / (1.0 + small)
        if UP:
            slope = tl.load(up + batch * ub + head * uh + n * un, mask=inside, other=1.0).to(tl.float32)
            if DOWN:
                other = tl.load(down + batch * db + head * dh + n * dn, mask=inside, other=1.0).to(tl.float32)
                slope = tl.where(z >= 0, slope, other)
            z = z * slope
        if BIAS:
            z += tl.load(bias + batch * bb + head * bh + n * bn, mask=inside, other=0.0).to(tl.float32)
        if MASK == 1:
            inside = inside & (tl.load(mask + batch * mb + head * mh + n * mn, mask=inside, other=0) != 0)
        if MASK == 2:
            z += tl.load(mask + batch * mb + head * mh + n * mn, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(best, tl.max(z, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing may be seen yet
        keep = tl.exp(best - safe)
        a = tl.exp(z - safe)
        total = total * keep + tl.sum(a, 0)
        at = values + columns[:, None] * vn + vd[None, :]
        own = tl.load(at, mask=(n < width)[:, None] & (vd < VD)[None, :], other=0.0).to(tl.float32)
        acc = acc * keep + tl.sum(a[:, None] * own, 0)
        best = new
    if SPLIT:
        place = row * parts + piece
        tl.store(out + place * VD + vd, acc, mask=vd < VD)
        one = tl.arange(0, 1)
        tl.store(sums + place * 2 + one, best)
        tl.store(sums + place * 2 + 1 + one, total)
    else:  # a row that sees nothing attends to nothing
        tl.store(out + row * VD + vd, acc / tl.where(total == 0, 1.0, total), mask=vd < VD)


@triton.jit
def _together(acc, sums, out, parts, VD: tl.constexpr, VP: tl.constexpr, P: tl.constexpr):
    row, p, vd = tl.program_id(0), tl.arange(0, P), tl.arange(0, VP)
    there = p < parts
    best = tl.load(sums + (row * parts + p) * 2, mask=there, other=float("-inf"))
    total = tl.load(sums + (row * parts + p) * 2 + 1, mask=there, other=0.0)
    most = tl.max(best, 0)
    share = tl.exp(best - tl.where(most == float("-inf"), 0.0, most))
    whole = tl.sum(total * share, 0)
    at = acc + (row * parts + p)[:, None] * VD + vd[None, :]
    own = tl.load(at, mask=there[:, None] & (vd < VD)[None, :], other=0.0)
    tl.store(out + row * VD + vd, tl.sum(own * share[:, None], 0) / tl.where(whole == 0, 1.0, whole), mask=vd < VD)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    part: int = PART,
) -> torch.Tensor:
    """`fused.decode_row`: query [B, H, 1, D], key and value [B, Hkv, K, D], the others broadcast to [B, H, 1, K or more]."""
    batch, heads, _, dim = query.shape
    width, size = key.shape[2], value.shape[-1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    parts = triton.cdiv(width, part)
    acc, sums = out, out
    if parts > 1:
        acc = torch.empty(batch * heads, parts, size, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch * heads, parts, 2, dtype=torch.float32, device=query.device)
    kind = 0 if allowed is None else 1 if allowed.dtype == torch.bool else 2
    mask = allowed.view(torch.uint8) if kind == 1 and allowed is not None else allowed
    _row[(batch * heads, parts)](
        query, key, value, *(query if x is None else x for x in (mask, up, down, bias)), acc, sums,
        scaling, softcap or 0.0, width, heads, heads // key.shape[1], part, parts,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *(s for x in (mask, up, down, bias) for s in _strides(x)),
        MASK=kind, UP=up is not None, DOWN=down is not None, BIAS=bias is not None, CAP=softcap is not None, SPLIT=parts > 1,
        KD=dim, VD=size, KP=triton.next_power_of_2(dim), VP=triton.next_power_of_2(size), N=BLOCK,
    )  # fmt: skip
    if parts > 1:
        _together[(batch * heads,)](
            acc, sums, out, parts, VD=size, VP=triton.next_power_of_2(size), P=triton.next_power_of_2(parts)
        )
    return out


def _strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """By sample, head and column; 0 along a dimension of one."""
    if x is None:
        return 0, 0, 0
    return tuple(0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1, 3))  # type: ignore[return-value]
