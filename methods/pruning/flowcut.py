"""FlowCut: tokens that information flows from, layer by layer through the vision tower (Tong et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import TokenPruner, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.encoder import ImageTokens


@dataclass(frozen=True)
class FlowCut(TokenPruner):
    """Lets fewer and fewer tokens go on from layer to layer of the tower, by a score that remembers the layers before.

    In layer l, over the n tokens still there: a_i the class token's attention, s_i the softmax of its value's product with
    value i (means over heads), v_i the value's head mean;   f_i = (a_i / sum a + s_i / sum s) |v_i|_1,
        F_i <- (1 - memory) F_i + memory f_i   (the first layer's: f_i).
    In every second layer, d layers before the last one that counts, the top max(T, n - r) of F go on,
        r = round((n - T) / sqrt(d) (1 - (H / log n)^2)),   H the entropy of a / sum a;   with d = 0, the top T.
    The last one is that before the deepest layer whose output reaches the projector.

    Source: arXiv 2505.19536; official code TungChintao/FlowCut@a2ecd24 (memory .5; 192, 128, 64 of 576 tokens in CLIP's 24
    layers). Deviations: tokens that do not go on stay in the tower, whose attention here is the whole image's, and only
    lose their place in the ranking; the official code takes them out, which makes the tower faster and what follows
    differ. Towers without a class token (Qwen-VL, in its fully attending layers): the attention of the mean query and no s,
    as in its Qwen2-VL code, whose second cut inside the language model and whose merge units of scattered patches are left
    out: a merge unit has its patches' mean. Ties go to the lower index.
    """

    name: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.19536"
    reads_flow: ClassVar[bool] = True

    memory: float = param(0.5, "weight of a layer's own score against what was remembered", low=0, high=1)

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return tuple(i for i in arch.vision_full if i < arch.vision_last) or (arch.vision_last,)

    def select(self, image: ImageTokens) -> torch.Tensor:
        layers = sorted(image.flow)
        alive = torch.arange(len(image.flow[layers[0]]), device=image.flow[layers[0]].device)
        total, budget = torch.zeros_like(alive, dtype=torch.float32), self.budget(len(alive))
        for step, layer in enumerate(layers):
            relation, semantic, norm = image.flow[layer][alive].float().unbind(dim=1)
            a = relation / relation.sum()
            score = (a + semantic / semantic.sum().clamp(min=torch.finfo(semantic.dtype).tiny)) * norm
            total = score if not step else (1 - self.memory) * total + self.memory * score
            left = len(layers) - 1 - step
            if not left % 2 and len(alive) > budget:
                count = max(budget, len(alive) - excess(a, budget, left)) if left else budget
                stay = total.sort(descending=True, stable=True).indices[:count].sort().values
                alive, total = alive[stay], total[stay]
        return alive


def excess(a: torch.Tensor, budget: int, left: int) -> int:
    """r, of attention a [n] that sums to 1."""
    entropy = -torch.special.xlogy(a, a).sum() / torch.log(torch.tensor(float(len(a))))
    return int(((len(a) - budget) / left**0.5 * (1 - entropy**2)).round())
