"""HiPrune, hierarchical attention pruning (Liu et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import TokenPruner, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class HiPrune(TokenPruner):
    """Keeps the tokens that the vision encoder attends to: objects in a middle layer, global registers in a deep one.

    With s_l the attention that a patch receives in encoder layer l (mean over heads and queries) and budget T per image:
    anchors = top round(alpha T / 5) of s at `object_layer`; buffer = their four neighbours on the grid;
    registers = top of s at the deepest layer that reaches the projector, for the rest of T. Order is kept, nothing merges.

    Source: arXiv 2508.00553; official code Danielement321/HiPrune (alpha .1; LLaVA layer 9 of 24 and 192/128/64 of 576
    tokens; Qwen2.5-VL layer 16 of 32, shares .334/.223/.112, M-RoPE kept). Layers scale with the encoder's depth.
    Deviation: neighbours do not wrap across rows as the official code lets them, counting patches in one line
    (border=line). Ties go to the earlier token.
    """

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"

    alpha: float = param(0.1, "share of the budget for anchors with their neighbours", low=0, high=1)
    object_layer: int | None = param(None, "encoder layer of the anchors, counted from 1 as in the paper", low=1)

    border: str = param("grid", "neighbours at the ends of rows: none, or the next row's", choices=("grid", "line"))

    def defaults(self, arch: Arch) -> dict[str, Any]:
        middle = round((16 / 32 if arch.family.mrope else 9 / 24) * arch.vision_depth) - 1
        nearest = min(arch.vision_full, key=lambda i: (abs(i - middle), i))
        return {"keep": 1 / 3, "object_layer": nearest + 1}

    def resolve(self, arch: Arch) -> HiPrune:
        method = super().resolve(arch)
        assert isinstance(method, HiPrune) and method.object_layer is not None
        if method.object_layer - 1 not in arch.vision_full or method.object_layer > arch.vision_last + 1:
            layers = ", ".join(str(i + 1) for i in arch.vision_full if i <= arch.vision_last)
            raise VlmFixError(
                f"hiprune: object_layer={method.object_layer} must be a full-attention encoder layer: {layers}."
            )
        return method

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        assert self.object_layer is not None
        return (self.object_layer - 1, arch.vision_last)

    def select(self, image: ImageTokens) -> torch.Tensor:
        height, width = image.grid
        objects, registers = (image.scores[layer] for layer in (min(image.scores), max(image.scores)))
        budget = self.budget(len(objects))
        anchors = ranked(objects)[: round(budget * self.alpha / 5)]
        y, x = anchors // width, anchors % width
        near = [(y, x), (y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
        first = torch.cat(
            [torch.where((v >= 0) & (v < height) & self.inside(u, width), v * width + u, -1) for v, u in near]
        )
        first = first[first < len(objects)]
        chosen = torch.zeros(len(objects), dtype=torch.bool, device=objects.device)
        chosen[first[first >= 0]] = True
        rest = ranked(registers.masked_fill(chosen, -torch.inf))[: max(0, budget - int(chosen.sum()))]
        chosen[rest] = True
        return chosen.nonzero()[:, 0]

    def inside(self, column: torch.Tensor, width: int) -> torch.Tensor:
        """True where a neighbour in this column counts."""
        return torch.ones_like(column, dtype=torch.bool) if self.border == "line" else (column >= 0) & (column < width)


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """Indices from the highest score to the lowest; ties go to the lower index."""
    return scores.sort(descending=True, stable=True).indices
