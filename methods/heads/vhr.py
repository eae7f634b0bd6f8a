"""VHR, vision-aware head reinforcement ("Cracking the Code of Hallucination in LVLMs", He et al., ACL 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import HeadEdit, Memory, PromptStart, RowScope, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.recorder import LastHeads
from vlm_fix.rows import Rows
from vlm_fix.session import Session
from vlm_fix.wing import engine_of


@dataclass
class VHRMemory(Memory):
    text_only: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> A_i(text only) [B, H, D]
    factors: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> alpha for H_l, else 1: [B, H, 1, 1]


@dataclass(frozen=True)
class VHR(HeadEdit, PromptStart):
    """Scales up the heads whose output changes most when the image is taken away.

    With A_i the output of head i before o_proj at the prompt's last token:
        VHD_i = ||A_i(image) - A_i(text only)||_2 ;   TA_i = ||A_i(text only)||_2^2
        VHD_i <- 0 where VHD_i > mean + std and TA_i > mean + std (over the layer's heads)
        H_l = {i : VHD_i > median of layer l} ;   every step: A_i <- alpha A_i for i in H_l
    Layers are visited in order, so A_i(image) is measured with the layers below already reinforced. The text-only pass
    runs once per call, without edits; the heads are frozen after the prompt.

    Source: arXiv 2412.13949 (no official code). Defaults: layer 1 and the last 14 of 32, scaled to the model's depth.
    The paper leaves open whether prompt rows before the last are rescaled: `prompt_rows` (its cache argument implies "all").
    mean and std are the population's.
    """

    name: ClassVar[str] = "vhr"
    kind: ClassVar[str] = "heads"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (1.5, 3.0)}

    alpha: float = param(2.0, "factor on the outputs of the chosen heads (4 breaks the text)", low=0)
    prompt_rows: str = param("last", "prompt rows that are rescaled in the first pass", choices=("last", "all"))

    def defaults(self, arch: Arch) -> dict[str, Any]:
        tail = max(1, round(14 / 32 * arch.depth))
        return {"layers": f"{min(1, arch.depth - 1)}|{arch.depth - tail}-"}

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.alpha == 1

    @property
    def whole_prompt(self) -> bool:
        return self.prompt_rows == "all"

    def on_prompt(self, session: Session, call: Call) -> None:
        """Run the text-only pass."""
        engine = engine_of(call.model)
        times = session.types.shape[0] // call.batch  # beams repeat each prompt
        text_only = session.memory(self, VHRMemory).text_only

        def keep(layer: int, outputs: torch.Tensor) -> None:
            text_only[layer] = outputs.repeat_interleave(times, dim=0)

        assert isinstance(self.layers, tuple)
        engine.run_prompt(call.without_images(), LastHeads(keep, last=max(self.layers)), later=True)

    def choose(self, with_image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Head outputs [B, H, D] with the image and without -> chosen heads [B, H]."""
        divergence = (with_image - text).norm(dim=-1)
        activity = text.square().sum(dim=-1)

        def outlying(x: torch.Tensor) -> torch.Tensor:
            return x > x.mean(dim=1, keepdim=True) + x.std(dim=1, correction=0, keepdim=True)

        divergence = divergence.masked_fill(outlying(divergence) & outlying(activity), 0)
        return divergence > divergence.quantile(0.5, dim=1, keepdim=True)

    def edit_heads(self, outputs: torch.Tensor, rows: Rows) -> torch.Tensor:
        memory, session = rows.memory(VHRMemory), rows.session
        if rows.prefill:
            session.need_whole_prompt(f"{self.name}:prompt_rows={self.prompt_rows}")
            last = session.prompt_len - 1 - (session.start + session.length)  # assisted decoding adds guesses behind it
            text_only = memory.text_only[rows.layer].to(outputs.device)
            chosen = self.choose(outputs[:, :, last].float(), text_only)
            memory.factors[rows.layer] = (1 + (self.alpha - 1) * chosen.to(outputs.dtype))[:, :, None, None]
        return outputs * memory.factors[rows.layer].to(outputs.device)
