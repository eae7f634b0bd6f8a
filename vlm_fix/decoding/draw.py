"""Random numbers that depend on their place alone: the same in any batch, with or without a cache."""

from __future__ import annotations

import torch


def hashed(*places: int | torch.Tensor) -> torch.Tensor:
    """Broadcast integers -> float64 in [0, 1): the same for the same places, without a state (xorshift-multiply)."""
    x = torch.ones((), dtype=torch.int64)
    for place in places:
        x = (place + x.to(place.device) if isinstance(place, torch.Tensor) else x + place) * 0x2545F4914F6CDD1D
        x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * 0x1B873593CC9E2D51
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return ((x >> 11) & 0x1FFFFFFFFFFFFF).double() / 2**53
