"""Visual top-k: each step looks at the image columns that its heads vote for; nothing is deleted (TokenSelect, DELTA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Layers, Memory, Unchanged, VlmFixError, WeightEdit, param
from vlm_fix.arch import Arch
from vlm_fix.attention.edits import Changes
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.method import parse_layers
from vlm_fix.pruning.kinds import share_of
from vlm_fix.rows import Rows
from vlm_fix.session import VISUAL


@dataclass
class Choice(Memory):
    """Of the running forward: the layer that chose, the chunks of rows that later layers have asked for, and the columns."""

    layer: int = -1
    asking: tuple[int, int] = (-1, 0)  # the layer that asks, and its next chunk
    chunks: dict[int, torch.Tensor] = field(default_factory=dict)  # by number: [B, R, n] booleans


@dataclass(frozen=True)
class VisualTopK(WeightEdit):
    """On rows that predict a token, hides all image columns but the k that the heads vote for.

    With A the causal softmax weights [H, K] of a row and V its image columns: vote_j = sum_h A_hj / sum_{i in V} A_hi, the
    softmax over V; the top k of them stay, in all heads, and each head's weights are A over what is left, scaled to 1. With
    several images V is all of them, k a share of its columns or a count. With k = all, weights are what they were.
    choosers=None: every layer in `layers` chooses for itself (TokenSelect). Otherwise these layers see everything and
    choose, and those behind reuse the last choice (DELTA).

    Source: TokenSelect, arXiv 2411.02886, pzs19/TokenSelect (the soft vote). The reuse is DELTA's, whose text and code were
    not to be had: only that a few layers choose and the following ones reuse the choice. Deviations: both are for long texts
    and choose among all tokens but the first and the newest, here text is never hidden; the prompt itself is read in full
    (TokenSelect chooses in its chunks too), its last row like a step; TokenSelect's reuse of a choice for a like query and
    its max-pooling are left out. The weights are formed and then hidden: it tells what a kernel that skips them would
    answer, and is no faster. Columns of weight 0 have no vote. Ties go to the lower index.
    """

    name: ClassVar[str] = "visual_topk"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.02886"
    may_leave_unchanged: ClassVar[Unchanged] = Unchanged.ANY_ROW
    idle_reason: ClassVar[str] = "its k covers every image column; lower it."

    k: float = param(0.25, "image columns that a step looks at: a count (> 1) or a share", above=0, counts=True)
    choosers: Layers = param(None, "layers that see everything and choose for those behind; None: each for itself")

    def resolve(self, arch: Arch) -> VisualTopK:
        method: Any = super().resolve(arch)
        if self.choosers is None:
            return method
        choosers = parse_layers(self.choosers, arch.depth, f"{self.name}: choosers")
        if not set(choosers) <= set(method.layers):
            raise VlmFixError(f"{self.name}: choosers={self.choosers!r} must be among its layers {method.layers}.")
        return method.but(choosers=choosers)

    @property
    def neutral(self) -> bool:
        return self.k == 1

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        chosen = self.chosen(weights, rows)
        if chosen is None:
            return weights
        hidden = rows.visual & ~chosen[:, None]
        left = weights.masked_fill(hidden, 0)
        left = left / left.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
        return torch.where(hidden.any(dim=-1, keepdim=True), left, weights)

    def form_of_scores(self, scores: Callable[[], torch.Tensor], rows: Rows) -> ScoreForm | None:
        """Hidden columns as scores of -inf, which is the same."""
        counts = rows.kept(self.totals)
        if isinstance(self.choosers, tuple) or rows.session.padded or len(set(counts)) > 1:
            return None
        k, total = counts[0]
        if k >= total:
            return ScoreForm()
        seen = torch.where(rows.visual, scores(), -torch.inf).softmax(dim=-1).sum(dim=1, keepdim=True)
        rows.memory(Changes).in_layer[rows.layer] = True
        return ScoreForm(bias=rows.ahead(self.hidden).scatter(-1, seen.topk(k, dim=-1).indices, 0.0))

    def hidden(self, rows: Rows) -> torch.Tensor:
        """[B, 1, 1, K] -inf on image columns, 0 on others."""
        return torch.zeros(rows.visual.shape, device=rows.visual.device).masked_fill(rows.visual, -torch.inf)

    def chosen(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        """[B, R, K] True for the image columns that these rows see; None: all."""
        if not isinstance(self.choosers, tuple):
            return self.vote(weights, rows)
        memory, width = rows.memory(Choice), rows.session.types.shape[1]
        layer, chunk = memory.asking if memory.asking[0] == rows.layer else (rows.layer, 0)
        memory.asking = layer, chunk + 1
        if layer in self.choosers:
            if not chunk:
                memory.layer, memory.chunks = layer, {}
            vote = self.vote(weights, rows)
            memory.chunks[chunk] = torch.nn.functional.pad(vote, (max(0, width - vote.shape[-1]), 0))
            return None
        if layer < min(self.choosers):
            return None
        columns = [rows.columns(row, memory.layer)[:, :, 0] for row in memory.chunks[chunk].unbind(dim=1)]
        return torch.cat(columns, dim=1)

    def totals(self, rows: Rows) -> list[tuple[int, int]]:
        """Of each sample: k as a count, and its image columns."""
        totals = (rows.session.types == VISUAL).sum(dim=1).tolist()
        return [(share_of(self.k, n) if n else 0, n) for n in totals]

    def counts(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] each: k as a count, and whether these are all image columns."""
        found, device = rows.kept(self.totals), rows.visual.device
        return torch.tensor([k for k, _ in found], device=device), torch.tensor(
            [k >= n for k, n in found], device=device
        )

    def vote(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, K] True for the top k."""
        seen = weights * rows.visual
        vote = (seen / seen.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)).sum(dim=1)
        counts, every = rows.kept(self.counts)
        rank = vote.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return ((rank < counts[:, None, None]) & (vote > 0) | every[:, None, None]) & rows.visual[:, 0]
