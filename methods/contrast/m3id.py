"""M3ID, multi-modal mutual-information decoding (Favero et al., CVPR 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import Contrast, param
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible


@dataclass(frozen=True)
class M3ID(Contrast):
    """Contrasts with the prompt without its image, the more the longer the answer already is.

    z = log p + ((1 - g_t) / g_t) (log p - log p_text), g_t = exp(-decay t), tokens with p < beta max p cut off.

    Source: arXiv 2403.14003 (no official code; the formula and beta .1 are those of the port in AvisC's repository).
    Ports start t at 0 or at 1 for the first new token. Here it is 1: with 0 the first token, and so a yes-or-no answer,
    would never be contrasted. The paper's own gate (contrast only where the model is unsure) is `gate`, off by
    default as in the port.
    """

    name: ClassVar[str] = "m3id"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.14003"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"decay": (0.01, 0.05)}

    decay: float = param(0.02, "how fast reliance on the image is taken to fade, per token", low=0, high=1)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    first: int = param(1, "t of the first new token", choices=(0, 1))

    @property
    def neutral(self) -> bool:
        return self.decay == 0

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.without_images()

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor, step: int = 0) -> torch.Tensor:
        weight = math.expm1(min(self.decay * (step + self.first), 50.0))  # (1 - g) / g, kept finite
        return plausible((1 + weight) * l - weight * l_neg, l, self.beta)

    def combine_at(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        return self.combine(l, negatives[0], step)
