"""LocoRE, local coherence reinforcement ("Hallucination Begins Where Saliency Drops", Zhang et al., ICLR 2026)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import LogWeightEdit, Unchanged, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class LocoRE(LogWeightEdit):
    """Strengthens attention from the current step to the tokens generated just before.

    A[last, j] <- (1 + beta) A[last, j] for the `window` most recent output columns j, renormalised, that is
    z[j] += log(1 + beta). Output columns are generated tokens, the newest (the row's own) included; the prompt's last
    row has none.

    Source: arXiv 2601.20279, text only (the official code zhangbaijin/LVLMs-Saliency@05c0d0d holds the paper's other
    method, SGRS). beta .15 for LLaVA, .20 for Qwen2-VL. The paper's window w_s is not known: 8 is a choice made here.
    All layers are edited, as the formula names none. Needs no image.
    """

    name: ClassVar[str] = "locore"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.20279"
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.PROMPT_ROWS
    needs_image: ClassVar[bool] = False
    heads_apart: ClassVar[bool] = True
    idle_reason: ClassVar[str] = "it acts from the second token on; generate more."
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"beta": (0.05, 0.3)}

    beta: float | None = param(None, "share added to the attention weights of recent output columns", low=0)
    window: int = param(8, "number of most recent output columns, w_s in the paper", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"beta": 0.2 if arch.family.mrope else 0.15}

    @property
    def neutral(self) -> bool:
        return self.beta == 0 or self.window == 0

    def log_weights(self, rows: Rows) -> torch.Tensor:
        return rows.once(self.bias)

    def form(self, rows: Rows) -> ScoreForm:
        return ScoreForm(bias=rows.once(self.bias))

    def bias(self, rows: Rows) -> torch.Tensor:
        """Broadcasts to [B, 1, R, K]: log(1 + beta) on each row's most recent output columns, else 0."""
        assert self.beta is not None
        age = rows.age
        return ((age >= 0) & (age < self.window) & rows.generated) * math.log1p(self.beta)
