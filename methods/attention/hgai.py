"""HGAI, heads-guided attention intervention ("Devils in Middle Layers", Jiang et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import ScoreEdit, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class HGAI(ScoreEdit):
    """Adds to every head's image scores what all heads together think of each image column.

    z[h, V] <- z[h, V] + alpha mean_h' |z[h', V]|, before the mask and softmax, on the last prompt row and decode rows.

    Source: arXiv 2411.16724; official code ZhangqiJiang07/middle_layers_indicating_hallucinations@a0622a9 (alpha .5,
    layers 5-17 of LLaVA-1.5's 32, scaled to the model's depth here).
    """

    name: ClassVar[str] = "hgai"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.16724"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 1.0)}

    alpha: float = param(0.5, "share of the heads' mean |z| added to the image columns' scores", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{round(5 / 32 * arch.depth)}-{min(round(17 / 32 * arch.depth), arch.depth - 1)}"}

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        raised = scores + self.alpha * scores.abs().mean(dim=1, keepdim=True)
        return torch.where(rows.visual, raised, scores)

    def form_of_scores(self, scores: Callable[[], torch.Tensor], rows: Rows) -> ScoreForm:
        return ScoreForm(bias=self.alpha * (scores().abs().mean(dim=1, keepdim=True) * rows.visual))
