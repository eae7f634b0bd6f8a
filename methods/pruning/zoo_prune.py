"""ZOO-Prune, token pruning by zeroth-order sensitivity of the projector (Kim, Zhang et al., CVPR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner, param
from vlm_fix.pruning.diversity import spread
from vlm_fix.pruning.encoder import ImageTokens, chunk_bytes


@dataclass(frozen=True)
class ZooPrune(TokenPruner):
    """Keeps tokens whose projection reacts to small changes and that differ from each other; needs no attention.

    With x_i the features before the projector M, z_i = M(x_i), and m random unit vectors u_j shared by all tokens:
        S_i = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / 2h,   scaled to [0, 1] over the image;
    the first token is argmax S, each next one argmax_{i not in P} S_i min_{j in P} (1 - cos(z_i, z_j)).

    Source: arXiv 2509.24837; official code AIM-SKKU/ZOO-Prune@159f7f9 (m = 64, h = .01; 192/128/64 of 576 tokens).
    Deviations: S is computed in float32, where the official code perturbs in half precision; the directions are seeded.
    Qwen-VL, which the official code leaves out: x_i is the token's merge unit of four patches, u_j has its size.
    Ties go to the lower index.
    """

    name: ClassVar[str] = "zoo_prune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24837"

    directions: int = param(64, "random directions m", low=1)
    step: float = param(0.01, "step size h along a direction", low=1e-6)
    seed: int = param(0, "seed of the directions", low=0, high=2**32 - 1)

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.features is not None
        s = self.sensitivity(image)
        span = s.max() - s.min()
        weight = (s - s.min()) / span if span > 0 else torch.ones_like(s)
        return spread(image.features, self.budget(len(s)), weight.to(image.features.device))

    def sensitivity(self, image: ImageTokens) -> torch.Tensor:
        """S before scaling, [N] float32."""
        assert image.raw is not None and image.project is not None and image.features is not None
        x = image.raw().float()
        unit = torch.randn((self.directions, x[0].numel()), generator=torch.Generator().manual_seed(self.seed))
        unit = (unit / unit.norm(dim=-1, keepdim=True)).view(-1, 1, *x.shape[1:]).to(x.device)
        total, each = torch.zeros(len(x), device=x.device), 8 * len(x) * max(x[0].numel(), image.features.shape[-1])
        for u in unit.split(max(1, chunk_bytes(x) // each)):
            change = image.project(x + self.step * u) - image.project(x - self.step * u)
            total += change.norm(dim=-1).sum(dim=0)
        return total / (2 * self.step * self.directions)
