"""DART: a few pivots, and the tokens that are least like them (Wen et al., EMNLP 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import param
from vlm_fix.families import final_norm
from vlm_fix.pruning.columns import ImageColumns
from vlm_fix.pruning.kinds import POSITIONS, LayerPruner, Tokens, share_of
from vlm_fix.wing import engine_of


@dataclass(frozen=True)
class DART(LayerPruner):
    """Before layer K, keeps pivots, the tokens with the largest keys, and for each pivot the tokens that least duplicate it.

    Pivots: the `pivots` columns of an image with the largest |k_j|_1, k_j [Hkv D] rotated, of layer K - 1, and as many of
    the text after the last image. With x_j the hidden states that enter layer K, under the model's last norm: from one pivot
    to the next, in their order in the prompt, the n tokens of the image with the smallest cos(x_pivot, x_j) stay, of those
    not yet taken. n = (T - pivots) / (number of pivots), the first ones one more where that is not whole.

    Source: arXiv 2502.11494 (no attention is needed; K = 2, 4 and 4 pivots, 192, 128, 64 of 576 tokens); the authors'
    repository was not to be had, the rule is read from ModelTC/LightCompress@9701d03, dart.py. Deviations: the image's
    pivots count in the budget T, which is kept exactly (there n = floor(T / 8), and the pivots come on top); its order of
    pivots is that of a Python set. Positions stay as they were. Ties go to the lower index.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"

    keep: float = param(1 / 3, "image tokens kept per image: a count (> 1) or a share in (0, 1]", above=0, counts=True)
    layer: int = param(2, "K: the first layer that no longer gets the dropped tokens", low=1)
    pivots: int = param(4, "pivots among the tokens of an image, and among those of the text", low=1)
    positions: str | None = POSITIONS

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.layer,)

    def choose(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        norm = final_norm(engine_of(tokens.session.call.model).language)
        there = next(norm.parameters()).device  # with device_map it may lie elsewhere
        x = normalize(norm(tokens.hidden.to(there)).float(), dim=-1).to(tokens.hidden.device)
        size, question = tokens.keys().float().abs().sum(dim=(1, 3)), tokens.question
        whole, keep = tokens.session.whole.part(ImageColumns).images, torch.zeros_like(tokens.images, dtype=torch.bool)
        for b in range(len(keep)):
            text = self.largest(size[b], question[b].nonzero()[:, 0], self.pivots)
            for image in range(1, int(whole[b].max()) + 1):
                columns = (tokens.images[b] == image).nonzero()[:, 0]
                budget = share_of(self.keep, int((whole[b] == image).sum()))
                own = self.largest(size[b], columns, min(self.pivots, budget))
                keep[b, own] = True
                pivots, left = torch.cat([own, text]).sort().values, min(budget, len(columns)) - len(own)
                for n, pivot in enumerate(pivots.tolist()):
                    free = columns[~keep[b, columns]]
                    alike = (x[b, free] @ x[b, pivot]).sort(stable=True).indices
                    keep[b, free[alike[: left // len(pivots) + (n < left % len(pivots))]]] = True
        return keep, tokens.hidden

    @staticmethod
    def largest(size: torch.Tensor, columns: torch.Tensor, count: int) -> torch.Tensor:
        return columns[size[columns].sort(descending=True, stable=True).indices[:count]]
