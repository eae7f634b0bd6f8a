"""VisionTrim: dominant tokens by a global and a local view, and the rest merged as the question asks (Yu et al., ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_fix import param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.pruning.merge import TokenMerger, means

TINY = 1e-30


@dataclass(frozen=True)
class VisionTrim(TokenMerger):
    """Keeps what the class token looks at and what looks like its surroundings, and merges the rest into a few tokens.

    With budget T and R = round(complement T), x_i the features before the projector M [N, Cv], z_i = M(x_i) [N, C]:
    Dominant (DVTS): the T - R tokens of largest s. g_i: the class token's attention (mean over heads) in the deepest layer
    that reaches the projector; l = softmax_i of the mean, over the (2 reach + 1)^2 places around i (0 outside of the image), of
        - |x_i - x_j|^2 / var(x) - .5 |p_i - p_j|^2 / var(p),   p = (row, column), variances over all entries;
    with G = softmax(g) and L = softmax(l):   s = (var(L) G + var(G) L) / (var(G) + var(L)).
    Complement (TGVC): of the others, the R of largest mean_m cos(e_m, z_i) are targets y; e_m [M, C]: the question. Then
    `rounds` times: each other token i goes to the target of largest sum_m cos(z_i, e_m) cos(e_m, M(y)), and y grows by the
    mean x_i of what came to it. A target becomes M(y).

    Source: arXiv 2601.22674 (abstract); official code hanxunyu/VisionTrim, whose 5590673 holds no code any more: its own
    360ce81 (48 + 16 of 576 tokens, 3 rounds, 3 x 3 places). That code computes s and then overwrites it with
    .5 g / |g| + .5 r / |r|, r the attention received: rating="received". On random features its functions give s within 2e-9
    of ours, the same tokens, and merged features within 1e-7. Deviations: CLIP's text tower and visual projection,
    which a LLaVA checkpoint does not hold, give way to the language model's embeddings of the text after the last image and
    its own projector; without such text all T tokens are dominant. r counts the class token's and a token's own row, which
    the code leaves out. Complement tokens stay at their target's place, not behind the others. The stage inside the language
    model, commented out in that code, is left out. Towers without a class token (Qwen-VL): g is the attention received, x_i a
    merge unit. A video's frames are surroundings each for itself. Ties go to the lower index.
    """

    name: ClassVar[str] = "visiontrim"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.22674"

    complement: float = param(0.25, "share of the budget for tokens that others are merged into", low=0, high=1)
    rating: str = param(
        "local", "what rates tokens beside the class token: their surroundings (the paper), or attention received (its "
        "code)", choices=("local", "received")
    )  # fmt: skip
    reach: int = param(1, "how far a token's surroundings reach, in tokens", low=0)
    rounds: int = param(3, "times that tokens are merged", low=1)

    @property
    def asks(self) -> bool:
        return self.complement > 0

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def reduce(self, image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
        assert image.features is not None and image.raw is not None and image.project is not None
        raw, features = image.raw().float(), image.features
        question = image.question if image.question is not None and len(image.question) else None
        budget = self.budget(len(raw))
        count = 0 if question is None else round(budget * self.complement)
        order = self.rated(image, raw.flatten(1)).sort(descending=True, stable=True).indices.to(raw.device)
        dominant = order[: budget - count]
        if question is None or not count:
            kept = dominant.sort().values
            return kept, features[kept.to(features.device)]
        z = normalize(features.float(), dim=-1).to(raw.device)
        words = normalize(question.float(), dim=-1).to(raw.device)
        others = (
            torch.ones(len(raw), dtype=torch.bool, device=raw.device).index_fill(0, dominant, False).nonzero()[:, 0]
        )
        like = (z[others] @ words.T).mean(dim=-1).sort(descending=True, stable=True).indices
        target, rest = others[like[:count].sort().values], others[like[count:].sort().values]
        y, hit = raw[target], torch.zeros(count, dtype=torch.bool, device=raw.device)
        asked = z[rest] @ words.T @ words  # what of each token the question's words see
        for _ in range(self.rounds):
            seen = normalize(image.project(y).float(), dim=-1).to(raw.device)
            mean, size = means(raw[rest], (asked @ seen.T).argmax(dim=-1), count)
            y, hit = y + mean, hit | (size > 0)
        features = features.clone()  # a target that nothing came to stays as it is, bit for bit
        features[target[hit].to(features.device)] = image.project(y)[hit.to(y.device)].to(features)
        kept = torch.cat([dominant, target]).sort().values
        return kept, features[kept.to(features.device)]

    def rated(self, image: ImageTokens, x: torch.Tensor) -> torch.Tensor:
        """s [N], float64 where there is one; x [N, Cv]: the features before the projector."""
        (g,), (received,) = image.first.values(), image.scores.values()
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        g = g.to(x.device, wide)
        if self.rating == "received":
            return 0.5 * normalize(g, dim=0) + 0.5 * normalize(received.to(x.device, wide), dim=0)
        local = self.surroundings(x.to(wide), image.grid, image.frames).softmax(dim=0)
        a, b = g.softmax(dim=0), local.softmax(dim=0)
        u, v = a.var(correction=0), b.var(correction=0)
        return (v * a + u * b) / (u + v).clamp(min=TINY)

    def surroundings(self, x: torch.Tensor, grid: tuple[int, int], frames: int) -> torch.Tensor:
        """[N, Cv] -> [N]: the mean over the window of how like a token each neighbour is and how near, 0 and less."""
        shape = (frames, grid[0] // frames, grid[1])
        field, side = x.view(*shape, -1), self.reach
        ys, xs = torch.arange(shape[1], device=x.device), torch.arange(shape[2], device=x.device)
        places = torch.cat([ys.repeat_interleave(shape[2]), xs.repeat(shape[1])]).to(x.dtype)
        var, apart = x.var().nan_to_num().clamp(min=TINY), places.var().nan_to_num().clamp(min=TINY)
        total = torch.zeros(shape, dtype=x.dtype, device=x.device)
        for dy in range(-side, side + 1):
            for dx in range(-side, side + 1):
                if abs(dy) >= shape[1] or abs(dx) >= shape[2]:
                    continue
                here = (slice(None), *(slice(max(0, -d), n - max(0, d)) for d, n in ((dy, shape[1]), (dx, shape[2]))))
                there = (slice(None), *(slice(max(0, d), n - max(0, -d)) for d, n in ((dy, shape[1]), (dx, shape[2]))))
                far = (field[here] - field[there]).square().sum(dim=-1)
                total[here] -= far / var + 0.5 * (dy * dy + dx * dx) / apart
        return total.flatten() / (2 * side + 1) ** 2
