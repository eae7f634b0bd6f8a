"""GIFT's saliency map over the image, from shifts of attention between the words of a question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vlm_fix import Memory
from vlm_fix.rows import Rows
from vlm_fix.session import VISUAL, Session
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


def add_shifts(memory: GIFTMemory, a: torch.Tensor, rows: Rows, counts: torch.Tensor) -> None:
    """Add what the image columns of the next rows a [B, H, R, K] grew by, over the question's tokens that count [B, n].

    After the prompt's last row they make the map.
    """
    session, total = rows.session, rows.session.types.shape[1]
    seen = pad(a * rows.visual, (max(0, total - a.shape[-1]), 0))[..., :total]
    previous = seen[:, :, 0] if memory.previous is None else memory.previous
    previous = torch.cat([pad(previous, (0, total - previous.shape[-1]))[:, :, None], seen[:, :, :-1]], dim=2)
    last = torch.tensor(session.last_visual, device=a.device)
    query = (rows.positions >= last[:, None] + 2) & (rows.positions < session.prompt_len)
    query = query & counts[:, rows.positions]
    shift = ((seen - previous).clamp(min=0) * query[:, None, :, None]).sum(dim=2)
    if memory.shift is not None and memory.last_image is not None:  # no chunk from before another image counts
        old = pad(memory.shift, (0, total - memory.shift.shape[-1]))
        shift = shift + old * (last == memory.last_image)[:, None, None]
    memory.shift, memory.previous, memory.last_image = shift, seen[:, :, -1], last
    if rows.numbers[-1] >= session.prompt_len - 1:
        memory.saliency = saliency_map(shift, session.types == VISUAL)


def enhanced(a: torch.Tensor, m: torch.Tensor, query: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The edit of weights a [B, H, R, K] by alpha times the saliency map and the question's columns, [B, 1, 1, K] both."""
    seeing = top_half((a * rows.visual).sum(dim=-1))[..., None] & rows.visual
    reading = top_half((a * query).sum(dim=-1))[..., None] & query
    new = torch.where(seeing, a * m.exp(), a)
    tiny = torch.finfo(a.dtype).tiny
    before, after = ((x * seeing).sum(dim=(1, 3), keepdim=True) for x in (a, new))
    new = torch.where(reading, new * after / before.clamp(min=tiny), new)
    return new / new.sum(dim=-1, keepdim=True).clamp(min=tiny)
