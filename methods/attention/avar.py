"""AVAR's training-free intervention ("From Narrow to Panoramic Vision", Luo et al., ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import ColumnEdit, ColumnFactors, RowScope, param
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class AVAR(ColumnEdit):
    """Raises the visual attention score, VAS = mean over layers, heads and output rows of sum A[V] / sum A[S].

    z[V] <- visual z[V];   z[S] <- (1 - system) z[S], before the mask and softmax, on prompt rows after the image and on
    every decode row; V are the image columns and S the text before the first image.

    Source: arXiv 2603.03825 (factors 1.15 for the image, 1 or .60 for the system prompt; Qwen2.5-VL-7B). AVAR itself is
    a way of training; only this intervention needs none. It is not in the official code, and its rows and layers are
    not known: here the rows are VAF's and the layers all. `vlm_fix.observe(model, inputs).vas` gives the score itself.
    """

    name: ClassVar[str] = "avar"
    form_holds: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.03825"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"visual": (1.05, 1.3)}
    row_scope = RowScope.AFTER_IMAGE
    heads_apart: ClassVar[bool] = True

    visual: float = param(1.15, "factor on the image columns' scores", low=0)
    system: float = param(
        0.0, "share taken off the scores of text before the image; the paper tries 0 and 0.4", low=0, high=1
    )

    @property
    def neutral(self) -> bool:
        return self.visual == 1 and self.system == 0

    def column_factors(self, rows: Rows) -> ColumnFactors:
        visual = torch.full(rows.visual.shape, self.visual, device=rows.visual.device)
        return ColumnFactors(torch.where(rows.visual, visual, torch.where(rows.before, 1 - self.system, 1.0)))
