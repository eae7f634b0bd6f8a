"""CausalMM, counterfactual attention in the vision tower and in the language model (Zhou et al., ICLR 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, Method, RowScope, VlmFixError, WeightEdit, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.draw import hashed
from vlm_fix.decoding.kinds import Negative
from vlm_fix.pruning.encoder import ImageTokens, shown_tokens, unreadable, views
from vlm_fix.rows import Rows
from vlm_fix.session import PAD

from .tower_maps import map_of

VISION = ("shuffle", "random", "uniform", "reversed", "none")
LANGUAGE = ("reverse_and_normalize", "reverse", "uniform", "random", "none")


@dataclass(frozen=True)
class CausalMM(WeightEdit, Contrast):
    """Contrasts with answers under attention that means nothing, in the vision tower, in the decoder, or one branch each.

    vision: the tower's attention A [H, S, S] in its last but one layer is edited, resized to the patch grid (bilinear) and
    averaged over heads; it multiplies the image features. shuffle: the entries of each head permuted; random: U(0, 2);
    uniform: mean A; reversed: max A - A.
    language: in the branch's rows, a row's weights a over the n columns it sees become, reverse: max a - a;
    reverse_and_normalize: that over its sum (the default); uniform: 1 / n; random: U(0, 1) over its sum.
    z = (1 + k gamma) log p - gamma sum log p' over the k branches, tokens with p < beta max p cut off.

    Source: arXiv 2410.04780; official code The-Martyr/CausalMM@6d1ae4e (gamma 1, epsilon .1 = beta; vision shuffle).
    Deviations: there the counterfactual shares the cache of the answer, so that only the first token is contrasted; here
    each branch has its own. Weights are normalised over the columns a row sees; the official uniform and random divide by
    the whole length. Whatever is drawn depends on `seed`, the image and the place alone, so that batching changes nothing.
    Qwen-VL: its merger begins with a norm, which undoes any factor, so merged features are multiplied (map at their grid);
    of its layers the last fully attending one before the last layer is taken.
    """

    name: ClassVar[str] = "causalmm"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04780"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"gamma": (0.25, 0.5)}
    row_scope = RowScope.ALL

    branch: str = param("negative", "always its own branches", choices=("negative",))
    gamma: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    vision: str = param("shuffle", "attention of the vision tower in a branch", choices=VISION)
    language: str = param("reverse_and_normalize", "attention of the decoder in another branch", choices=LANGUAGE)
    vision_layer: int | None = param(None, "vision layer whose attention is edited (last but one)", low=0)
    seed: int = param(0, "seed of shuffle and random", low=0, high=2**32 - 1)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"vision_layer": max((i for i in arch.vision_full if i <= arch.vision_depth - 2), default=0)}

    def resolve(self, arch: Arch) -> Method:
        if arch.family.encoder is None and not arch.family.crosses and self.vision != "none" and not self.neutral:
            raise VlmFixError(unreadable(arch.family, self.name))
        method: Any = super().resolve(arch)
        return dataclasses.replace(method, layers=()) if self.language == "none" else method

    @property
    def neutral(self) -> bool:
        return self.gamma == 0 or (self.vision == "none" and self.language == "none")

    @property
    def passes(self) -> int:
        return 1 if self.neutral else 1 + (self.vision != "none") + (self.language != "none")

    def acts_in(self, branch: str) -> bool:
        return branch == "language"

    def encoder_layers(self, arch: Arch) -> tuple[int, ...] | None:
        if self.vision == "none":
            return None
        assert self.vision_layer is not None
        if self.vision_layer not in arch.vision_full:
            known = ", ".join(map(str, arch.vision_full))
            raise VlmFixError(
                f"causalmm: vision_layer={self.vision_layer} has no full attention; layers with it: {known}."
            )
        return (self.vision_layer,)

    def branches(self, call: Call) -> dict[str, Negative]:
        branches = {"vision": Negative(call.inputs), "language": Negative(call.inputs)}
        if self.vision != "none":
            shown = shown_tokens(call, images := views(call), self.name)
            branches["vision"] = Negative(call.inputs, lambda x: self.counterfactual(x, images, shown.to(x.device)))
        return {name: branch for name, branch in branches.items() if getattr(self, name) != "none"}

    def combine(self, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        k = len(negatives)
        return plausible((1 + k * self.gamma) * l - self.gamma * torch.stack(negatives).sum(dim=0), l, self.beta)

    def counterfactual(self, features: torch.Tensor, images: list[ImageTokens], shown: torch.Tensor) -> torch.Tensor:
        """[N, C] embeddings of the image tokens -> the same, weighted by the edited attention; shown: `shown_tokens`."""
        assert self.vision_layer is not None
        maps = (map_of(image, self.vision_layer, self.vision, self.seed) for image in images)
        factors = [factor[:, None].to(features) for factor in maps]
        raws = [image.raw() for image in images if image.raw]
        real = shown >= 0  # newlines stay
        if not raws or raws[0].dim() > 2:
            return features.masked_scatter(real[:, None], features[real] * torch.cat(factors)[shown[real]])
        weighted = [i.project(raw * factor) for i, raw, factor in zip(images, raws, factors, strict=True) if i.project]
        return features.masked_scatter(real[:, None], torch.cat(weighted).to(features)[shown[real]])

    def edit_weights(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        a, types = weights, rows.session.types
        offset, at = max(0, types.shape[1] - a.shape[-1]), torch.arange(a.shape[-1], device=a.device)
        columns, positions = at + offset, rows.positions.to(a.device)
        padding = (types == PAD).to(a.device)
        seen = (columns <= positions[:, None]) & ~padding[:, None, None, offset : offset + a.shape[-1]]
        if self.language == "uniform":
            new = seen.to(a.dtype).expand_as(a)
        elif self.language == "random":
            first = padding.sum(dim=1)[:, None, None, None]  # places count from each prompt's own beginning
            heads = torch.arange(a.shape[1], device=a.device)[:, None, None]
            new = hashed(self.seed, rows.layer, heads, positions[:, None] - first, columns - first).to(a.dtype) * seen
        else:
            new = (a.amax(dim=-1, keepdim=True) - a) * seen
        if self.language == "reverse":
            return new
        total = new.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, new / total, a)  # the first row has one column and nothing to reverse
