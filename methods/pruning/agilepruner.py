"""AgilePruner: attention first, with a distance to keep that grows with the image's complexity (Baek et al., ICLR 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import vlm_fix
from vlm_fix import TokenPruner, param
from vlm_fix.arch import Arch
from vlm_fix.pruning.diversity import cosines
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.sample import Sample


@dataclass(frozen=True)
class AgilePruner(TokenPruner):
    """Takes tokens by attention; each one taken removes those that are too like it, and more so the later it comes.

    With a_i the class token's attention (mean over heads, deepest layer that reaches the projector) and x_i the features
    before it [N, Cv]: the k-th token taken, the one of largest a among those left, removes every i with
        1 - cos(x_i, x_k) < tau_k = min(tau_max, `slope` k erank(x) / erank_avg),
    erank(x) = exp(-sum p log p), p the singular values of x divided by their sum. If all are taken or removed before T
    are, the removed ones of largest a fill up.

    Source: arXiv 2603.01236, as far as the authors' page cvsp-lab/AgilePruner@027e1fa states the rule (slope .01); the code
    is not out. Ambiguities: erank_avg, an average over images, is not given (None: this image counts as an average one;
    `vlm-fix calibrate agilepruner` measures it), nor is tau_max (1, where directions are unrelated, is a choice made
    here); whether features are taken before or after the projector (`space`); k counts what is taken, from 1. Towers
    without a class token (Qwen-VL): attention received; x_i is a merge unit's four patches together. Ties: lower index.
    """

    name: ClassVar[str] = "agilepruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.01236"

    slope: float = param(0.01, "growth of the distance with each token taken", low=0)
    tau_max: float = param(1.0, "largest distance", low=0, high=2)
    erank_avg: float | None = param(None, "effective rank of an average image; None: this image's", above=0)
    space: str = param("tower", "features before or after the projector", choices=("tower", "projected"))

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return (arch.vision_last,)

    def select(self, image: ImageTokens) -> torch.Tensor:
        x, (attention,) = self.of(image), image.first.values()
        distance, a, budget = 1 - cosines(x), attention.float().to(x.device), self.budget(len(x))
        ratio = 1.0 if self.erank_avg is None else float(effective_rank(x)) / self.erank_avg
        taken, left = torch.zeros_like(a).bool(), torch.ones_like(a).bool()
        for k in range(1, budget + 1):
            if not left.any():
                order = a.masked_fill(taken, -torch.inf).sort(descending=True, stable=True).indices
                taken[order[: budget - k + 1]] = True
                break
            best = a.masked_fill(~left, -torch.inf).argmax(dim=0, keepdim=True)
            taken[best] = True
            left = left & (distance[best[0]] >= min(self.tau_max, self.slope * k * ratio)) & ~taken
        return taken.nonzero()[:, 0]

    def of(self, image: ImageTokens) -> torch.Tensor:
        """x [N, ...]."""
        x = image.features if self.space == "projected" else image.raw() if image.raw else None
        assert x is not None
        return x.float().flatten(1)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """erank_avg: the mean effective rank over the samples' images."""
        found: list[float] = []

        @dataclass(frozen=True)
        class Probe(AgilePruner):
            name: ClassVar[str] = "effective_rank"

            def select(self, image: ImageTokens) -> torch.Tensor:
                found.append(float(effective_rank(self.of(image))))
                return torch.arange(1)  # what is answered does not matter

        with vlm_fix.wrapped(model, Probe(space=self.space)), torch.no_grad():
            for i, sample in enumerate(samples):
                progress("effective rank", i / len(samples))
                model(**sample.inputs)
        return {"erank_avg": sum(found) / len(found)}


def effective_rank(x: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the singular values of x [N, C]."""
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    return (-torch.special.xlogy(p, p).sum()).exp()
