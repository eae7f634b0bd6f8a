"""RazorAttention: heads that look things up keep every image key, all others a few and one that stands for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.method import Method, parse_heads
from vlm_fix.pruning.cache import ShortLayer
from vlm_fix.pruning.kinds import Cached, CachePruner


@dataclass(frozen=True)
class Razor(CachePruner):
    """After the prompt, heads outside `head_list` see an image's newest keys and, for the other n of them, their mean.

    Of an image's N keys a key-value head without a retrieval head keeps the last keep N (the window); the n before become one
    compensation token, k' = mean k_j and v' = mean v_j, whose weight counts n times:
        out = (sum_i e^{q k_i} v_i + n e^{q k'} v') / (sum_i e^{q k_i} + n e^{q k'}),   i over text and window.
    A head of `head_list`, and with it the others of its key-value head, sees all keys. With several images each has its own.

    Source: arXiv 2407.15891, text only (no official code; 15 % of the heads, found as induction and echo heads on repeated
    random text). **It saves no memory here**: the compensation token stands in all n places, which gives it the weight n
    that no attention kernel takes, since the heads of a layer have caches of one length; so it tells what the method does to
    answers, not what it spares. Deviations: retrieval heads are named: `vlm-fix calibrate decore` finds heads that copy,
    whose head_list is taken here; text keys, the paper's sinks among them, always stay.
    """

    name: ClassVar[str] = "razor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.15891"
    rewrites: ClassVar[bool] = True

    keep: float = param(
        0.2, "window of the other heads, image keys: a count (> 1) or a share in (0, 1]", above=0, counts=True
    )
    head_list: tuple[str, ...] | None = param(None, "retrieval heads as layer.head, e.g. 16.29|26.9")

    def resolve(self, arch: Arch) -> Method:
        if self.head_list is None and not self.neutral:
            raise VlmFixError(
                "razor does not know the retrieval heads of this model: name them, as in razor:head_list=16.29|26.9; "
                "`vlm-fix calibrate decore` finds some."
            )
        parse_heads(self.name, self.head_list or (), arch)
        return super().resolve(arch)

    def scores(self, cached: Cached) -> torch.Tensor:
        """[B, Hkv, n]: later columns are higher; in key-value heads with a retrieval head all are infinite."""
        heads = cached.keys.shape[1]
        named = parse_heads(self.name, self.head_list or (), cached.host.arch)
        listed = {h * heads // cached.host.arch.heads for layer, h in named if layer == cached.layer}
        place = torch.arange(cached.keys.shape[2], dtype=torch.float32, device=cached.keys.device)
        every = torch.tensor([g in listed for g in range(heads)], device=place.device)
        return torch.where(every[:, None], torch.inf, place).expand(len(cached.keys), -1, -1)

    def choose(self, scores: dict[int, torch.Tensor], images: torch.Tensor) -> dict[int, torch.Tensor]:
        return {i: (images > 0)[:, None] for i in scores}  # nothing is dropped: what follows rewrites it

    def rewrite(self, cached: Cached, layer: ShortLayer, scores: torch.Tensor, images: torch.Tensor) -> None:
        window = super().choose({0: scores.nan_to_num(posinf=0)}, images)[0] | scores.isinf()
        assert layer.keys is not None and layer.values is not None
        keys, values = layer.keys.clone(), layer.values.clone()
        for b in range(len(images)):
            for image in range(1, int(images[b].max()) + 1):
                for g in range(window.shape[1]):
                    rest = ((images[b] == image) & ~window[b, g]).nonzero()[:, 0].to(keys.device)
                    for part in (keys, values) if len(rest) else ():
                        part[b, g, rest] = part[b, g, rest].float().mean(dim=0).to(part.dtype)
        layer.keys, layer.values = keys, values
