"""FastV: image tokens that the last token no longer looks at are dropped early (Chen et al., ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.pruning.kinds import POSITIONS, LayerPruner, Tokens, share_of


@dataclass(frozen=True)
class FastV(LayerPruner):
    """Before layer K, keeps the image tokens with the highest attention from the prompt's last token in layer K - 1.

    With A_h the causal softmax of head h in layer K - 1, at the prompt's last row: s_j = mean_h A_h[last, j] over the
    image's columns j [N]; the top `keep` stay, per image, in their order. Deeper layers never see the others.

    Source: arXiv 2403.06764; official code pkunlp-icler/FastV (K = 2 and half of the tokens in the paper; 3 and a quarter
    in the demo). Positions stay as they were. Several images: each has its own budget (the code knows one image).
    Ties go to the lower index.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"keep": (0.75,)}

    keep: float = param(0.5, "image tokens kept per image: a count (> 1) or a share in (0, 1]", above=0, counts=True)
    layer: int = param(2, "K: the first layer that no longer gets the dropped tokens", low=1)
    positions: str | None = POSITIONS

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.layer,)

    def quota(self, stage: int, count: int) -> int:
        return share_of(self.keep, count)

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention()
