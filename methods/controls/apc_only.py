"""Adaptive plausibility alone: the cut-off of contrastive decoding without any contrast. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step


@dataclass(frozen=True)
class APCOnly(LogitEdit):
    """Control: only cuts off tokens with p < beta max p, as contrastive methods do beside their contrast.

    The cut-off turns sampling near-greedy, which explains part of the gains reported for sampling. Greedy decoding is
    unchanged. Compare a contrast method with this at the same beta.

    Source: the cut-off is that of arXiv 2210.15097 (Li et al., ACL 2023); as a control, ustc-hyin/cd_rethink.
    """

    name: ClassVar[str] = "apc_only"
    kind: ClassVar[str] = "control"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.15097"
    on_logits: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)

    @property
    def neutral(self) -> bool:
        return self.beta == 0

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        return plausible(l, l, self.beta)
