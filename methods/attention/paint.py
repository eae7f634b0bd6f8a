"""PAINT, paying attention to informed tokens ("Fixing Imbalanced Attention", Arif et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Memory, ScoreEdit, VlmFixError, WeightEdit, param
from vlm_fix.arch import Arch
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.inputs import InputEdit
from vlm_fix.packing import pad_to
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.rows import Rows
from vlm_fix.session import VISUAL, Session
from vlm_fix.wing import engine_of


@dataclass
class PAINTMemory(Memory):
    strength: torch.Tensor | None = None  # [B, n] alpha on local tokens, beta on summary tokens, 0 elsewhere
    added: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> what its `edit_weights` adds


@dataclass(frozen=True)
class PAINT(ScoreEdit, WeightEdit, InputEdit):
    """Raises the raw scores of the image tokens that the vision encoder's class token looks at, early and late.

    With s_l the class token's attention to the N patches in encoder layer l: summary = patches with
    s_late > Q3 + 1.5 (Q3 - Q1), quartiles over the patches; local = the int(local_share N) largest s_early that are not in
    summary. On the last prompt row and decode rows, before the mask and softmax:
        z[local] <- z[local] + alpha |z[local]|;   z[summary] <- z[summary] + beta |z[summary]|.
    head_scale="sensitive": alpha and beta of head h are multiplied by A_h[V].sum / max_h' A_h'[V].sum of that row.

    Source: arXiv 2501.12206; official code hasanar1f/PAINT@2a9e8f8 (alpha .7, beta .3, layers 2-31 of LLaVA-1.5; alpha .9
    in its script collapses; encoder layers 0 and -2). The paper's modulation by each head's measured visual sensitivity
    is not in that code: "sensitive" is built from the abstract, with the share of attention on the image as the measure.
    The code's optional guidance is `pai:alpha=0,gamma=1.1`, stacked. Encoders without a class token: attention received,
    mean over heads and queries. Encoders with windows: the full-attention layers nearest to those two.
    """

    name: ClassVar[str] = "paint"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.12206"
    tracks_columns: ClassVar[bool] = True
    form_holds: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.35,)}

    alpha: float = param(0.7, "share of |z| added to the scores of local tokens", low=0)
    beta: float = param(0.3, "share of |z| added to the scores of summary tokens", low=0)
    local_share: float = param(0.25, "share of an image's tokens that are local", low=0, high=1)
    local_layer: int | None = param(None, "encoder layer of the local tokens, counted from 0", low=0)
    summary_layer: int | None = param(None, "encoder layer of the summary tokens, counted from 0", low=0)
    head_scale: str = param("all", "which heads get the full strength", choices=("all", "sensitive"))

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {
            "layers": f"{min(2, arch.depth - 1)}-",
            "local_layer": min(arch.vision_full),
            "summary_layer": max((i for i in arch.vision_full if i <= arch.vision_last), default=arch.vision_last),
        }

    def resolve(self, arch: Arch) -> PAINT:
        if arch.family.encoder is None or arch.family.cells == "anyres":
            raise VlmFixError(
                f"paint reads vision encoders that show an image as one grid of tokens, and cannot in {arch.family.name}; use "
                "it with llava or qwen2_5_vl."
            )
        method = super().resolve(arch)
        assert isinstance(method, PAINT)
        for name in ("local_layer", "summary_layer"):
            if getattr(method, name) not in arch.vision_full:
                names = ", ".join(map(str, arch.vision_full))
                raise VlmFixError(f"paint: {name}={getattr(method, name)} must be a full-attention layer: {names}.")
        return method

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        assert self.local_layer is not None and self.summary_layer is not None
        return (self.local_layer, self.summary_layer)

    @property
    def previews(self) -> bool:
        return False

    def strengths(self, image: ImageTokens) -> torch.Tensor:
        """[N]: alpha on the local tokens of an image, beta on its summary tokens, 0 elsewhere."""
        early, late = (image.first[layer].float() for layer in (self.local_layer, self.summary_layer))  # type: ignore[index]
        low, high = late.quantile(torch.tensor([0.25, 0.75], device=late.device))
        result = torch.zeros_like(early)
        result[early.sort(descending=True, stable=True).indices[: int(self.local_share * len(early))]] = self.alpha
        return result.masked_fill(late > high + 1.5 * (high - low), self.beta)

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        if session.start < session.prompt_len and bool((session.types[:, session.start :] == VISUAL).any()):
            if "pixel_values_videos" in session.call.inputs:
                raise VlmFixError("paint scores the tokens of images, no video; pass its frames as images, or unwrap.")
            values = [self.strengths(image) for image in session.call.views]
            tokens = engine_of(session.call.model).tokens
            new, memory = (
                session.on_images(torch.cat(values or [torch.zeros(0)]), tokens),
                session.memory(self, PAINTMemory),
            )
            earlier = new if memory.strength is None else memory.strength
            earlier = pad_to(earlier, session.start) if session.start else new[:, :0]
            memory.strength = torch.cat([earlier, new[:, session.start :]], dim=1)
        return kwargs

    def strength(self, rows: Rows) -> torch.Tensor:
        """[B, 1, 1, K]"""
        strength = rows.memory(PAINTMemory).strength
        return rows.visual * 0.0 if strength is None else rows.columns(strength, -1)

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        added = rows.once(self.strength) * scores.abs()
        if self.head_scale == "all":
            return scores + added
        rows.memory(PAINTMemory).added[rows.layer] = added  # for `edit_weights`, which follows on the same rows
        return scores

    def form(self, rows: Rows) -> ScoreForm | None:
        added = rows.once(self.strength)
        return ScoreForm(1 + added, 1 - added)

    @property
    def edits_weights(self) -> bool:
        return self.head_scale == "sensitive"

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        a = weights
        seen = (a * rows.visual).sum(dim=-1, keepdim=True)
        scale = seen / seen.amax(dim=1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
        return (a.log() + scale * rows.memory(PAINTMemory).added.pop(rows.layer)).softmax(dim=-1).nan_to_num(0.0)
