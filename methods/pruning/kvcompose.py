"""KVCompose: each head keeps keys of its own, each layer as many as its composed tokens are worth (Akulov et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import param
from vlm_fix.pruning.kinds import Cached, CachePruner, question_columns, share_of
from vlm_fix.pruning.rows import strongest


@dataclass(frozen=True)
class KVCompose(CachePruner):
    """After the prompt, one budget of image keys is shared by all layers; in a layer, every head keeps its own best.

    A_lhr the causal attention of row r of the question (the text after the last image; without any the last row) in query
    head h of layer l. For column j of an image of N and key-value head g:
        s_lgj = mean_{h of g} max_r A_lhr[j],   with `share` s_lgj += mean_g s_lgj.
    Sorted in each head, the k-th best of all heads make the k-th composed token of layer l: c_lk = mean_g sorted(s_lg)_k;
    the first layer's is max_l c_lk. Of all layers' c, the [keep N] L largest stay: n_l in layer l, and each of its heads
    keeps its top n_l of s_lg. At least `least` in every layer.

    Source: arXiv 2509.05165; NVIDIA/kvpress@8bb29b9 (KVComposePress: max over rows, means over groups and heads, share).
    Deviations: text keys are never dropped; each image has its own budget; the rows that ask are the question's own, kvpress
    reads given task prompts, or all of the context once more, after it. Ties go to the lower layer and index.
    """

    name: ClassVar[str] = "kvcompose"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.05165"

    share: bool = param(True, "add the heads' mean to each head's score")
    least: int = param(0, "image keys that every layer keeps at least, per image", low=0)

    @property
    def together(self) -> bool:
        return True

    def scores(self, cached: Cached) -> torch.Tensor:
        question = question_columns(cached.session).to(cached.valid.device)
        last = torch.zeros_like(question)
        last[:, cached.session.prompt_len - 1] = True
        rows = torch.where(question.any(dim=1, keepdim=True), question, last)
        s = strongest(cached.seen, rows, cached.valid).unflatten(1, (cached.keys.shape[1], -1)).mean(dim=2)
        return s + s.mean(dim=1, keepdim=True) if self.share else s

    def choose(self, scores: dict[int, torch.Tensor], images: torch.Tensor) -> dict[int, torch.Tensor]:
        layers = sorted(scores)
        every = torch.stack([scores[i] for i in layers])  # [L, B, Hkv, n]
        keep = torch.zeros_like(every, dtype=torch.bool)
        for b in range(len(images)):
            for image in range(1, int(images[b].max()) + 1):
                columns = (images[b] == image).nonzero()[:, 0]
                values, order = every[:, b][..., columns].sort(dim=-1, descending=True, stable=True)
                composed = values.mean(dim=1)
                composed[..., : self.least] = torch.inf
                composed[0] = composed.amax(dim=0)
                total = min(share_of(self.keep, len(columns)) * len(layers), composed.numel())
                best = composed.flatten().sort(descending=True, stable=True).indices[:total]
                counts = torch.bincount(best // len(columns), minlength=len(layers)).tolist()
                for number, count in enumerate(counts):
                    keep[number, b].scatter_(1, columns[order[number, :, :count]], True)
        return dict(zip(layers, keep.unbind(dim=0), strict=True))
