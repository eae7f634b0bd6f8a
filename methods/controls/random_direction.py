"""Random direction: steering by directions drawn by lot. A control."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import AttentionOutputEdit, LayerOutputEdit, MLPOutputEdit, RowScope, param
from vlm_fix.hidden.push import pushed
from vlm_fix.rows import Rows

PLACES = ("mlp_output", "attention_output", "layer_output")


@dataclass(frozen=True)
class RandomDirection(AttentionOutputEdit, MLPOutputEdit, LayerOutputEdit):
    """Control: turns hidden states towards a direction drawn at random, as far as a steering method turns them.

        x <- ||x|| n(n(x) + strength u_l),  n(x) = x / ||x||,  x [C] what layer l writes at `place`
    u_l [C]: a unit vector, uniform on the sphere, drawn once from `seed` and the layer, the same for every prompt.
    What steering gains beyond this is due to its directions. `vlm-fix eval --controls` runs it at the strength, place,
    rows and layers of each steering method.

    Source: a control for arXiv 2502.03628, with its default strength; none of these papers has one.
    """

    name: ClassVar[str] = "random_direction"
    kind: ClassVar[str] = "control"

    strength: float = param(0.17, "length of the added vector, as a share of the hidden state's", low=0)
    place: str = param("mlp_output", "what is turned", choices=PLACES)
    prompt_rows: str = param(
        "all", "prompt rows that are turned in the first pass", choices=("last", "after_image", "all")
    )
    seed: int = param(0, "seed of the directions", low=0, high=2**32 - 1)

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.strength == 0

    def acts_at(self, place: str) -> bool:
        return place == self.place

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.pushed(x, rows)

    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.pushed(x, rows)

    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return self.pushed(x, rows)

    def pushed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, turned."""
        return pushed(x, drawn(self.seed, rows.layer, x.shape[-1], x.device), self.strength)


@functools.lru_cache(maxsize=1024)
def drawn(seed: int, layer: int, channels: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A unit vector [C]."""
    u = torch.randn(channels, generator=torch.Generator().manual_seed(seed * 100_003 + layer))
    return (u / u.norm()).to(device)
