"""GIFT's saliency map over the image, from shifts of attention between the words of a question."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_fix import Memory
from vlm_fix.session import Session
from vlm_fix.words import content_columns


@dataclass
class GIFTMemory(Memory):
    shift: torch.Tensor | None = None  # [B, H, n] the shifts of the question's rows so far
    previous: torch.Tensor | None = None  # [B, H, n] the last row's weights on the image
    last_image: torch.Tensor | None = None  # [B] the last image column when `shift` was summed
    question: torch.Tensor | None = None  # [B, n] all columns but the template's around the question
    saliency: torch.Tensor | None = None  # [B, n] m, once the question was read


def counted(session: Session, question: torch.Tensor, pos: str) -> torch.Tensor:
    """[B, n] over the whole session's columns -> those of this one that count for the map: all, or of content words."""
    mask = question & content_columns(session.whole).to(question.device) if pos == "content" else question
    return session.translate(mask, session.whole)


def saliency_map(shift: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Summed shifts [B, H, n] and the image columns [B, n] -> m [B, n] in [0, 1], 0 outside the images.

    Mean over the half of the heads that shifted most, clamped to mean +- 3 std and scaled over the image.
    """
    m = (shift * top_half(shift.sum(dim=-1))[..., None]).sum(dim=1)
    count = visual.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (m * visual).sum(dim=1, keepdim=True) / count
    std = (((m - mean).square() * visual).sum(dim=1, keepdim=True) / count).sqrt()
    m = m.clamp(mean - 3 * std, mean + 3 * std)
    low = m.masked_fill(~visual, torch.inf).amin(dim=1, keepdim=True)
    high = m.masked_fill(~visual, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(visual & (high > low), (m - low) / (high - low), 0)


def top_half(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, ...] -> booleans that mark the largest H/2 heads."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(1, x.topk(max(1, x.shape[1] // 2), dim=1).indices, True)
