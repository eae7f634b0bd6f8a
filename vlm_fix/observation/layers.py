"""Tensors of single layers, which may have other sizes, put together."""

from __future__ import annotations

import torch

from vlm_fix.packing import pad_to
from vlm_fix.session import VISUAL, View


def by_layer(parts: dict[int, torch.Tensor], depth: int) -> torch.Tensor:
    """[..., D] of some layers -> [depth, ..., D]; zeros in the other layers, and where a layer's D is smaller."""
    width, some = max(x.shape[-1] for x in parts.values()), next(iter(parts.values()))
    padded = {i: pad_to(x, width) for i, x in parts.items()}
    return torch.stack([padded.get(i, torch.zeros_like(pad_to(some, width))) for i in range(depth)])


def visual_of(view: View) -> torch.Tensor:
    """[N] bool: which of the image tokens that entered the language model the layers of `view` still have."""
    assert view.whole.types is not None and view.types is not None
    types = view.whole.types[0]
    held = torch.zeros_like(types, dtype=torch.bool)
    held[view.index[0][view.types[0, : view.index.shape[1]] == VISUAL]] = True
    return held[types == VISUAL]
