"""SPIN, image-guided head suppression (Sarkar et al., 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import HeadEdit, Memory, ScoreEdit, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.rows import Rows


@dataclass
class SPINMemory(Memory):
    """factors: layer -> the factors [B, H, R, 1] of its heads, in chunks of rows; between its two stages only."""

    factors: dict[int, list[torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class SPIN(ScoreEdit, HeadEdit):
    """Turns down the heads that look at the image least, anew at each step.

    With s_h = sum z[h, V] over raw scores: on the last prompt row and decode rows, the int(keep H) heads with the
    largest s_h stay as they are, the output of every other head is multiplied by epsilon.

    Source: arXiv 2505.16411; official code YUECHE77/SPIN@a6ddf4a (its softmax over s_h / std keeps the order, so it is
    left out). Values differ by task: for LLaVA-1.5, all layers, keep .95 and epsilon .08 in captions (the default) and
    .8 and .1 in POPE; for Qwen-VL-Chat layers 0-19 of 32, .7 and .08 (taken for Qwen2.5-VL, layers scaled).
    """

    name: ClassVar[str] = "spin"
    kind: ClassVar[str] = "heads"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.16411"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"epsilon": (0.3, 0.6)}

    keep: float | None = param(None, "share of the heads that stay as they are", low=0, high=1)
    epsilon: float = param(0.08, "factor on the outputs of the other heads", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        if arch.family.mrope:
            return {"keep": 0.7, "layers": f"0-{min(round(19 / 32 * arch.depth), arch.depth - 1)}"}
        return {"keep": 0.95}

    @property
    def neutral(self) -> bool:
        return self.keep == 1 or self.epsilon == 1

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Choose the heads; the scores stay as they are."""
        assert self.keep is not None
        z = scores
        kept = (z * rows.visual).sum(dim=-1, keepdim=True).topk(max(1, int(self.keep * z.shape[1])), dim=1).indices
        factor = rows.kept(self.turned_down) if z.shape[2] == 1 else self.turned_down(rows)
        chunks = rows.memory(SPINMemory).factors.setdefault(rows.layer, [])
        chunks.append(factor.expand(*z.shape[:3], 1).scatter(1, kept, 1.0))
        return scores

    def turned_down(self, rows: Rows) -> torch.Tensor:
        """[1, 1, 1, 1] the factor of a head that is not kept."""
        return torch.full((1, 1, 1, 1), self.epsilon, device=rows.visual.device)

    def form_of_scores(self, scores: Callable[[], torch.Tensor], rows: Rows) -> ScoreForm:
        self.edit_scores(scores(), rows)
        return ScoreForm()

    def edit_heads(self, outputs: torch.Tensor, rows: Rows) -> torch.Tensor:
        chunks = rows.memory(SPINMemory).factors.pop(rows.layer)
        factors = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
        return outputs * factors.to(outputs.dtype)
