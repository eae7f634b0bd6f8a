"""Padding and packing of columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def by_token(inputs: Mapping[str, Any]) -> list[str]:
    """The names of a prompt's inputs that hold one value a token, as input_ids [B, L] does: masks, types of tokens."""
    ids = inputs["input_ids"]
    return [
        k
        for k, x in inputs.items()
        if isinstance(x, torch.Tensor) and x.shape == ids.shape and not x.is_floating_point()
    ]


def pad_to(x: torch.Tensor, width: int) -> torch.Tensor:
    """[..., n] -> [..., width], zeros at the end."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def left_pack(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """keep [B, L] -> gather index [B, n] that moves the kept columns to the right end, and its mask [B, n]."""
    n = int(keep.sum(dim=1).max())
    order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)  # dropped first, kept last, each in order
    index = order[:, -n:]
    return index, keep.gather(1, index)
