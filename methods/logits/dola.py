"""DoLa, decoding by contrasting layers (Chuang et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Layers, param
from vlm_fix.arch import Arch
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step


@dataclass(frozen=True)
class DoLa(LogitEdit):
    """Contrasts the last layer with the early layer that differs most from it.

    m = argmax over the layers of JS(p, p_m); z = log p - alpha log p_m, tokens with p < beta max p cut off.

    Source: arXiv 2309.03883; official code voidism/DoLa (relative top .1; entries 0, 2, ..., 14 of hidden_states for 32
    layers, scaled here to the lower half of the model; entry i is the input of layer i). As there, the early exit skips
    the final norm, and the divergence is .5 KL(M || p) + .5 KL(M || p_m) with M their mean: the paper's Jensen-Shannon
    divergence has the arguments of KL the other way round.
    Deviations: alpha is ours (1 in the paper, 0 is the plain model); the official code averages the divergence over a
    batch, here each row chooses for itself; no repetition penalty is set. Entry 0 is the embedding of the last token:
    with tied embeddings start at layer 2.
    """

    name: ClassVar[str] = "dola"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.03883"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    layers: Layers = param(None, "layers whose input is read")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": tuple(range(0, max(1, arch.depth // 2), 2))}

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(self.layers or ())  # type: ignore[arg-type]

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        early = torch.stack([step.exit(i, norm=False).to(l.device) for i in self.exits])
        return self.contrasted(l, early.log_softmax(dim=-1))

    def contrasted(self, l: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, V] of the last layer and [N, B, V] of the early ones -> scores [B, V]."""
        log_mean = torch.logaddexp(l, early) - torch.log(torch.tensor(2.0))
        divergence = log_mean.exp() * (log_mean - (l + early) / 2)
        divergence = divergence.masked_fill(torch.isinf(l), 0).sum(dim=-1)  # tokens that generate forbids do not count
        chosen = early[divergence.argmax(dim=0), torch.arange(len(l), device=l.device)]
        return plausible(l - self.alpha * chosen, l, self.beta)
