"""HoloV: each part of the image has a share of the budget, by its attention and variety (Zou et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import TokenPruner, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class HoloV(TokenPruner):
    """Splits the budget T among `crops` runs of tokens by what they hold, and keeps in each those looked at most.

    Tokens in reading order fall into P = `crops` runs of n = N / P (the first ones take the remainder). In a run, with a_i the
    class token's attention (head mean, deepest layer that reaches the projector) and z_i projected, S_ij = cos(z_i, z_j),
    S_ii = 0:   m_i = sum_j S_ij / (n - 1),   v_i = sum_j (S_ij - m_i)^2 / (n - 1)  (j = i too),
        score = mean_i (1000 a_i + alpha g v_i),   g = mean 1000 a / (mean v + 1e-6);   a run of one token: a.
    A run gets floor(T score / sum score) tokens, and the heaviest ones one more each until T is spent: its top a.

    Source: arXiv 2510.02912; official code obananas/HoloV@1d2e65e (P = 16, alpha .09, 64 of 576 tokens). Deviations: what
    a run has no tokens for goes to the heaviest that do (the official code fills up with zero vectors); tokens stay in
    reading order. Towers without a class token (Qwen-VL): attention received. Ties go to the lower index.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.02912"

    crops: int = param(16, "runs of tokens that share the budget", low=1)
    alpha: float = param(0.09, "weight of a run's variety beside its attention", low=0)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.features is not None
        (attention,) = image.first.values()
        attention, count = attention.float(), len(attention)
        z = normalize(image.features.float(), dim=-1).to(attention.device)
        runs = torch.arange(count, device=z.device).tensor_split(min(self.crops, count))
        scores = torch.stack([self.score(attention[run], z[run]) for run in runs])
        quotas = shared(scores, [len(run) for run in runs], self.budget(count))
        best = [
            run[attention[run].sort(descending=True, stable=True).indices[:q]]
            for run, q in zip(runs, quotas, strict=True)
        ]
        return torch.cat(best).sort().values

    def score(self, a: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Of a run: attention [n] and normalised features [n, C] -> its weight."""
        if len(a) == 1:
            return a[0]
        likeness = (z @ z.T).fill_diagonal_(0)
        mean = likeness.sum(dim=1, keepdim=True) / (len(a) - 1)
        variance = (likeness - mean).square().sum(dim=1) / (len(a) - 1)
        a = 1000 * a
        return (a + self.alpha * variance * a.mean() / (variance.mean() + 1e-6)).mean()


def shared(scores: torch.Tensor, sizes: list[int], budget: int) -> list[int]:
    """Shares of the budget in proportion to scores, rounded down, at most each size; the rest one by one, heaviest first."""
    exact = (budget * scores / (scores.sum() + 1e-6)).tolist()
    quotas = [min(int(share), size) for share, size in zip(exact, sizes, strict=True)]
    order, left = scores.sort(descending=True, stable=True).indices.tolist(), budget - sum(quotas)
    while left:
        for i in order:
            if left and quotas[i] < sizes[i]:
                quotas[i], left = quotas[i] + 1, left - 1
    return quotas
