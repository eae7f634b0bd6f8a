"""A smaller image: the control that pruning must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from vlm_fix.pruning.kinds import ImageShrinker


@dataclass(frozen=True)
class DownsampleImage(ImageShrinker):
    """Shrinks the image so that the vision tower makes at most T tokens: h' x w' instead of h x w.

    h' = max(1, floor(sqrt(T h / w))), w' = max(1, floor(T / h')), neither above h or w (nor h' above T).
    Pixels are resized after the processor (bicubic, antialiased). Towers with learned position embeddings (CLIP,
    SigLIP) interpolate them, which they were not trained for; Qwen2.5-VL takes any size by design. The tower is faster
    too, which no pruner can claim.

    Positions: "compact" re-numbers the tokens; "original" spreads them over the places that the whole image had, which
    keeps M-RoPE's scale.

    Source: the control of VTC-Bench (arXiv 2510.07143); its resizing is done here on the processed pixels.
    """

    name: ClassVar[str] = "downsample_image"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"

    def shrink(self, grid: tuple[int, int]) -> tuple[int, int]:
        total = self.budget(grid[0] * grid[1])
        height = min(grid[0], total, max(1, math.isqrt(total * grid[0] // grid[1])))
        return height, min(grid[1], max(1, total // height))
