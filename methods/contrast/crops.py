"""CRoPS, contrast with several hallucinating models (Anand et al., TMLR 2026)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import Negative
from vlm_fix.rows import Rows
from vlm_fix.session import PAD, Session

from .sid import SID, beyond


@dataclass(frozen=True)
class CRoPS(SID):
    """Contrasts with two degraded branches at once: one sees little of the image, the other no image and little of the text.

    Both mask columns in the layers from 2 on, in all by one ranking: by the weights of layer 1, the one before them, mean over
    heads, in the row that predicts the next token t = 1, 2, ...; all rows of the prompt take that of its last row. Branch
    "image" keeps the `keep` least attended image tokens (as SID); branch "text", whose prompt has no image, keeps the n_t least
    attended of all columns, n_t = floor(text_low + text_more (1 - exp(-text_rate t))).
    z = (1 + alpha) [log p + w_t (log p - log p_text)] - alpha log p_image, w_t = exp(decay t) - 1, p log-softmax over the
    tokens that the plausibility cut-off leaves. Where the likeliest of them is >= `gate`, nothing is contrasted.

    Source: arXiv 2601.00659; official code ubamba98/CRoPS-Mitigate-Hallucinations-in-Vision-Language-Models@6a01919 (all
    defaults; it overwrites its option for the image tokens by 25 %, and that for the text by n_t). Deviations: a row of the
    text branch of which no column is left sees itself, where eager attention would spread it over all columns, later ones
    too. Gated rows are left uncut. The official prompt without image is a template without its line for the image; here the
    image tokens are taken out of the prompt. A prompt without image is contrasted with the text branch alone.
    """

    name: ClassVar[str] = "crops"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.00659"
    needs_image: ClassVar[bool] = False  # the text branch shows none
    on_logits: ClassVar[bool] = False
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.5, 2.0)}

    gate: float = param(0.95, "contrast only where the top probability is below this", above=0, high=1, by_name=True)
    alpha: float = param(1.0, "strength of the contrast with the image branch", low=0)
    keep: float = param(0.25, "image tokens that stay: a count (> 1) or a share in (0, 1]", above=0, counts=True)
    decay: float = param(0.01, "growth of the contrast with the text branch, per token", low=0, high=1)
    text_low: int = param(10, "columns that the text branch keeps at first", low=1)
    text_more: float = param(30.0, "columns that it keeps more in the end", low=0)
    text_rate: float = param(0.001, "how fast it gets there, per token", low=0)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.decay == 0

    @property
    def passes(self) -> int:
        return 1 + (self.alpha > 0) + (self.decay > 0)

    def drops(self, session: Session) -> bool:
        return False

    def branches(self, call: Call) -> dict[str, Negative]:
        image = {"image": Negative(call.inputs)} if self.alpha else {}
        return image | ({"text": Negative(call.without_images())} if self.decay else {})

    def hidden(self, scores: torch.Tensor, visual: torch.Tensor, t: int, rows: Rows) -> torch.Tensor:
        session = rows.session
        if session.branch != "text":
            return self.dropped(scores, visual)
        past = max(0, session.types.shape[1] - scores.shape[1])
        at = torch.arange(past, past + scores.shape[1], device=scores.device)
        types = torch.nn.functional.pad(session.types[:, past:], (0, scores.shape[1] + past - session.types.shape[1]))
        seen = (types != PAD).to(scores.device) & (at < session.prompt_len + t + 1)
        kept = math.floor(self.text_low - self.text_more * math.expm1(-self.text_rate * (t + 2)))
        return beyond(scores, seen, kept) | ~seen  # padding is no column that a row still has

    def mask_columns(self, weights_from: Callable[[int], torch.Tensor], rows: Rows) -> torch.Tensor | None:
        masked = super().mask_columns(weights_from, rows)
        if masked is None or rows.session.branch != "text":
            return masked
        own = rows.age[None].to(masked.device)  # [1, R, K]: 0 is a row's own column
        blind = ~((own >= 0) & ~masked).any(dim=-1, keepdim=True)
        return masked & ~(blind & (own == 0))

    def sure(self, l: torch.Tensor) -> torch.Tensor | None:
        return super().sure(plausible(l, l, self.beta))

    def combine_at(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        p, others = plausible(l, l, self.beta).log_softmax(dim=-1), list(negatives)
        z = p
        if self.alpha:
            z = z + self.alpha * (p - others.pop(0))
        if self.decay:
            z = z + (1 + self.alpha) * math.expm1(min(self.decay * (step + 1), 50.0)) * (p - others.pop(0))
        return z.masked_fill(p == -torch.inf, -torch.inf)
