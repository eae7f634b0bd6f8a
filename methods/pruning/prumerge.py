"""PruMerge and PruMerge+: outliers of attention, evenly spaced tokens, and their nearest ones merged in (Shang et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.pruning.merge import TokenMerger


@dataclass(frozen=True)
class PruMerge(TokenMerger):
    """Keeps what the class token looks at and some tokens in between, each with its nearest ones added; and one of the rest.

    In encoder layer `layer`, heads taken as one, q and k [1 + N, Cv]: a = softmax(q_class k^T / sqrt(Cv)), of the patches.
    Salient: those of largest a; between them, evenly spaced ones (PruMerge+). With x_i the features before the projector M
    and near(i) the `neighbours` others of largest cos(k_i, k_j), dropped or not, a kept token becomes
        M(x_i + sum_{j in near(i)} a_j x_j),   and one more token is M(sum_{j dropped} a_j x_j).
    Budget T counts that one; round(`spatial` (T - 1)) of the others are spaced. With adaptive=true `keep` is unused:
    salient are the m tokens with a above its third quartile + 1.5 interquartile ranges, spaced every floor(floor(N / m) / 3)-th.

    Source: arXiv 2403.15388; official code 42Shawn/LLaVA-PruMerge@097c041 (the last layer of CLIP, though the features are
    the one's before, 32 neighbours, adaptive; about a quarter of its tokens are salient). spatial=0 is PruMerge. Deviations:
    a set budget, with spaced tokens taken evenly among those that are not salient; the token of the rest stands at the
    last dropped one's place, not behind all; a budget that covers all tokens merges nothing. Ties go to the lower index.
    Towers without a class token (Qwen-VL): attention received and keys, both means over heads; x_i is a merge unit.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"

    spatial: float = param(
        0.75, "share of the kept tokens that are evenly spaced; 0: PruMerge without +", low=0, high=1
    )
    neighbours: int = param(32, "nearest tokens that are added to a kept one", low=0)
    adaptive: bool = param(False, "let the image decide how many tokens are kept, not `keep`")
    layer: int | None = param(None, "encoder layer of attention and keys, counted from 1; None: the last", low=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"keep": 1 / 3, "layer": max(arch.vision_full) + 1}

    def resolve(self, arch: Arch) -> PruMerge:
        method = super().resolve(arch)
        assert isinstance(method, PruMerge) and method.layer is not None
        if method.layer - 1 not in arch.vision_full:
            layers = ", ".join(str(i + 1) for i in arch.vision_full)
            raise VlmFixError(f"prumerge: layer={method.layer} must be a full-attention encoder layer: {layers}.")
        return method

    @property
    def neutral(self) -> bool:
        return self.keep == 1 and not self.adaptive

    @property
    def exact(self) -> bool:
        return not self.adaptive

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        assert self.layer is not None
        return (self.layer - 1,)

    def reduce(self, image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
        assert image.features is not None and image.raw is not None and image.project is not None
        (a, keys), raw = joint(image), image.raw().float()
        a, keys, x = a.to(raw.device), keys.to(raw.device), raw.flatten(1)
        count, budget = len(a), self.budget(len(a))
        if not self.adaptive and budget == count:
            return torch.arange(count), image.features
        kept = self.chosen(a, budget)
        dropped = torch.ones(count, dtype=torch.bool, device=x.device).index_fill(0, kept, False).nonzero()[:, 0]
        near = (keys[kept] @ keys.T).scatter(1, kept[:, None], -torch.inf)
        near = near.sort(dim=1, descending=True, stable=True).indices[:, : min(self.neighbours, count - 1)]
        merged = x[kept] + (a[near][..., None] * x[near]).sum(dim=1)
        if len(dropped):
            kept = torch.cat([kept, dropped[-1:]])
            merged = torch.cat([merged, (a[dropped, None] * x[dropped]).sum(dim=0, keepdim=True)])
        order = kept.argsort()
        return kept[order], image.project(merged[order].view(-1, *raw.shape[1:]))

    def chosen(self, a: torch.Tensor, budget: int) -> torch.Tensor:
        """The salient and the evenly spaced tokens, by attention [N], ascending."""
        count, order = len(a), a.sort(descending=True, stable=True).indices
        salient = max(0, budget - 1 - round(self.spatial * (budget - 1)))
        if self.adaptive:
            low, high = a.quantile(torch.tensor([0.25, 0.75], device=a.device))
            salient = max(1, int((a > high + 1.5 * (high - low)).sum()))
        picked = torch.zeros(count, dtype=torch.bool, device=a.device).index_fill(0, order[:salient], True)
        if self.adaptive and self.spatial:
            picked[: count - 1 : max(1, count // salient // 3)] = True
        elif not self.adaptive:
            rest, spaced = (~picked).nonzero()[:, 0], budget - 1 - salient
            picked[rest[torch.arange(spaced, device=rest.device) * len(rest) // max(1, spaced)]] = True
        return picked.nonzero()[:, 0]


def joint(image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [N] from the class token, heads taken as one, and normalised keys [N, C]; without one the heads' means."""
    ((layer, heads),) = image.heads.items()
    count = image.grid[0] * image.grid[1]
    if len(heads) != 1 or heads[0][0].shape[1] != count + 1:
        return image.first[layer].float(), normalize(image.keys[layer].float(), dim=-1)
    q, k = (part.float().transpose(0, 1).flatten(1) for part in heads[0][:2])
    a = (k @ q[0] / q.shape[1] ** 0.5).softmax(dim=0)
    return a[1:], normalize(k[1:], dim=-1)
