"""Evenly spaced visual tokens: a control for pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class UniformGrid(TokenPruner):
    """Keeps exactly T of h x w tokens, evenly spaced, without looking at the image.

    r = round(sqrt(T h / w)) rows (limited so that T tokens fit), row i of r at y = floor((i + 1/2) h / r); the rows
    share T as evenly as whole numbers allow, and token k of a row with c tokens is at x = floor((k + 1/2) w / c).
    """

    name: ClassVar[str] = "uniform_grid"

    def select(self, image: ImageTokens) -> torch.Tensor:
        height, width = image.grid
        total = self.budget(height * width)
        rows = max(-(-total // width), min(height, total, round((total * height / width) ** 0.5)))
        kept = []
        for i in range(rows):
            y, count = (2 * i + 1) * height // (2 * rows), (i + 1) * total // rows - i * total // rows
            kept += [y * width + (2 * k + 1) * width // (2 * count) for k in range(count)]
        return torch.tensor(kept)
