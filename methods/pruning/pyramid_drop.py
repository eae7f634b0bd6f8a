"""PyramidDrop: image tokens are dropped in stages, fewer and fewer with depth (Xing et al., CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix.arch import Arch
from vlm_fix.pruning.kinds import StagedPruner, Tokens, schedule


@dataclass(frozen=True)
class PyramidDrop(StagedPruner):
    """At the input of each layer in `layers`, keeps the image tokens that this layer's last prompt row looks at most.

    s_j = mean_h softmax(q_h k_h^T / sqrt(d))[last, j] with the queries and keys of the layer about to run [N]; the top
    floor(r_t N0) of what is left stay, per image, N0 the image's tokens at the start.

    Source: arXiv 2410.17247; official code Cooperx521/PyramidDrop@6444f30 (before layers 8, 16, 24 of 32, r = .5, .25,
    .125), re-numbering positions. Layers scale with the model's depth, which the code's do not:
    layers=8|16|24 are its on 40 layers too. With M-RoPE, which the code does not know,
    positions stay. Ties go to the lower index.
    """

    name: ClassVar[str] = "pyramid_drop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    shares: ClassVar[tuple[float, ...]] = (0.5, 0.25, 0.125)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return schedule(self, arch, {max(1, round(arch.depth * i / 4)) for i in (1, 2, 3)})

    def quota(self, stage: int, count: int) -> int:
        assert self.keep is not None
        keep = self.keep[stage]
        return max(1, int(keep * count) if keep <= 1 else min(count, int(keep)))

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention(own=True)
