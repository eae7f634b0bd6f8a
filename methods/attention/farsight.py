"""FarSight, attention registers in the causal mask's upper triangle (Tang et al., CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlm_fix import Memory, RowScope, TotalReader, WeightEdit, param
from vlm_fix.rows import Rows


@dataclass
class Totals(Memory):
    """layer -> log sum exp of its rows' scores [B, H, R, 1], between the two stages of a layer."""

    of: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FarSight(TotalReader, WeightEdit):
    """Lets registers take a part of each row's attention: columns without a value, where the causal mask hides what follows.

    Row i of a prompt of n tokens has the m = n - 1 - i registers that follow it, of scores -sigma d at distance d = 1..m. With
    z_ij its scores of the columns j <= i: a_ij = exp z_ij / (sum_j exp z_ij + sum_d exp(-sigma d)). Rows sum to less than 1,
    the earlier the less; the prompt's last row and decode rows have no register, and look at what the others became.
    registers=m: every row has m of them, decode rows too.

    Source: arXiv 2505.16652; W = softmax(omega C + P) C, P_ij = -(j - i) sigma, as two readers of the paper write it down; its
    repository was not to be had. Neither was sigma: the default is a choice made here, and so is how it may differ between
    heads (slopes=alibi: sigma 2^(-8 (h + 1) / H), h from 0; one reader speaks of slopes like ALiBi's), and what the paper's
    sequence length of 256 tokens sets (registers=256 may be it). The paper's n is that of the sequence so far; here the
    prompt's rows keep the prompt's, as their keys and values stay in the cache. A norm behind attention (Gemma's) undoes
    what all heads lose alike.
    """

    name: ClassVar[str] = "farsight"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.16652"
    needs_image: ClassVar[bool] = False
    row_scope = RowScope.ALL
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"sigma": (0.03, 0.3, 1.0)}

    sigma: float = param(
        0.1, "decay of the registers' scores with their distance; the larger, the less they take", low=0
    )
    registers: int | None = param(
        None, "registers of every row; None: as many as tokens of the prompt follow it", low=0
    )
    slopes: str = param("one", "decay of the heads: one for all, or as ALiBi has it", choices=("one", "alibi"))

    @property
    def neutral(self) -> bool:
        return self.registers == 0

    def read_totals(self, totals: torch.Tensor, rows: Rows) -> None:
        rows.memory(Totals).of[rows.layer] = totals  # for `edit_weights`, which follows on the same rows

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        total = rows.memory(Totals).of.pop(rows.layer)
        count = rows.session.prompt_len - 1 - rows.positions.to(total.device)
        count = count.clamp(min=0) if self.registers is None else torch.full_like(count, self.registers)
        heads = torch.arange(total.shape[1], device=total.device)
        decay = self.sigma * (2.0 ** (-8.0 * (heads + 1) / len(heads)) if self.slopes == "alibi" else heads * 0 + 1.0)
        taken = self.taken(count.to(total.dtype), decay.to(total.dtype))  # [H, R]
        new = weights * (total - taken[None, :, :, None]).sigmoid()
        return torch.where((taken > -torch.inf)[None, :, :, None], new, weights)

    @staticmethod
    def taken(count: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """[R] registers, [H] decay -> [H, R] log sum_{d=1..count} exp(-decay d), -inf without registers."""
        count, decay = count[None], decay[:, None].clamp(min=1e-6)
        return torch.log(-torch.expm1(-decay * count)) - torch.log(-torch.expm1(-decay)) - decay
