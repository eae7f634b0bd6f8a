"""Hidden states pushed along a direction: what steering methods share, on CUDA in one launch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity, softplus

from vlm_fix.launches import wanted

WIDEST = 16384  # channels of a row that one program holds


class Gate(NamedTuple):
    """The factor g(s) on a push, s the cosine of a state and the direction.

    "none": 1. "away": 1 + max(0, -s). "beta": a / (a + b), at least `low`, a = softplus(k s + c), b = softplus(-k s + c).
    """

    kind: str = "none"
    k: float = 0.0
    c: float = 0.0
    low: float = 0.0

    def of(self, cosine: torch.Tensor) -> torch.Tensor:
        if self.kind == "away":
            return 1 + (-cosine).clamp(min=0)
        a, b = softplus(self.k * cosine + self.c), softplus(-self.k * cosine + self.c)
        return (a / (a + b)).clamp(min=self.low)


NONE = Gate()


def pushed(
    x: torch.Tensor,
    direction: torch.Tensor,
    strength: float,
    *,
    relative: bool = True,
    keep_norm: bool = True,
    gate: Gate = NONE,
    length_of: torch.Tensor | None = None,
    cosine_of: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x + strength ||length_of|| g(cos(cosine_of, direction)) direction, for each row of x [B, R, C] in float32.

    relative=False: without the length. keep_norm: y ||x|| / ||y||. direction broadcasts to x; the other states are x if not
    given.
    """
    length_of, cosine_of = (x if y is None else y for y in (length_of, cosine_of))
    if wanted(x) and x.dtype == torch.float32 and x.dim() == 3 and x.shape[-1] <= WIDEST:
        direction = direction if direction.dim() == 3 else direction.expand(1, 1, -1)
        how = (direction, length_of, cosine_of, strength, relative, keep_norm, *gate)
        if x.is_cuda:
            from .triton_push import launch

            return launch(x, *how)
        return _pushed(x, *how)
    return formula(x, direction, length_of, cosine_of, strength, relative, keep_norm, *gate)


def formula(
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
    """What the kernel computes, in plain operations."""
    share: torch.Tensor | float = strength
    if kind != "none":
        share = strength * Gate(kind, k, c, low).of(cosine_similarity(cosine_of, direction, dim=-1))[..., None]
    if relative:
        length = length_of.norm(dim=-1, keepdim=True)
        y = torch.addcmul(x, length * share if isinstance(share, torch.Tensor) else strength * length, direction)
    else:
        y = x + share * direction
    return y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-12)) if keep_norm else y


@torch.library.custom_op("vlm_fix::pushed", mutates_args=())
def _pushed(
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
    return formula(x, direction, length_of, cosine_of, strength, relative, keep_norm, kind, k, c, low)


@_pushed.register_fake
def _(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(x)


@functools.lru_cache(maxsize=1024)
def span(q: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows q [k, C] as the two factors [B, C, k] and [B, k, C] of `without_span`, views made once."""
    return q.T.expand(batch, -1, -1), q.expand(batch, -1, -1)


def without_span(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """x [B, R, C] - x q^T q, q [k, C] orthonormal rows."""
    down, up = span(q, len(x))
    return torch.baddbmm(x, torch.bmm(x, down), up, alpha=-1)
