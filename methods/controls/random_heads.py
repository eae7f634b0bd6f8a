"""Random heads: VHR's reinforcement on heads drawn by lot. A control."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import HeadEdit, RowScope, param
from vlm_fix.arch import Arch
from vlm_fix.rows import Rows


@dataclass(frozen=True)
class RandomHeads(HeadEdit):
    """Control: scales as many heads as VHR does, in the same layers and rows, but drawn at random.

    Every layer: A_i <- alpha A_i for floor(H / 2) of its H heads (VHR takes those above the median of H values), drawn
    once from `seed` and the layer. What VHR gains beyond this is due to its choice of heads.

    Source: a control for arXiv 2412.13949, with its defaults; the choice is the same in every call, for every prompt.
    """

    name: ClassVar[str] = "random_heads"
    kind: ClassVar[str] = "control"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"

    alpha: float = param(2.0, "factor on the outputs of the chosen heads", low=0)
    prompt_rows: str = param("last", "prompt rows that are rescaled in the first pass", choices=("last", "all"))
    seed: int = param(0, "seed of the choice", low=0, high=2**32 - 1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        tail = max(1, round(14 / 32 * arch.depth))
        return {"layers": f"{min(1, arch.depth - 1)}|{arch.depth - tail}-"}

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.alpha == 1

    def edit_heads(self, outputs: torch.Tensor, rows: Rows) -> torch.Tensor:
        return outputs * rows.kept(self.factors).to(outputs.dtype)

    def factors(self, rows: Rows) -> torch.Tensor:
        """[H, 1, 1]"""
        count = rows.session.call.model.config.get_text_config().num_attention_heads
        factors = [self.alpha if i in chosen(self.seed, rows.layer, count) else 1.0 for i in range(count)]
        return torch.tensor(factors, device=rows.visual.device)[:, None, None]


@functools.lru_cache(maxsize=1024)
def chosen(seed: int, layer: int, heads: int) -> frozenset[int]:
    """Half of the layer's heads."""
    return frozenset(random.Random(f"{seed},{layer}").sample(range(heads), heads // 2))
