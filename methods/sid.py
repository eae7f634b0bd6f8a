"""SID, self-introspective decoding (Huo et al., ICLR 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import AttentionEdit, Contrast, VlmFixError, param
from vlm_fix.decoding.contrast import plausible
from vlm_fix.families import Arch
from vlm_fix.method import Layers
from vlm_fix.session import Call, Rows, pad_to


@dataclass(frozen=True)
class SID(AttentionEdit, Contrast):
    """Contrasts with a branch that, from layer 2 on, sees only the image tokens that matter least.

    s_j = mean_h A[h, t, j] of the layer before the first masked one, t the row that predicts the next token; the `keep`
    image tokens of the prompt with the lowest s stay, the other image columns get -inf in all rows of the branch.
    z = (1 + alpha) log p - alpha log p', tokens with p < beta max p cut off.

    Source: arXiv 2408.02032; official code huofushuo/SID@127dd41 (masking variant; alpha .5, beta .1, k = 100 on POPE and
    50 on CHAIR of LLaVA's 576 tokens, here as a share). Like there, each new token ranks the image tokens anew and the
    prompt's rows take the ranking of its last row; refresh=False keeps that one. Several images are ranked together.
    """

    name: ClassVar[str] = "sid"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.02032"

    layers: Layers = param(
        None, "layers that see only the least attended image tokens (2-); the layer before ranks them"
    )
    branch: str = param("negative", "always the second branch", choices=("negative",))
    alpha: float = param(0.5, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    keep: float = param(100 / 576, "image tokens that stay: a count (> 1) or a share in (0, 1]", low=0)
    refresh: bool = param(True, "rank the image tokens anew for each token")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(2, arch.depth - 1)}-"}

    def resolve(self, arch: Arch) -> SID:
        method = super().resolve(arch)
        assert isinstance(method, SID) and isinstance(method.layers, tuple)
        if method.layers[0] == 0:
            raise VlmFixError("sid: layer 0 has no layer before it to rank the image tokens; begin with layers=1-.")
        return dataclasses.replace(method, layers=(method.layers[0] - 1, *method.layers))

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def rows(self) -> str:
        return "all"

    def weights(self, a: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert isinstance(self.layers, tuple) and rows.session.prompt_len is not None
        if rows.layer == self.layers[0]:
            last = rows.session.prompt_len - 1
            if self.refresh:  # rankings of earlier forwards have been used
                for old in [p for p in rows.state if p < rows.session.start]:
                    del rows.state[old]
            for i, p in enumerate(rows.positions.tolist()):
                if p == last or (p > last and self.refresh):
                    rows.state[p] = self.dropped(a[:, :, i].mean(dim=1), rows.visual[:, 0, 0])
        return a

    def dropped(self, scores: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Scores and image columns [B, K] -> [B, K] True for image columns that are masked; ties keep the lower index."""
        count = visual.sum(dim=1, keepdim=True)
        keep = (self.keep * count).round().clamp(min=1) if self.keep <= 1 else count.clamp(max=int(self.keep))
        order = scores.masked_fill(~visual, torch.inf).argsort(dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return visual & (rank >= keep)

    def logits(self, z: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert isinstance(self.layers, tuple) and rows.session.prompt_len is not None
        if rows.layer == self.layers[0]:
            return z
        last, width = rows.session.prompt_len - 1, z.shape[-1]
        wanted = [max(p, last) if self.refresh else last for p in rows.positions.tolist()]
        masks = [pad_to(rows.state[p].to(z.device), width) for p in (wanted[:1] if len(set(wanted)) == 1 else wanted)]
        return z.masked_fill(torch.stack(masks, dim=1)[:, None], -torch.inf)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.inputs

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)
