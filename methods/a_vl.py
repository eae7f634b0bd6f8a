"""A-VL: of the image's keys, many are stored and few are computed (Zhang et al., AAAI 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import param
from vlm_fix.families import Arch
from vlm_fix.pruning.after import share_of
from vlm_fix.pruning.kv import Cached, CachePruner
from vlm_fix.session import TEXT, VISUAL, Session, View


@dataclass(frozen=True)
class AVL(CachePruner):
    """Each layer stores the image keys that the prompt's last token looks at most, and mostly computes the best of them.

    With a_j the head-mean attention of a layer's newest row to image column j: after the prompt the top `keep` of each
    image are stored (the secondary cache), the rest is deleted. Of the stored ones, the top `core` share (the core
    cache) takes part in attention; every `every`-th step all of them do, and the core is picked anew from that row.

    Source: arXiv 2409.14846; the released README's flags (half deleted, 60 % skipped, from layer 3 on); its forward pass
    was not at hand. Ambiguities, hence parameters: whether 60 % is of the stored or of all tokens (here: stored), how
    often the core is refreshed, the layers. Not done: the paper's adaptive text attention. Skipped columns are masked:
    the answer is the method's, but without the paper's CUDA operator no arithmetic is saved, only memory.
    """

    name: ClassVar[str] = "a_vl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.14846"

    core: float = param(0.4, "share of the stored image columns that a step computes", low=0, high=1)
    every: int = param(8, "steps after which all stored columns are computed once and the core is picked anew", low=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(3, arch.depth - 1)}-"}

    @property
    def neutral(self) -> bool:
        return self.keep == 1 and (self.core == 1 or self.every == 1)

    @property
    def wanders(self) -> bool:
        return not (self.core == 1 or self.every == 1)

    def scores(self, cached: Cached) -> torch.Tensor:
        return cached.last_row()[:, None]

    def first_pick(self, cached: Cached, scores: torch.Tensor, view: View) -> None:
        self.choose(cached.session, cached.layer, scores)

    def picked(self, session: Session, layer: int) -> torch.Tensor | None:
        core = session.state(self).get(layer)
        assert session.prompt_len is not None
        if (
            core is None
            or not self.wanders
            or session.length > 1
            or (session.start - session.prompt_len + 1) % self.every == 0
        ):
            return None
        types = session.at(layer).types
        assert types is not None
        core = torch.nn.functional.pad(core, (0, types.shape[1] - core.shape[1]))
        return core | (types.to(core.device) == TEXT)

    def pick(self, session: Session, layer: int, weights: Any) -> None:
        assert session.prompt_len is not None
        if (session.start - session.prompt_len + 1) % self.every == 0:
            self.choose(session, layer, weights())

    def choose(self, session: Session, layer: int, weights: torch.Tensor) -> None:
        """state[layer] = [B, m] the core among the image columns, by `weights` [B, m]; all images together."""
        types = session.at(layer).types
        assert types is not None
        visual = (types == VISUAL).to(weights.device)
        core = torch.zeros_like(visual)
        for row in range(len(visual)):
            columns = visual[row].nonzero()[:, 0]
            order = weights[row, columns].sort(descending=True, stable=True).indices
            core[row, columns[order[: share_of(self.core, len(columns))]]] = True
        session.state(self)[layer] = core
