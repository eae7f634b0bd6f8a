"""FastVID: a video in segments; what is looked at, and peaks of density with what is like them (Shen et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import param
from vlm_fix.arch import Arch
from vlm_fix.pruning.diversity import cosines, peaks
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.pruning.merge import TokenMerger, means, nearest


@dataclass(frozen=True)
class FastVID(TokenMerger):
    """Keeps, in each segment of like frames, salient tokens and a few anchors into which the segment's others are merged.

    With g_t the mean of frame t's projected tokens z [n, C] and c_t = cos(g_t, g_t+1), a segment ends where c_t < `tau` and
    at the `segments` - 1 smallest. Of a segment's L frames, those with c_t >= `ignore` to their next one inside it keep
    nothing by themselves. Its budget L max(1, floor(`keep` n)): max(1, floor(`context` of it)) anchors, the rest salient.
    Salient: in equal parts for the frames that count, the top of a_j, the attention of the frame's mean query (head mean,
    deepest layer that reaches the projector). Anchors: in every `every`-th frame that counts, from the last backwards, at
    most n / 2 of its other tokens, those of the highest density peak (4 nearest). A frame's anchor becomes
        w z + (1 - w) mean(m tokens that came to it),   w = max(`own`, 1 / (1 + m)):
    to the anchor with the highest cosine come all of the segment's tokens but its salient ones and that frame's anchors.

    Source: arXiv 2503.11187; official code LunarShen/FastVID@a40a109, its version for Qwen2.5-VL (8 segments, tau .84,
    ignore .95, context .4, every 4, own .6; a share of .27 keeps 24.1 %, since what a frame has no tokens for is lost, here
    too). Deviations: a_j is the mean over a unit's patches, there the attention to their mean key; equally dense tokens are
    told apart by their order, there by noise; an image is a video of one frame. Without `keep`: .25. Ties: lower index.
    """

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11187"
    reads_flow: ClassVar[bool] = True

    segments: int = param(8, "segments that a video has at least", low=1)
    tau: float = param(0.84, "cosine of two frames under which a segment ends", low=-1, high=1)
    ignore: float = param(0.95, "cosine of two frames from which the first keeps nothing by itself", low=-1)
    context: float = param(0.4, "share of a segment's budget for anchors", low=0, high=1)
    every: int = param(4, "frames from one with anchors to the next", low=1)
    own: float = param(0.6, "least weight of an anchor's own feature", low=0, high=1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"keep": 0.25}

    @property
    def exact(self) -> bool:
        return False

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def reduce(self, image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
        assert image.features is not None
        z, count = image.features.float(), len(image.features)
        n, budget, (flow,) = count // image.frames, self.budget(count), image.flow.values()
        if budget == count:
            return torch.arange(count), image.features
        assert self.keep is not None
        retained = max(1, int(self.keep * n) if self.keep <= 1 else budget // image.frames)
        a = flow[:, 0].float().to(z.device).view(image.frames, n)
        likeness = cosines(z.view(image.frames, n, -1).mean(dim=1)).diagonal(1)
        ends = {image.frames - 1, *likeness.sort(stable=True).indices[: self.segments - 1].tolist()}
        ends |= set((likeness < self.tau).nonzero()[:, 0].tolist())
        kept: list[torch.Tensor] = []
        features, start = image.features.clone(), 0
        for end in sorted(ends):
            own = [t for t in range(start, end + 1) if t == end or float(likeness[t]) < self.ignore]
            salient, anchors = self.chosen(z, a, own, (end + 1 - start) * retained)
            others = torch.zeros(count, dtype=torch.bool, device=z.device)
            others[start * n : (end + 1) * n] = True
            others[salient] = False
            for anchor in anchors:
                mine = others.index_fill(0, anchor, False).nonzero()[:, 0]
                mean, size = means(z[mine], nearest(z[mine], z[anchor]), len(anchor))
                w = (1 / (1 + size.float())).clamp(min=self.own)[:, None]
                features[anchor] = torch.where(size[:, None] > 0, w * z[anchor] + (1 - w) * mean, z[anchor]).to(
                    features
                )
            kept, start = [*kept, salient, *anchors], end + 1
        index = torch.cat(kept).sort().values
        return index, features[index]

    def chosen(
        self, z: torch.Tensor, a: torch.Tensor, own: list[int], budget: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A segment's salient tokens, and the anchors of each frame that has any: indices in the video, `own` its frames."""
        n, context = a.shape[1], max(1, int(budget * self.context))
        with_anchors = own[::-1][:: self.every]
        looked_at, dense = split(budget - context, len(own)), split(context, len(with_anchors))
        salient, anchors = [torch.zeros(0, dtype=torch.long, device=z.device)], []
        for frame, quota in zip(own, looked_at, strict=True):
            wanted = min(dense[with_anchors.index(frame)], max(1, n // 2)) if frame in with_anchors else 0
            order = a[frame].sort(descending=True, stable=True).indices
            top = order[: min(quota, n - wanted)]
            salient.append(top + frame * n)
            if wanted:
                rest = torch.ones(n, dtype=torch.bool, device=z.device).index_fill(0, top, False).nonzero()[:, 0]
                peak = peaks(z[rest + frame * n], 4).sort(descending=True, stable=True).indices[:wanted]
                anchors.append(rest[peak.sort().values] + frame * n)
        return torch.cat(salient), anchors


def split(total: int, parts: int) -> list[int]:
    """Equal whole parts; the first ones take the remainder."""
    return [total // parts + (i < total % parts) for i in range(parts)]
