"""SID, self-introspective decoding (Huo et al., ICLR 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from vlm_fix import ColumnMasker, Contrast, Memory, RowScope, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.method import Layers
from vlm_fix.rows import Rows
from vlm_fix.session import Session


@dataclass
class SIDMemory(Memory):
    """masked: generated token, -1 for the prompt -> [B, n] True for the image columns that its ranking masks."""

    masked: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SID(ColumnMasker, Contrast):
    """Contrasts with a branch that, from layer 2 on, sees only the image tokens that matter least.

    s_j = mean_h A[h, t, j] of the layer before the first masked one, t the row that predicts the next token; the `keep`
    image tokens of the prompt with the lowest s stay, no row of the branch sees the other image columns.
    z = (1 + alpha) log p - alpha log p', tokens with p < beta max p cut off.

    Source: arXiv 2408.02032; official code huofushuo/SID@127dd41 (masking variant; alpha .5, beta .1, k = 100 on POPE and
    50 on CHAIR of LLaVA's 576 tokens, here as a share). Like there, each new token ranks the image tokens anew and the
    prompt's rows take the ranking of its last row; refresh=False keeps that one, and the other columns leave the cache.
    Its greedy decoding skips the cut-off, which its sampling applies: beta=0 is that. Several images are ranked together.
    """

    name: ClassVar[str] = "sid"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.02032"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 1.0)}
    row_scope = RowScope.ALL
    tracks_columns: ClassVar[bool] = True

    layers: Layers = param(
        None, "layers that see only the least attended image tokens (2-); the layer before ranks them"
    )
    branch: str = param("negative", "always the second branch", choices=("negative",))
    alpha: float = param(0.5, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    keep: float = param(100 / 576, "image tokens that stay: a count (> 1) or a share in (0, 1]", above=0, counts=True)
    refresh: bool = param(True, "rank the image tokens anew for each token")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(max(2, arch.attention[0] + 1), arch.depth - 1)}-"}

    def resolve(self, arch: Arch) -> SID:
        method = super().resolve(arch)
        assert isinstance(method, SID) and isinstance(method.layers, tuple)
        before = [i for i in arch.attention if i < method.layers[0]]
        if not before:
            raise VlmFixError(
                f"{self.name}: layer {method.layers[0]} has no layer before it to rank the image tokens; begin with "
                f"layers={arch.attention[0] + 1}-."
            )
        return dataclasses.replace(method, layers=(before[-1], *method.layers))

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def fork(self) -> int | None:
        assert isinstance(self.layers, tuple)
        return self.layers[0] + 1

    def mask_columns(self, weights_from: Callable[[int], torch.Tensor], rows: Rows) -> torch.Tensor | None:
        session, masked = rows.session, rows.memory(SIDMemory).masked
        assert isinstance(self.layers, tuple)
        stop = session.start + session.length - session.prompt_len
        start = max(session.start - session.prompt_len, -1)
        if rows.layer == self.layers[0]:
            if self.refresh:  # those of earlier forwards have been used
                for old in [t for t in masked if t < start]:
                    del masked[old]
            new = [t for t in range(start, stop) if t == -1 or self.refresh]
            if new:
                visual = rows.visual[:, 0, 0]
                past = max(0, session.types.shape[1] - visual.shape[1])  # what a sliding window has left behind
                a = weights_from(session.length - (stop - start)).mean(dim=1)
                for i, t in enumerate(new):
                    masked[t] = pad(self.hidden(a[:, i], visual, t, rows), (past, 0))
            return None
        if session is not session.whole and self.drops(session):  # they are gone
            return None
        wanted = list(range(start, stop)) if self.refresh else [-1]
        if len(wanted) > 1:  # all rows of the prompt take its ranking
            wanted = [wanted[0]] * (session.length - len(wanted)) + wanted
        return torch.cat([rows.columns(masked[t], self.layers[0])[:, 0] for t in wanted], dim=1)

    def drops(self, session: Session) -> bool:
        """True if no later token and no later layer looks at the masked columns again."""
        depth = session.call.model.config.get_text_config().num_hidden_layers
        return not self.refresh and len(self.layers or ()) == depth - self.layers[0]  # type: ignore[index]

    def stays(self, session: Session) -> torch.Tensor | None:
        return ~session.memory(self, SIDMemory).masked[-1] if self.drops(session) else None

    def hidden(self, scores: torch.Tensor, visual: torch.Tensor, t: int, rows: Rows) -> torch.Tensor:
        """The columns [B, K] that the row of token t (-1: the prompt's last) masks, by its head means `scores` [B, K]."""
        return self.dropped(scores, visual)

    def dropped(self, scores: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Scores and image columns [B, K] -> [B, K] True for image columns that are masked; ties keep the lower index."""
        count = visual.sum(dim=1, keepdim=True)
        keep = (self.keep * count).round().clamp(min=1) if self.keep <= 1 else count.clamp(max=int(self.keep))
        return beyond(scores, visual, keep)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.inputs

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)


def beyond(scores: torch.Tensor, of: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
    """[B, K] True for the columns `of` but the `keep` lowest-scored; ties keep the lower index."""
    order = scores.masked_fill(~of, torch.inf).argsort(dim=1, stable=True)
    at = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return of & (torch.empty_like(order).scatter_(1, order, at) >= keep)
