"""PAI, Pay More Attention to Image (Liu et al., ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, ScoreEdit, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class PAI(ScoreEdit, Contrast):
    """Raises the raw attention scores of image columns on the row that predicts the next token.

    z[V] <- z[V] + alpha |z[V]|, before the mask and softmax, on the last prompt row and every decode row.
    With gamma > 1, classifier-free guidance against the prompt without its image:
    z = gamma (log p - log p_text) + log p_text, cut off at p < beta max p.

    Source: arXiv 2407.21771; official code LALBJ/PAI@9bbd8bd (alpha .2 for LLaVA-1.5, gamma 1.1, layers 2-31).
    Deviations: with guidance on, the official code leaves the prompt's last row unamplified; here it is always edited.
    There the guidance follows generate's own processors (repetition penalty, ...); here it comes before them.
    The official default runs with guidance; here gamma = 1 (attention part only) unless asked for.
    """

    name: ClassVar[str] = "pai"
    kind: ClassVar[str] = "attention"
    heads_apart: ClassVar[bool] = True
    form_holds: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.21771"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.1, 0.4, 0.6)}

    alpha: float = param(0.2, "share of |z| added to the image columns' scores", low=0)
    gamma: float = param(1.0, "guidance against the prompt without image; 1 = off, the paper uses 1.1", low=1)
    beta: float = param(0.1, "plausibility cut-off of the guidance", low=0, high=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(2, arch.depth - 1)}-"}

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.gamma == 1

    @property
    def contrasts(self) -> bool:
        return self.gamma > 1

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        return torch.where(rows.visual, scores + self.alpha * scores.abs(), scores) if self.alpha else scores

    def form(self, rows: Rows) -> ScoreForm:
        added = self.alpha * rows.visual
        return ScoreForm(1 + added, 1 - added)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.without_images()

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible(self.gamma * (l - l_neg) + l_neg, l, self.beta)
