"""What steering methods share: adding a direction to hidden states at a share of their own length."""

from __future__ import annotations

import torch


def turned(x: torch.Tensor, push: torch.Tensor) -> torch.Tensor:
    """||x|| (x / ||x|| + push) / ||x / ||x|| + push||: x [..., C] turned towards push, at the length it had."""
    length = x.norm(dim=-1, keepdim=True)
    y = torch.addcmul(x, length, push)
    return y * (length / y.norm(dim=-1, keepdim=True).clamp(min=1e-12))


def scaled(part: float, depth: int) -> int:
    """A layer of a 32-layer model in a model of `depth` layers."""
    return min(depth - 1, round(part / 32 * depth))
