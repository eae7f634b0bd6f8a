"""VisionZip: dominant tokens, and contextual tokens merged from the rest (Yang et al., CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.pruning.merge import TokenMerger, means, nearest


@dataclass(frozen=True)
class VisionZip(TokenMerger):
    """Keeps the tokens that the encoder's class token looks at, and sums the others up in a few contextual tokens.

    With budget T per image and C = round(contextual T): dominant = the T - C patches with the highest attention from
    the class token (mean over heads) at the deepest layer that reaches the projector. Of the N other tokens, in reading
    order, every floor(N / C)-th, C in all, is a target; each remaining one goes to the target with the highest cosine
    of keys (mean over heads, same layer). A target becomes M(x + mean of the x that came to it), with x the features
    before the projector M.

    Source: arXiv 2412.04467; official code dvlab-research/VisionZip (54 + 10, 108 + 20, 162 + 30 of 576 tokens).
    Deviations: the class token, one of the official dominant tokens, is no image token here: a patch takes its place;
    contextual tokens stay at their target's place in the sequence instead of after the dominant ones. Towers without a
    class token (Qwen-VL): attention received, mean over heads and queries; a merge unit has its patches' mean score and
    mean key (rotated, as attention uses it).
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"

    contextual: float = param(10 / 64, "share of the budget for contextual tokens", low=0, high=1)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def reduce(self, image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
        assert image.features is not None and image.raw is not None and image.project is not None
        (scores,), (keys,) = image.first.values(), image.keys.values()
        budget = self.budget(len(scores))
        targets = round(budget * self.contextual)
        dominant = scores.sort(descending=True, stable=True).indices[: budget - targets]
        others = torch.ones_like(scores, dtype=torch.bool)
        others[dominant] = False
        rest = others.nonzero()[:, 0]
        features = image.features.clone()
        if not targets:
            return dominant.sort().values, features[dominant.sort().values.to(features.device)]
        place = torch.arange(targets, device=rest.device) * (len(rest) // targets)
        target, others[rest[place]] = rest[place], False
        assigned = others.nonzero()[:, 0]
        home, raw = nearest(keys[assigned], keys[target]), image.raw().float()
        mean, count = means(raw[assigned.to(raw.device)], home, targets)
        merged = image.project(raw[target.to(raw.device)] + mean)
        hit = (count > 0).to(target.device)  # a target that nothing came to stays as it is, bit for bit
        features[target[hit].to(features.device)] = merged[hit.to(merged.device)].to(features)
        kept = torch.cat([dominant, target]).sort().values
        return kept, features[kept.to(features.device)]
