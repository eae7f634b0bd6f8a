"""VAF, visual amplification fusion ("ClearSight", Yin et al., CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import ColumnEdit, ColumnFactors, RowScope, param
from vlm_fix.arch import Arch
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class VAF(ColumnEdit):
    """Multiplies raw scores in the middle layers: image columns up, system-prompt columns down.

    z[V] <- enhance z[V];   z[S] <- suppress z[S], before the mask and softmax, on prompt rows after the image and on
    every decode row; V are the image columns and S the text before the first image.

    Source: arXiv 2503.13107; official code ustc-hyin/ClearSight@5466c94 (1.15 and .95, layers 9-14 of LLaVA-1.5's 32,
    scaled to the model's depth here). As in the official code the factor acts on the score itself: a negative score of
    an image column falls. The paper's restriction to vision-aware heads is left out. A prompt with several images is
    edited after the last one.
    """

    name: ClassVar[str] = "vaf"
    form_holds: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.13107"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"enhance": (1.05, 1.3)}
    row_scope = RowScope.AFTER_IMAGE
    heads_apart: ClassVar[bool] = True

    enhance: float = param(1.15, "factor on the image columns' scores", low=0)
    suppress: float = param(0.95, "factor on the scores of text before the image", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{round(9 / 32 * arch.depth)}-{round(14 / 32 * arch.depth)}"}

    @property
    def neutral(self) -> bool:
        return self.enhance == 1 and self.suppress == 1

    def column_factors(self, rows: Rows) -> ColumnFactors:
        enhance = torch.full(rows.visual.shape, self.enhance, device=rows.visual.device)
        return ColumnFactors(torch.where(rows.visual, enhance, torch.where(rows.before, self.suppress, 1.0)))
