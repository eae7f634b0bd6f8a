"""SCOPE: saliency times what a token adds to the coverage of all others (Deng et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.diversity import cosines, cover
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class Scope(TokenPruner):
    """Keeps, one after the other, the token that is looked at and covers what the kept ones do not yet.

    With x_i the features before the projector [N, Cv], S_ij = cos(x_i, x_j) and a_j the class token's attention (mean over
    heads, deepest layer that reaches the projector): the next token is
        argmax_j a_j^alpha sum_i max(0, S_ij - max_{k kept} S_ik),   the inner maximum 0 as long as nothing is kept, never less.

    Source: arXiv 2510.24214; official code kinredon/SCOPE@6bf7306 (alpha 1, the product; 192, 128, 64 of 576 tokens).
    Its attention is the heads' sum, which changes nothing. Its other mode, a sum of both, is left out. Deviations: cosines
    in float32; tokens stay in reading order. Towers without a class token (Qwen-VL): attention received; x_i is a merge
    unit's four patches together. Ties go to the lower index.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"

    alpha: float = param(1.0, "power of the attention; 0: coverage alone", low=0)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.raw is not None
        (attention,) = image.first.values()
        likeness = cosines(image.raw())
        return cover(likeness, self.budget(len(likeness)), attention.float().to(likeness.device) ** self.alpha)
