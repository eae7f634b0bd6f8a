"""Random visual tokens: a control for pruning."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner, param
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class RandomTokens(TokenPruner):
    """Keeps T tokens per image drawn uniformly without replacement. A method that does not beat this has no score.

    The draw is seeded by `seed` and the image's own pixels: neither batching nor the order of images changes it.
    """

    name: ClassVar[str] = "random_tokens"

    seed: int = param(0, "seed of the draw", low=0, high=2**32 - 1)

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.pixels is not None
        tokens = image.grid[0] * image.grid[1]
        content = image.pixels.detach().float().cpu().contiguous().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content, self.seed))
        return torch.randperm(tokens, generator=generator)[: self.budget(tokens)].sort().values
