"""CDPruner: a determinantal point process over image tokens, conditioned on the question (Zhang et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import TokenPruner, param
from vlm_fix.pruning.diversity import cosines, determinant
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class CDPruner(TokenPruner):
    """Keeps the T tokens of greedily largest determinant: unlike each other, and like the question.

    With z_i the projected tokens [N, C] and e_m the language model's embeddings of the text after the last image [M, C]:
        s_i = mean_m cos(z_i, e_m),   r_i = (s_i - min s + 1e-6) / (max s - min s),   L_ij = r_i cos(z_i, z_j) r_j,
    and argmax_S det(L_S) by Chen et al.'s greedy search, in S one token after the other.
    With `theta`, r_i becomes exp(theta r_i / (2 (1 - theta))); theta = 0 forgets the question.

    Source: arXiv 2506.10967; official code Theia-4869/CDPruner@9541616 (192, 128, 64 of 576 tokens; theta stands there in
    a comment). Deviations: the official LLaVA code takes s from CLIP's text tower and visual projection, which a LLaVA
    checkpoint does not hold, and with a minus, since CLIP's patches are less like what they show; here s comes from the
    language model's embeddings, with a plus (`inverse` restores the minus). min and max are an image's, not a batch's.
    Without such text, or if all s are equal, r = 1. Gains under a millionth of the first count as none (then r decides),
    where the official code goes on with roots of rounding noise.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"

    theta: float | None = param(None, "weight of the question against diversity; None: r as it is", low=0, high=0.99)
    inverse: bool = param(False, "rate tokens higher the less they are like the question, as CLIP's patches are")

    @property
    def asks(self) -> bool:
        return self.theta != 0

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.features is not None
        r = self.relevance(image)
        return determinant(cosines(image.features) * r[:, None] * r, self.budget(len(r)))

    def relevance(self, image: ImageTokens) -> torch.Tensor:
        """r [N], float32."""
        assert image.features is not None
        z = normalize(image.features.float(), dim=-1)
        if not self.asks or image.question is None or not len(image.question):
            return torch.ones_like(z[:, 0])
        s = z @ normalize(image.question.float(), dim=-1).mean(dim=0).to(z.device)
        s = -s if self.inverse else s
        span = s.max() - s.min()
        r = (s - s.min() + 1e-6) / span if span > 0 else torch.ones_like(s)
        return r if self.theta is None else (self.theta / (2 * (1 - self.theta)) * r).exp()
