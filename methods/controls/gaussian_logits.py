"""Gaussian noise on the next-token distribution. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step


@dataclass(frozen=True)
class GaussianLogits(LogitEdit):
    """Control: adds noise to the log-probabilities where a contrast method adds alpha (log p - log p').

    z = log p + sigma N(0, 1), independent per token of the vocabulary and per step, tokens with p < beta max p cut off.
    For a fair comparison take the method's beta, and as sigma the standard deviation of its term over the tokens left uncut:
    `vlm_fix.contrast_term(model).sd` after a call. `vlm-fix eval --controls` measures it on each benchmark and runs this so.

    The noise is seeded by `seed` and the row's images, prompt and answer so far, so that batching does not change it.
    Source: a control of this project.
    """

    name: ClassVar[str] = "gaussian_logits"
    kind: ClassVar[str] = "control"
    on_logits: ClassVar[bool] = True

    sigma: float = param(1.0, "standard deviation of the noise", low=0)
    beta: float = param(0.0, "plausibility cut-off; 0 = none", low=0, high=1)
    seed: int = param(0, "seed of the noise", low=0, high=2**32 - 1)

    @property
    def neutral(self) -> bool:
        return self.sigma == 0 and self.beta == 0

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        rows = [torch.randn(l.shape[1], generator=torch.Generator().manual_seed(s)) for s in step.seeds(self.seed)]
        return plausible(l + self.sigma * torch.stack(rows).to(l.device), l, self.beta)
