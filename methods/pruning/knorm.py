"""L2-norm cache compression: keys with a small norm are the ones that attract attention (Devoto et al., EMNLP 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.pruning.kinds import Cached, CachePruner


@dataclass(frozen=True)
class KNorm(CachePruner):
    """After the prompt, each layer keeps the image keys (and values) of smallest norm.

    Score of column j in key-value head g: -||k_gj||_2, k [N, D] after the rotary embedding; the top `keep` of each image
    stay, in each head its own, or in all heads of a layer those with the highest mean score.

    Source: arXiv 2406.11430; NVIDIA/kvpress@8bb29b9 (KnormPress, each head its own). Deviations: text keys are never
    dropped, the papers' methods compress all of the prompt; the paper leaves the first two layers alone, kvpress none
    (`layers`). Ties go to the lower index.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"

    heads: str = param("each", "each key-value head chooses, or all together by their mean", choices=("each", "mean"))

    def scores(self, cached: Cached) -> torch.Tensor:
        norms = -cached.keys.float().norm(dim=-1)
        return norms if self.heads == "each" else norms.mean(dim=1, keepdim=True)
