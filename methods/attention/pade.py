"""PADE, positive attention dynamics enhancement (Lyu et al., Findings of ACL 2026)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from vlm_fix import Memory, Unchanged, VlmFixError, WeightEdit, param
from vlm_fix.arch import Arch
from vlm_fix.packing import pad_to
from vlm_fix.rows import Rows


@dataclass
class PADEMemory(Memory):
    """Of rows by position [B, n]: the image columns' weight in the layer before, mean over heads, and its rises so far."""

    before: dict[int, torch.Tensor] = field(default_factory=dict)
    rise: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PADE(WeightEdit):
    """Raises in the last layer the image columns to which attention turned from layer to layer.

    A_l [K]: weights of the row that predicts the next token in layer l of `layers` (L of them), mean over heads; V its image
    columns, S the prompt's columns before the first image. In the last of these layers, with z [H, K] the scores:
        P = 1 / (L - 1) sum_{l > 1} max(0, A_l - A_{l-1}) over V,   P' = P / max P,   MAD_h = median_V |z_h - median_V z_h|,
        d_h = lam MAD_h P',   z_h[V] <- z_h[V] + d_h,   z_h[S] <- z_h[S] - mean_V d_h.

    Source: arXiv 2602.15556, no code; of its text the abstract was to be had, and Eqs. 1-8 as two readers write them down
    (lam .1, the last layer best). Open there, and so chosen here: what P' is (scaled=false: P itself, whose values are a
    thousand times smaller than MAD), the rows (those that predict a token), the system's tokens (all before the image, as
    VAF has it), A of the last layer (its own, before the edit). Of an even number the lower median. Weights of 0 are no score.
    """

    name: ClassVar[str] = "pade"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.15556"
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.ANY_ROW
    idle_reason: ClassVar[str] = "no image column drew more weight in a later layer."
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"lam": (0.3, 1.0)}

    lam: float = param(0.1, "median absolute deviations that the column with the largest rise gains", low=0)
    scaled: bool = param(True, "divide the mean rise by its largest value")

    def resolve(self, arch: Arch) -> PADE:
        method: Any = super().resolve(arch)
        if len(method.layers) < 2:
            raise VlmFixError(f"pade: layers={self.layers!r} are too few; it follows attention over two or more.")
        return method  # type: ignore[no-any-return]

    @property
    def neutral(self) -> bool:
        return self.lam == 0

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        a, memory = weights, rows.memory(PADEMemory)
        assert isinstance(self.layers, tuple)
        at, session, width = self.layers.index(rows.layer), rows.session, rows.session.types.shape[1]
        seen = (a.detach() * rows.visual).mean(dim=1)  # [B, R, K]; columns that a window has left behind have no weight
        seen = pad_to(pad(seen, (max(0, width - a.shape[-1]), 0)), width)
        for now, place in zip(seen.unbind(dim=1), rows.numbers, strict=True):
            if at:  # tokens may be dropped in between
                there = session.whole.at(self.layers[at - 1])
                known = (session.translate(x[place], there) for x in (memory.before, memory.rise))
                before, rise = (pad_to(x.to(now.device), width) for x in known)
                memory.rise[place] = rise + (now - before).clamp(min=0)
            else:
                memory.rise[place] = torch.zeros_like(now)
            memory.before[place] = now
        if rows.layer != self.layers[-1]:
            return weights
        for place in rows.numbers:
            del memory.before[place]
        risen = torch.cat([rows.columns(memory.rise.pop(place)) for place in rows.numbers], dim=2)  # [B, 1, R, K]
        shown = rows.visual & (a > 0).any(dim=1, keepdim=True)  # what a window hides has no part in it
        p = risen / at * shown
        if self.scaled:
            p = p / p.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
        z = a.clamp(min=torch.finfo(a.dtype).tiny).log()  # the scores up to a constant, which MAD does not see
        image = torch.where(shown & (a > 0), z.detach(), torch.nan)
        middle = image.nanmedian(dim=-1, keepdim=True).values
        mad = (image - middle).abs().nanmedian(dim=-1, keepdim=True).values.nan_to_num()
        d = self.lam * mad * p  # a constant to gradients, as the rises are
        mean = d.sum(dim=-1, keepdim=True) / shown.sum(dim=-1, keepdim=True).clamp(min=1)
        moves = (d > 0).any(dim=-1, keepdim=True)
        new = (z + d - mean * rows.before).masked_fill((a == 0) & moves, -torch.inf).softmax(dim=-1)
        return torch.where(moves, new, a)
