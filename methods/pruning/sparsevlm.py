"""SparseVLM: text tokens that match the image rate its tokens; what is dropped is summed up (Zhang et al., ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import param
from vlm_fix.arch import Arch
from vlm_fix.memory import Memory
from vlm_fix.pruning.columns import ImageColumns
from vlm_fix.pruning.diversity import peaks
from vlm_fix.pruning.kinds import StagedPruner, Tokens, schedule, share_of
from vlm_fix.pruning.merge import means


@dataclass
class Raters(Memory):
    rows: torch.Tensor | None = None  # bool [B, n]


@dataclass(frozen=True)
class SparseVLM(StagedPruner):
    """After each layer in `layers`, keeps the image tokens that the rater tokens of the question look at most.

    Raters, once: of the text after the image, embeddings H_t [M, C], with the image's H_v [N, C], those with
    m > mean(m), m = mean_v softmax_t(H_v H_t^T). Score of image token j: mean over raters and heads of the layer's
    attention A[rater, j]. Of the dropped tokens the floor(`recycled` n) + 1 best are clustered (density peaks) into
    floor(. / 10) + 1 clusters; each cluster's mean hidden state goes on at its centre's place.
    With `rank` > 0, a stage drops lambda (N - rank(P)) tokens instead, P [raters, N] the attention: `keep` is unused.

    Source: arXiv 2410.04417; official code Gumpest/SparseVLMs@26a5f48, v1.0 (after layers 2, 6, 15 of 32: 300, 200, 110
    of 576 tokens, called "192"; the paper's adaptive rank is not in it), re-numbering positions. Its layers do not scale
    with the depth as these do: layers=2|6|15 are its on 40 layers too. Deviations: clusters stay at their centre's place
    instead of behind the kept tokens; ties of density go to the lower index instead of a random one; no rater (equal m):
    the last token. With M-RoPE positions stay.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    shares: ClassVar[tuple[float, ...]] = (300 / 576, 200 / 576, 110 / 576)

    recycled: float = param(0.3, "share of the dropped tokens that is clustered; 0: none", low=0, high=1)
    rank: float = param(0.0, "lambda of the adaptive number of dropped tokens; 0: as `keep` says", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        layers = {min(arch.depth - 2, round(arch.depth * i / 32)) for i in (2, 6, 15)}
        return schedule(self, arch, layers)

    @property
    def neutral(self) -> bool:
        return super().neutral and not self.rank

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(i + 1 for i in super().stages)

    def choose(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.raters(tokens)
        weights, whole = tokens.rows(rows), tokens.session.whole.part(ImageColumns).images
        scores = weights.sum(dim=1) / rows.sum(dim=1, keepdim=True)
        assert whole is not None and self.keep is not None
        keep, hidden = torch.zeros_like(tokens.images, dtype=torch.bool), tokens.hidden.clone()
        for b in range(len(keep)):
            for image in range(1, int(whole[b].max()) + 1):
                columns = (tokens.images[b] == image).nonzero()[:, 0]
                budget = share_of(self.keep[tokens.stage], int((whole[b] == image).sum()))
                if self.rank:
                    rank = int(torch.linalg.matrix_rank(weights[b, : int(rows[b].sum()), columns].float()))
                    budget = max(1, len(columns) - round(self.rank * (len(columns) - rank)))
                order = columns[scores[b, columns].sort(descending=True, stable=True).indices]
                keep[b, order[:budget]] = True
                dropped = order[budget:]
                if len(dropped) and self.recycled:
                    best = dropped[: int(len(dropped) * self.recycled) + 1]
                    centres, merged = cluster(tokens.hidden[b, best], len(best) // 10 + 1)
                    keep[b, best[centres]], hidden[b, best[centres]] = True, merged.to(hidden.dtype)
        return keep, hidden

    def raters(self, tokens: Tokens) -> torch.Tensor:
        """[B, n] True for the rater tokens."""
        raters = tokens.session.whole.memory(self, Raters)
        if raters.rows is None:
            question = tokens.question
            rows = torch.zeros_like(question)
            for b in range(len(rows)):
                x, text, image = tokens.first[b].float(), question[b].nonzero()[:, 0], tokens.images[b] > 0
                match = (x[image] @ x[text].T).softmax(dim=-1).mean(dim=0)
                rows[b, text] = match > match.mean()
            raters.rows = torch.where(rows.any(dim=1, keepdim=True), rows, tokens.last)
        rows = raters.rows.to(tokens.hidden.device)  # the stages may lie on different devices
        return rows[:, -tokens.images.shape[1] :]  # the question's columns are the last ones at every stage


def cluster(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, C] -> `count` centres by density peaks over the `count` nearest neighbours, and their clusters' means."""
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    centres = peaks(x, count).sort(descending=True, stable=True).indices[:count]
    home = distance[:, centres].argmin(dim=1)
    home[centres] = torch.arange(count, device=x.device)
    return centres, means(x, home, count)[0]
