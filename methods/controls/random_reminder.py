"""Random reminder: RUDDER with a direction drawn by lot. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param

from ..hidden.rudder import RUDDER
from .random_direction import drawn


@dataclass(frozen=True)
class RandomReminder(RUDDER):
    """Control: adds to attention outputs what RUDDER adds, at the same length, in a direction drawn at random.

        h + A <- h + A + alpha ||h|| g u_l,  with RUDDER's own h, A [C], g and rows: g is of its v, which is pooled as there
    u_l [C]: a unit vector, uniform on the sphere, drawn once from `seed` and the layer, the same for every prompt. What RUDDER
    gains beyond this is due to its direction. `vlm-fix eval --controls` runs it at the settings of each RUDDER.

    Source: a control for arXiv 2511.10292, with its defaults; the paper has none.
    """

    name: ClassVar[str] = "random_reminder"
    kind: ClassVar[str] = "control"
    paper: ClassVar[str] = ""
    grid: ClassVar[dict[str, tuple[float, ...]]] = {}

    seed: int = param(0, "seed of the directions", low=0, high=2**32 - 1)

    @property
    def control(self) -> str:
        return ""

    def reminded(self, x: torch.Tensor, h: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        length = (super().reminded(x, h, v, layer) - x).norm(dim=-1, keepdim=True)
        return x + length * drawn(self.seed, layer, x.shape[-1], x.device)
