"""FarSight, attention causal decoding (Tang et al., CVPR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import Memory, RowScope, ScoreEdit, WeightEdit, param
from vlm_fix.session import Rows


@dataclass
class FarSightMemory(Memory):
    """scores: [B, H, R, K] of the rows whose weights come next."""

    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class FarSight(ScoreEdit, WeightEdit):
    """Gives every row registers to the right of the diagonal, which take attention that no column deserves.

    Row i of n has the scores w[i, j] for j <= i and -(j - i) sigma for its n - 1 - i registers; after one softmax over both
    the registers are dropped: a[i, j] <- a[i, j] Z_i / (Z_i + R_i), Z_i = sum_j exp w[i, j],
    R_i = sum_{k = 1}^{n - 1 - i} exp(-k sigma). Weights of a row then sum to less than 1, the less the lower its scores are;
    later rows have fewer registers (the paper's diminishing masking rate).

    Source: arXiv 2505.16652, equations W = w C + P, P[i, j] = -(j - i) sigma, softmax(W) C; no official code. What was not
    to be had is a parameter: sigma, of which no value is known here (1 is ours), and n: the prompt's columns and `length`
    more, where the paper speaks of a sequence length of 256. Scores are those that this edit gets: in a stack, edits of
    scores after it and log-weights are not in Z.
    """

    name: ClassVar[str] = "farsight"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.16652"
    heads_apart: ClassVar[bool] = True
    row_scope = RowScope.ALL

    sigma: float = param(1.0, "decay of the registers' scores per column", above=0)
    length: int = param(256, "columns after the prompt for which there are registers; 0: none at all", low=0)

    @property
    def neutral(self) -> bool:
        return self.length == 0

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        rows.memory(FarSightMemory).scores = scores
        return scores

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        memory = rows.memory(FarSightMemory)
        assert memory.scores is not None
        top, at = weights.max(dim=-1, keepdim=True)  # of any column: log Z = w - log a
        log_z, memory.scores = memory.scores.gather(-1, at) - top.log(), None
        count = (rows.session.prompt_len + self.length - 1 - rows.positions.to(weights.device)).clamp(min=0)
        held = torch.special.expm1(-self.sigma * count.to(weights)) / math.expm1(-self.sigma) * math.exp(-self.sigma)
        return weights * torch.sigmoid(log_z - held.log()[:, None])
