"""DeCo, dynamic correction decoding (Wang et al., ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Layers, param
from vlm_fix.arch import Arch
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step


@dataclass(frozen=True)
class DeCo(LogitEdit):
    """Corrects the next token with an earlier layer that is sure of one of the likely tokens.

    C = the fewest of the top_k tokens whose probabilities reach top_p; over the layers and C, the largest probability
    p_max is found in layer m (final norm and language head applied);
    z = logits + alpha p_max logits_m on C, all other tokens cut off.

    Source: arXiv 2410.11779; official code zjunlp/DeCo (alpha .6, top_k 20, top_p .9, entries 20-28 of hidden_states
    for 32 layers, scaled here to the model's depth; entry i is the input of layer i).
    Deviations: the official code takes one prompt at a time; here each row of a batch chooses for itself. alpha = 0
    turns the candidate cut-off off too.
    """

    name: ClassVar[str] = "deco"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.11779"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.2, 0.4)}

    alpha: float = param(0.6, "strength of the correction", low=0)
    top_k: int = param(20, "most candidates", low=1)
    top_p: float = param(0.9, "probability that the candidates reach", low=0, high=1)
    layers: Layers = param(None, "layers whose input is read")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        first, last = (min(round(i / 32 * arch.depth), arch.depth - 1) for i in (20, 28))
        return {"layers": f"{first}-{last}"}

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(self.layers or ())  # type: ignore[arg-type]

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        return self.corrected(l, torch.stack([step.exit(i, norm=True).to(l.device) for i in self.exits]))

    def corrected(self, l: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] and those of the layers [N, B, V] -> scores [B, V]."""
        top, tokens = l.softmax(dim=-1).topk(min(self.top_k, l.shape[1]), dim=-1)
        inside = top.cumsum(dim=-1) - top < self.top_p
        inside[:, 0] = True
        candidate = torch.zeros_like(l, dtype=torch.bool).scatter(1, tokens, inside)
        best = early.softmax(dim=-1).masked_fill(~candidate, 0).amax(dim=-1)  # [N, B]
        p_max, layer = best.max(dim=0)
        chosen = early[layer, torch.arange(len(l), device=l.device)]
        return (l + self.alpha * p_max[:, None] * chosen).masked_fill(~candidate, -torch.inf)
