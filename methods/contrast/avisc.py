"""AvisC, attentional vision calibration (Woo et al., Findings of ACL 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import Contrast, param
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import Negative

from .iava import attention_to_images, looking


@dataclass(frozen=True)
class AvisC(Contrast):
    """Contrasts with the image tokens that draw attention in any case, the "blind" ones.

    a_j: weight of image token j of n in the row that predicts the first new token, mean over heads and over the fewest
    layers that hold `coverage` of the image attention. Blind are tokens with a_j >= mean a + lam std a (over n - 1). The
    second branch sees only their embeddings, the other image tokens' are 0. z = (1 + alpha) log p - alpha log p', tokens
    with p < beta max p cut off.

    Source: arXiv 2405.17820; official code sangminwoo/AvisC@772eba4 (coverage .5, lam 1, alpha 1 on POPE and 2.5 on AMBER,
    beta .1, embeddings set to 0). Deviations: the paper speaks of choosing the tokens for every new token, its code chooses
    them once, at the first, and so does this. Several images of a prompt are judged together; the official code has one. Of
    its other fillings, ones and noise, neither is offered.
    """

    name: ClassVar[str] = "avisc"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.17820"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.5, 2.0)}

    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    coverage: float = param(0.5, "share of the image attention that the layers used hold", low=0, high=1)
    lam: float = param(1.0, "standard deviations above the mean from which a token is blind")

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def branches(self, call: Call) -> dict[str, Negative]:
        kept = torch.cat([self.blind(weights) for weights in attention_to_images(call, call.inputs, self.name)])
        return {"negative": Negative(call.inputs, lambda x: x * kept[:, None].to(x))}

    def blind(self, weights: torch.Tensor) -> torch.Tensor:
        """Head means [layers, n] of one prompt's n image tokens -> [n] True for blind ones."""
        if not weights.shape[1]:
            return weights[0].bool()
        a = weights[looking(weights, self.coverage)].mean(dim=0)
        return a >= a.mean() + self.lam * a.std(correction=min(1, len(a) - 1))

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)
