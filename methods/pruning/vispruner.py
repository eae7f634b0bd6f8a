"""VisPruner: what the class token looks at, and of the rest what has no duplicate (Zhang et al., ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.diversity import cosines
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class VisPruner(TokenPruner):
    """Keeps the tokens with the most class-token attention, and the others whose likes are dropped round by round.

    With a_i the class token's attention (mean over heads) in the deepest layer that reaches the projector, x_i the features
    before it and budget T: important = top floor(`important` T) of a. The rest, in the order of a, is thinned out to
    T - floor(`important` T): split into its 1st, 3rd, ... members A and its 2nd, 4th, ... members B, the min(`step`, too
    many) of A with the largest max_b cos(x_a, x_b) go; A, most alike first, and then B make the next round's list.

    Source: arXiv 2412.01818; official code Theia-4869/VisPruner@aefa01a (important .5, 8 at a time; 128, 64, 32 of 576
    tokens). Deviations: a list of odd length, at which the official code fails, gives A one more; a round never drops more
    than A. Towers without a class token (Qwen-VL): attention received; x_i is a merge unit's four patches together. Ties
    go to the earlier of the list.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"

    important: float = param(0.5, "share of the budget for the tokens with the most attention", low=0, high=1)
    step: int = param(8, "duplicates dropped in a round", low=1)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.raw is not None
        (attention,) = image.first.values()
        budget = self.budget(len(attention))
        important = int(budget * self.important)
        likeness, left = cosines(image.raw()), budget - important
        order = attention.sort(descending=True, stable=True).indices.to(likeness.device)
        rest = order[important:] if left else order[:0]
        while len(rest) > left:
            a, b = rest[::2], rest[1::2]
            drop = min(self.step, len(rest) - left, len(a))
            alike = likeness[a][:, b].amax(dim=1).sort(descending=True, stable=True).indices
            rest = torch.cat([a[alike[drop:]], b])
        return torch.cat([order[:important], rest]).sort().values
