"""Position ids of a prompt, as `generate` would make them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vlm_fix.arch import Family

from .parts import get_part


def prompt_positions(model: Any, family: Family, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of a left-padded prompt, [B, L] or [3, B, L] for M-RoPE, and the next position of each row [B]."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    flat = (mask.long().cumsum(-1) - 1).clamp(min=0) + family.first_position
    if not family.mrope:
        return flat, flat[:, -1] + 1
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        return flat.expand(3, -1, -1), flat[:, -1] + 1
    base = get_part(model, family.base)
    known = inspect.signature(base.get_rope_index).parameters
    positions, _ = base.get_rope_index(ids, **{k: v for k, v in inputs.items() if k in known and k != "input_ids"})
    return positions, positions.amax(dim=(0, 2)) + 1
