"""VScan: global and local scans of the vision encoder, then the language model's own choice (Zhang et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.pruning.kinds import LayerPruner, Tokens, compact_unless_mrope, share_of
from vlm_fix.pruning.merge import TokenMerger, nearest


@dataclass(frozen=True)
class VScan(TokenMerger, LayerPruner):
    """Keeps what the encoder's class token looks at, early on in every part of the image, late anywhere; merges.

    With a_l the class token's attention in encoder layer l (mean over heads) and budget T per image: local = in each of
    `windows` x `windows` parts of the grid the top floor(T / 2 / windows^2) of a at `local_layer`; global = top of a at
    the deepest layer that reaches the projector among the others, for the rest of T. Each dropped token goes to the
    kept one with the highest cosine of projected features z; one that n went to becomes (z + sum of theirs) / (1 + n).

    Stage 2: before language-model layer `llm_layer`, of these the top `llm_keep` of that layer's attention from the last
    prompt token (head mean, rotated queries and keys) stay, without merging.

    Source: arXiv 2505.22654; official code Tencent/SelfEvolvingAgent (LLaVA layer 6 of 24, 16 windows of 6 x 6 patches,
    a third of the tokens from language-model layer 16 of 32 on; Qwen2.5-VL layer 8 of 32, then 14 of 28). Layers scale
    with depth. Towers without a class token (Qwen-VL): attention received, mean over heads and queries. Ambiguity:
    Qwen's "4 x 4 windows" are read as four parts a side, as in LLaVA. Where half of the budget is no multiple of windows^2
    (the papers' are), each part gets the whole number below and the global scan the rest: there the official code keeps others.
    """

    name: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"

    local_layer: int | None = param(None, "encoder layer of the local scan, counted from 1", low=1)
    windows: int = param(4, "parts of the grid along each side", low=1)
    llm_keep: float = param(
        1 / 3, "of these, tokens kept by the second stage: a count (> 1) or a share; 1 = off", above=0, counts=True
    )
    llm_layer: int | None = param(None, "language-model layer before which the second stage drops tokens", low=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        early = round(arch.vision_depth / 4) - 1
        local = min(arch.vision_full, key=lambda i: (abs(i - early), i)) + 1
        half = max(1, round(arch.depth / 2))
        return {"keep": 1 / 3, "local_layer": local, "llm_layer": half, **compact_unless_mrope(arch)}

    def resolve(self, arch: Arch) -> VScan:
        method = super().resolve(arch)
        assert isinstance(method, VScan) and method.local_layer is not None
        fitting = [i + 1 for i in arch.vision_full if i <= arch.vision_last]
        if method.local_layer not in fitting:
            raise VlmFixError(
                f"vscan: local_layer={method.local_layer} must be a full-attention encoder layer: "
                f"{', '.join(map(str, fitting))}."
            )
        return method

    @property
    def neutral(self) -> bool:
        return self.keep == 1 and self.llm_keep == 1

    @property
    def stages(self) -> tuple[int, ...]:
        assert self.llm_layer is not None
        return (self.llm_layer,)

    def quota(self, stage: int, count: int) -> int:
        return share_of(self.llm_keep, count)

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention(own=True)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        assert self.local_layer is not None
        return tuple({self.local_layer - 1, arch.vision_last})

    def reduce(self, image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
        assert image.features is not None
        (height, width), z = image.grid, image.features
        local, deep = image.first[min(image.first)], image.first[max(image.first)]
        budget, index = self.budget(len(local)), torch.arange(len(local), device=local.device)
        window = index // width * self.windows // height * self.windows + index % width * self.windows // width
        chosen = torch.zeros_like(local, dtype=torch.bool)
        for w in range(self.windows**2):
            inside = index[window == w]
            order = local[inside].sort(descending=True, stable=True).indices
            chosen[inside[order[: budget // 2 // self.windows**2]]] = True
        rest = deep.masked_fill(chosen, -torch.inf).sort(descending=True, stable=True).indices
        chosen[rest[: budget - int(chosen.sum())]] = True
        chosen = chosen.to(z.device)
        kept, dropped = z[chosen].float(), z[~chosen].float()
        home = nearest(dropped, kept)
        count = torch.bincount(home, minlength=len(kept))[:, None]
        return chosen.nonzero()[:, 0], kept.index_add(0, home, dropped) / (1 + count)
