"""DivPrune, diversity-based visual token pruning (Alvar et al., CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner
from vlm_fix.pruning.diversity import spread
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class DivPrune(TokenPruner):
    """Keeps the T projected tokens whose smallest pairwise distance is greedily as large as possible.

    With d(i, j) = 1 - cos(z_i, z_j) on the projector's outputs: the first token is argmax_i min_{j != i} d(i, j), each
    next one argmax_{i not in P} min_{j in P} d(i, j). Tokens stay in order; no attention, nothing merges.

    Source: arXiv 2503.02175, written from its formula. Distances in float32, ties to the lower index. The default
    keep is that of the other pruners here, 1/3. Diverse tokens can raise POPE and CHAIR at once: report both.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.features is not None
        return spread(image.features, self.budget(len(image.features)))
