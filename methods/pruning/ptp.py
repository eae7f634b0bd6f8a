"""PTP, pyramid token pruning for images cut into tiles: region, token and instruction scores (Liang et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.arch import Arch
from vlm_fix.pruning.columns import ImageColumns
from vlm_fix.pruning.kinds import POSITIONS, LayerPruner, Tokens, share_of


@dataclass(frozen=True)
class PTP(LayerPruner):
    """Salient tiles get more of the prompt's token budget; inside a tile the encoder's and the question's choice mix.

    With b_j the class token's attention to token j in the deepest encoder layer that reaches the projector (mean over
    heads), tile t gets T_t = T S_t / sum S of the budget T, S_t = mean_{j in t} b_j, at most its size (the rest goes to
    the other tiles). c_j = max over the question's tokens of the head-mean attention in language-model layer `layer`.
    Kept after it: the top T_t of (1 - alpha) b_j + alpha c_j in each tile.

    Source: arXiv 2509.15704 (alpha .5, layer 2); official code unknown. A tile is an image, or a crop
    of one where the model cuts images (LLaVA-NeXT, OneVision; the small whole image counts as one). Ambiguities:
    whether b and c are brought to one scale before they are mixed (`scale`: min-max over the tile, or none), the
    rounding of T_t (down, largest remainders first), and encoders without a class token (Qwen-VL: attention received,
    which has the same sum in every tile, so that T_t then follows 1 / its size). Positions stay. Ties: lower index.
    """

    name: ClassVar[str] = "ptp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.15704"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"keep": (0.75,)}

    keep: float = param(
        0.5, "image tokens kept per image, on average over a prompt's: a count (> 1) or a share", above=0, counts=True
    )
    layer: int = param(2, "language-model layer whose attention rates the tokens; they are dropped after it", low=0)
    alpha: float = param(0.5, "weight of the question's attention against the encoder's", low=0, high=1)
    scale: str = param("minmax", "scaling of both scores inside a tile", choices=("minmax", "none"))
    positions: str | None = POSITIONS

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.layer + 1,)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def choose(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        relevance = tokens.rows(torch.where(tokens.question.any(dim=1, keepdim=True), tokens.question, tokens.last))
        relevance, keep = relevance.amax(dim=1), torch.zeros_like(tokens.images, dtype=torch.bool)
        for b, images in enumerate(tokens.session.whole.part(ImageColumns).vision):
            saliency = [next(iter(image.first.values())).float() for image in images]
            saliency = [s if i.here is None else s[i.here] for s, i in zip(saliency, images, strict=True)]
            shares = [self.keep if self.keep <= 1 else self.keep / image.siblings for image in images]
            budgets = allot([float(s.mean()) for s in saliency], [len(s) for s in saliency], shares)
            for number, (s, budget) in enumerate(zip(saliency, budgets, strict=True), 1):
                columns = (tokens.images[b] == number).nonzero()[:, 0]
                mixed = (1 - self.alpha) * self.scaled(s.to(relevance.device))
                mixed = mixed + self.alpha * self.scaled(relevance[b, columns])
                keep[b, columns[mixed.sort(descending=True, stable=True).indices[:budget]]] = True
        return keep, tokens.hidden

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        span = x.max() - x.min()
        return x if self.scale == "none" else (x - x.min()) / span if span > 0 else torch.zeros_like(x)


def allot(saliency: list[float], sizes: list[int], keep: list[float]) -> list[int]:
    """Budgets of tiles: the sum of their own budgets, shared by saliency, at most each tile's size."""
    saliency = saliency if sum(saliency) else [1.0] * len(sizes)
    left, budgets = sum(share_of(k, n) for k, n in zip(keep, sizes, strict=True)), [0] * len(sizes)
    open_tiles = list(range(len(sizes)))
    while left and open_tiles:
        total = sum(saliency[i] for i in open_tiles)
        exact = {i: left * saliency[i] / total for i in open_tiles}
        full = [i for i in open_tiles if budgets[i] + exact[i] >= sizes[i]]
        if not full:
            for i in open_tiles:
                budgets[i] += int(exact[i])
            rest = left - sum(int(v) for v in exact.values())
            for i in sorted(open_tiles, key=lambda i: (int(exact[i]) - exact[i], i))[:rest]:
                budgets[i] += 1
            break
        for i in full:
            left, budgets[i] = left - (sizes[i] - budgets[i]), sizes[i]
        open_tiles = [i for i in open_tiles if i not in full]
    return budgets
