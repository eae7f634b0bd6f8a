"""The Triton kernel of one decode row: a program for each head and, on long caches, for each part of the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64  # columns at once
PART = 2048  # columns of one program; longer caches are split, and a second launch puts the parts together


@triton.jit
def _dots(query, keys, columns, kn, kd, inside, scaling, softcap, KD: tl.constexpr, CAP: tl.constexpr):
    at = keys + columns[:, None] * kn + kd[None, :]
    z = tl.sum(tl.load(at, mask=inside[:, None] & (kd < KD)[None, :], other=0.0).to(tl.float32) * query[None, :], 1)
    if CAP:  # tanh by way of the exponential, of a number that is never above 1
        small = tl.exp(-2.0 * tl.abs(z / softcap))
        z = softcap * tl.where(z >= 0, 1.0, -1.0) * (1.0 - small) / (1.0 + small)
    return z


@triton.jit
def _scores(
    q, k, out, scaling, softcap, width, heads, shared, qb, qh, kb, kh, kn,
    CAP: tl.constexpr, KD: tl.constexpr, KP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, n, kd = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, KP)
    batch, head = row // heads, row % heads
    query = tl.load(q + batch * qb + head * qh + kd, mask=kd < KD, other=0.0).to(tl.float32) * scaling
    keys = k + batch * kb + (head // shared).to(tl.int64) * kh
    z = _dots(query, keys, n.to(tl.int64), kn, kd, n < width, scaling, softcap, KD, CAP)
    tl.store(out + row.to(tl.int64) * width + n, z, mask=n < width)


@triton.jit
def _gains(m1, m2, m3, keep, move, a1, a2, a3, al, b1, b2, b3, bl, c1, c2, c3, cl):
    """What the columns of group 1, and those of groups 2 and 3, are multiplied by; and whether that changes anything."""
    hold = (
        (a1 * m1 + a2 * m2 + a3 * m3 >= al) & (b1 * m1 + b2 * m2 + b3 * m3 >= bl) & (c1 * m1 + c2 * m2 + c3 * m3 >= cl)
    )
    gain = 1.0 + move * (m2 + m3) / tl.maximum(m1, 1.1754943508222875e-38)
    return tl.where(hold, gain, 1.0), tl.where(hold, keep, 1.0), hold & (m2 + m3 > 0)


@triton.jit
def _row(
    q, k, v, mask, up, down, bias, groups, scores, moved, out, acc, sums,
    scaling, softcap, width, heads, shared, part, parts,
    keep, move, a1, a2, a3, al, b1, b2, b3, bl, c1, c2, c3, cl,
    qb, qh, kb, kh, kn, vb, vh, vn, mb, mh, mn, ub, uh, un, db, dh, dn, bb, bh, bn, gb, gh, gn,
    MASK: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr,
    GROUPS: tl.constexpr, KNOWN: tl.constexpr, MOVED: tl.constexpr,
    KD: tl.constexpr, VD: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    kd, vd = tl.arange(0, KP), tl.arange(0, VP)
    query = tl.load(q + batch * qb + head * qh + kd, mask=kd < KD, other=0.0).to(tl.float32) * scaling
    keys = k + batch * kb + (head // shared).to(tl.int64) * kh
    values = v + batch * vb + (head // shared).to(tl.int64) * vh
    best = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    m1, m2, m3 = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    plain = tl.zeros((VP,), tl.float32)  # the sums of a_j v_j: of group 0, group 1, and groups 2 and 3
    gaining, losing = tl.zeros((VP,), tl.float32), tl.zeros((VP,), tl.float32)
    first = piece * part
    for start in range(first, tl.minimum(first + part, width), N):
        n = start + tl.arange(0, N)
        inside = n < width
        columns = n.to(tl.int64)
        if KNOWN:
            z = tl.load(scores + row.to(tl.int64) * width + n, mask=inside, other=0.0)
        else:
            z = _dots(query, keys, columns, kn, kd, inside, scaling, softcap, KD, CAP)
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
        before = tl.exp(best - safe)
        a = tl.exp(z - safe)
        total = total * before + tl.sum(a, 0)
        at = values + columns[:, None] * vn + vd[None, :]
        own = tl.load(at, mask=(n < width)[:, None] & (vd < VD)[None, :], other=0.0).to(tl.float32)
        if GROUPS:
            g = tl.load(groups + batch * gb + head * gh + n * gn, mask=n < width, other=0)
            one, two, three = tl.where(g == 1, a, 0.0), tl.where(g == 2, a, 0.0), tl.where(g == 3, a, 0.0)
            m1 = m1 * before + tl.sum(one, 0)
            m2 = m2 * before + tl.sum(two, 0)
            m3 = m3 * before + tl.sum(three, 0)
            gaining = gaining * before + tl.sum(one[:, None] * own, 0)
            losing = losing * before + tl.sum((two + three)[:, None] * own, 0)
            a = tl.where(g == 0, a, 0.0)
        plain = plain * before + tl.sum(a[:, None] * own, 0)
        best = new
    if SPLIT:
        place, one = row * parts + piece, tl.arange(0, 1)
        tl.store(acc + place * 3 * VD + vd, plain, mask=vd < VD)
        tl.store(sums + place * 5 + one, best)
        tl.store(sums + place * 5 + 1 + one, total)
        if GROUPS:
            tl.store(acc + (place * 3 + 1) * VD + vd, gaining, mask=vd < VD)
            tl.store(acc + (place * 3 + 2) * VD + vd, losing, mask=vd < VD)
            tl.store(sums + place * 5 + 2 + one, m1)
            tl.store(sums + place * 5 + 3 + one, m2)
            tl.store(sums + place * 5 + 4 + one, m3)
    else:  # a row that sees nothing attends to nothing
        whole = tl.where(total == 0, 1.0, total)
        if GROUPS:
            gain, left, changed = _gains(
                m1 / whole, m2 / whole, m3 / whole, keep, move, a1, a2, a3, al, b1, b2, b3, bl, c1, c2, c3, cl
            )
            plain += gain * gaining + left * losing
            if MOVED:
                tl.store(moved + tl.arange(0, 1), tl.full((1,), 1, tl.uint8), mask=changed)
        tl.store(out + row * VD + vd, plain / whole, mask=vd < VD)


@triton.jit
def _together(
    acc, sums, moved, out, parts, keep, move, a1, a2, a3, al, b1, b2, b3, bl, c1, c2, c3, cl,
    GROUPS: tl.constexpr, MOVED: tl.constexpr, VD: tl.constexpr, VP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row, p, vd = tl.program_id(0), tl.arange(0, P), tl.arange(0, VP)
    there, place = p < parts, row * parts + p
    best = tl.load(sums + place * 5, mask=there, other=float("-inf"))
    most = tl.max(best, 0)
    share = tl.exp(best - tl.where(most == float("-inf"), 0.0, most))
    whole = tl.sum(tl.load(sums + place * 5 + 1, mask=there, other=0.0) * share, 0)
    whole = tl.where(whole == 0, 1.0, whole)
    at, inside = acc + (place * 3)[:, None] * VD + vd[None, :], there[:, None] & (vd < VD)[None, :]
    plain = tl.sum(tl.load(at, mask=inside, other=0.0) * share[:, None], 0)
    if GROUPS:
        m1 = tl.sum(tl.load(sums + place * 5 + 2, mask=there, other=0.0) * share, 0)
        m2 = tl.sum(tl.load(sums + place * 5 + 3, mask=there, other=0.0) * share, 0)
        m3 = tl.sum(tl.load(sums + place * 5 + 4, mask=there, other=0.0) * share, 0)
        gain, left, changed = _gains(
            m1 / whole, m2 / whole, m3 / whole, keep, move, a1, a2, a3, al, b1, b2, b3, bl, c1, c2, c3, cl
        )
        plain += gain * tl.sum(tl.load(at + VD, mask=inside, other=0.0) * share[:, None], 0)
        plain += left * tl.sum(tl.load(at + 2 * VD, mask=inside, other=0.0) * share[:, None], 0)
        if MOVED:
            tl.store(moved, tl.where(changed, 1, 0).to(tl.uint8), mask=changed)
    tl.store(out + row * VD + vd, plain / whole, mask=vd < VD)


def launch_scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """`fused.raw_scores`."""
    (batch, heads, _, dim), width = query.shape, key.shape[2]
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    out = torch.empty(batch, heads, 1, width, dtype=torch.float32, device=query.device)
    _scores[(batch * heads, triton.cdiv(width, BLOCK))](
        query, key, out, scaling, softcap or 0.0, width, heads, heads // key.shape[1], *query.stride()[:2], *key.stride()[:3],
        CAP=softcap is not None, KD=dim, KP=triton.next_power_of_2(dim), N=BLOCK,
    )  # fmt: skip
    return out


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: torch.Tensor | None,
    numbers: list[float],
    moved: torch.Tensor | None,
    z: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    part: int = PART,
) -> torch.Tensor:
    """`fused.decode_row`: query [B, H, 1, D], key and value [B, Hkv, K, D], the others broadcast to [B, H, 1, K or more]."""
    batch, heads, _, dim = query.shape
    width, size = key.shape[2], value.shape[-1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    parts, acc, sums = triton.cdiv(width, part), out, out
    if parts > 1:
        acc = torch.empty(batch * heads, parts, 3, size, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch * heads, parts, 5, dtype=torch.float32, device=query.device)
    kind = 0 if allowed is None else 1 if allowed.dtype == torch.bool else 2
    mask = allowed.view(torch.uint8) if kind == 1 and allowed is not None else allowed
    flag = None if moved is None else moved.view(torch.uint8)
    numbers = numbers or [0.0] * 14
    columns = (mask, up, down, bias, groups)
    _row[(batch * heads, parts)](
        query, key, value, *(query if x is None else x for x in (*columns, z, flag)), out, acc, sums,
        scaling, softcap or 0.0, width, heads, heads // key.shape[1], part, parts, *numbers,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *(s for x in columns for s in _strides(x)),
        MASK=kind, UP=up is not None, DOWN=down is not None, BIAS=bias is not None, CAP=softcap is not None, SPLIT=parts > 1,
        GROUPS=groups is not None, KNOWN=z is not None, MOVED=flag is not None,
        KD=dim, VD=size, KP=triton.next_power_of_2(dim), VP=triton.next_power_of_2(size), N=BLOCK,
    )  # fmt: skip
    if parts > 1:
        _together[(batch * heads,)](
            acc, sums, out if flag is None else flag, out, parts, *numbers, GROUPS=groups is not None, MOVED=flag is not None,
            VD=size, VP=triton.next_power_of_2(size), P=triton.next_power_of_2(parts),
        )  # fmt: skip
    return out


def _strides(x: torch.Tensor | None) -> tuple[int, int, int]:
    """By sample, head and column; 0 along a dimension of one."""
    if x is None:
        return 0, 0, 0
    sample, head, column = (0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1, 3))
    return sample, head, column
