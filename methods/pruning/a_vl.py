"""A-VL: of the image's keys, many are stored and few are computed; of the text's, few are kept (Zhang et al., AAAI 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.pruning.cache import SplitLayer
from vlm_fix.pruning.kinds import Cached, CachePruner, share_of
from vlm_fix.pruning.kv import Aside, answer_step, lay_aside, shorten, take_back
from vlm_fix.pruning.rows import received
from vlm_fix.session import PAD, VISUAL, Session


@dataclass
class Stored(Aside):
    """One layer's: attention that its text columns received [B, Hkv, t], ending where the columns do; evicted columns [B]."""

    received: torch.Tensor = None  # type: ignore[assignment]  # set after the prompt
    gone: torch.Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True)
class AVL(CachePruner):
    """Each layer stores the image keys it looks at most, mostly computes the best of them, and forgets text unlooked at.

    Image: a_j is a layer's head-mean attention from its newest row to image column j of N. After the prompt the top `keep`
    of each image are stored (the secondary cache), the rest is deleted. The top core N of those stored (the core cache)
    take part in attention; every `every`-th step all that are stored do, and the core is picked anew from that row. In
    between the others lie beside the cache, in order and unread.

    Text after the last image, on by default: r_hj is the attention that column j got in key-value head h since it was
    there, from the prompt's text rows and the answer's. After the prompt and every `text_every`-th step, if a layer holds
    more than n = max(text_start, text_keep T) of the T text columns so far, each head keeps the newest n - [heavy n] and,
    of those before, the [heavy n] with the highest r (H2O, arXiv 2306.14048).

    Source: arXiv 2409.14846; 2147483647-2/A-VL@8932507 with its flags' defaults: half deleted, 60 % of all image tokens
    not computed, half of the text but at least 20 columns kept, 70 % of them heavy; all layers; 3 steps as in its README
    and scripts (the flag itself is off). Deviations: its forward never reads the flag `text_every` and evicts at every
    step (text_every=1); shares are rounded, its are cut off; with several images the text between them stays and the core
    is picked from all together. It masks what the paper's CUDA operator skips; here attention is given shorter keys. Its
    other scheme for text, behind a flag of its own, is not here. Its option to drop image tokens in the prompt, after
    layer 3, is `fastv`'s. Ties go to the lower index.
    """

    name: ClassVar[str] = "a_vl"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.14846"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"keep": (0.75,)}

    core: float = param(0.4, "share of all image columns that most steps compute", low=0, high=1)
    every: int = param(3, "steps after which all stored columns are computed once and the core is picked anew", low=1)
    text_keep: float = param(0.5, "share of the text after the image that is kept; 1 keeps all", low=0, high=1)
    text_start: int = param(20, "text columns that are always kept", low=1)
    text_every: int = param(8, "steps from one eviction of text to the next", low=1)
    heavy: float = param(0.7, "share of the kept text that attention chooses; the rest is the newest", low=0, high=1)

    @property
    def splits(self) -> bool:
        """True if some steps compute less than is stored."""
        return self.every > 1 and not (self.core == 1 or self.core >= self.keep)

    @property
    def neutral(self) -> bool:
        return self.keep == 1 and not self.wanders

    @property
    def wanders(self) -> bool:
        return self.splits or self.text_keep < 1

    def scores(self, cached: Cached) -> torch.Tensor:
        return cached.last_row()[:, None]

    def stored(self, session: Session, i: int) -> Stored:
        return session.memory(self, Stored, i)

    def whole(self, session: Session) -> bool:
        """True if this forward computes all that is stored: a refresh, or several rows at once."""
        return answer_step(session) % self.every == 0 or session.length > 1

    def before_step(self, session: Session, i: int, layer: SplitLayer) -> None:
        if self.whole(session):
            take_back(session, i, layer, self.stored(session, i))

    def after_prompt(self, cached: Cached, scores: torch.Tensor, layer: SplitLayer) -> None:
        session, stored = cached.session, self.stored(cached.session, cached.layer)
        if self.splits:
            self.lay_aside(session, cached.layer, layer, scores)
        if self.text_keep < 1:
            texts, n = torch.tensor(self.texts(session)), cached.valid.shape[1]
            rows = (torch.arange(n) >= n - texts[:, None]).to(cached.valid.device)
            stored.received = received(cached.seen, rows, cached.valid)[..., n - int(texts.max()) :]
            stored.gone = torch.zeros_like(texts)
            self.evict(session, cached.layer, layer, stored)

    def after_step(self, cached: Cached, layer: SplitLayer) -> None:
        session, stored = cached.session, self.stored(cached.session, cached.layer)
        whole = self.splits and self.whole(session)
        if not whole and self.text_keep == 1:
            return
        rows = cached.step_rows()
        if whole:
            self.lay_aside(session, cached.layer, layer, rows[:, :, -1].mean(dim=1))
        if self.text_keep < 1:
            count, heads = rows.shape[2], cached.keys.shape[1]
            before = torch.nn.functional.pad(stored.received, (0, count))
            stored.received = before + rows.unflatten(1, (heads, -1)).sum(dim=(2, 3))[..., -before.shape[2] :]
            if answer_step(session) % self.text_every == 0:
                self.evict(session, cached.layer, layer, stored)

    def texts(self, session: Session) -> list[int]:
        """Text columns after each row's last image so far, evicted or not; 0 for a row without an image."""
        return [session.types.shape[1] - 1 - last if last >= 0 else 0 for last in session.last_visual]

    def lay_aside(self, session: Session, i: int, layer: SplitLayer, weights: torch.Tensor) -> None:
        """Pick the core among the image columns that layer i holds by `weights` [B, m], all images together."""
        types = session.at(i).types
        visual = (types == VISUAL).to(weights.device)
        core = torch.zeros_like(visual)
        for row, total in enumerate((session.types == VISUAL).sum(dim=1).tolist()):
            columns = visual[row].nonzero()[:, 0]
            order = weights[row, columns].sort(descending=True, stable=True).indices
            core[row, columns[order[: share_of(self.core, total)]]] = True
        lay_aside(session, i, layer, core, self.stored(session, i))

    def evict(self, session: Session, i: int, layer: SplitLayer, stored: Stored) -> None:
        """Drop the text columns that were looked at least; stored.received ends where layer i's columns do."""
        got, texts = stored.received, self.texts(session)
        budgets = [max(round(self.text_keep * t), self.text_start) for t in texts]
        count, budget = torch.tensor(texts) - stored.gone, torch.tensor(budgets)
        heavy = torch.tensor([int(self.heavy * b) for b in budgets])
        if bool((count <= budget).all()):
            return
        age = torch.arange(got.shape[2], 0, -1)
        old = (age > (budget - heavy)[:, None]) & (age <= count[:, None]) & (count > budget)[:, None]
        old, heavy = old[:, None].to(got.device), heavy[:, None, None].to(got.device)
        rank = got.masked_fill(~old, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        types = session.at(i).types
        ahead = (types.shape[1] - got.shape[2], 0)
        gone = torch.nn.functional.pad(old & (rank >= heavy), ahead)
        index = shorten(session, i, layer, (types.to(got.device) != PAD)[:, None] & ~gone)
        count = torch.minimum(count, budget)
        stored.gone = torch.tensor(texts) - count
        stored.received = torch.nn.functional.pad(got, ahead).gather(2, index)[..., -int(count.max()) :]
