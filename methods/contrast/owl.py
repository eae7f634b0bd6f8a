"""Owl, dual-path attention intervention (AAAI 2026)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, Memory, ScoreEdit, VlmFixError, WeightReader, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import Negative
from vlm_fix.rows import Rows
from vlm_fix.scope import of_main
from vlm_fix.session import PAD
from vlm_fix.wing import engine_of


@dataclass
class OwlMemory(Memory):
    """ratio: layer -> generated token, -1 for the prompt -> [B] visual over textual contribution of the main branch's row."""

    ratio: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Owl(WeightReader, ScoreEdit, Contrast):
    """Contrasts a path that looks at the image with one that looks at the text, each steered by what the model itself does.

    On the row that predicts the next token, z the raw scores, V the image columns, T the prompt's text before the first and
    after the last image, without its first token:
      visual path:  z[V] <- z[V] + a |z[V]|,  z[T] <- z[T] - b |z[T]|;   text path: the same with a and b negated.
    a = alpha and b = beta_text; where the layer's ratio x = mean over heads of (weight on V) / (weight on all text of the
    prompt), in the same row of the model as it is, lies below `base` y: both grow by boost (y - x) / y, up to `cap`.
    z = (1 + lam) log p_visual - lam log p_text, tokens with p < beta max p cut off, p the model's own.

    Source: arXiv 2511.09018; official code CikZ2023/OWL@188ce3a (alpha .2, b .2, layers 2-31, gamma 2 = 1 + lam, beta .1,
    boost .2, cap .6). Deviations: its thresholds, llava_array.npy, are not in the repository: `base` holds one number for each
    of `layers`, and without it strengths stay as they are. The official code reads the ratio and threshold of the layer
    `start_layer` places before; here a layer has its own.
    """

    name: ClassVar[str] = "owl"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.09018"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"lam": (0.5, 2.0)}

    branch: str = param("negative", "always its own branches", choices=("negative",))
    alpha: float = param(0.2, "share of |z| added to (visual path) or taken from (text path) image columns", low=0)
    beta_text: float = param(0.2, "share of |z| taken from or added to the prompt's text columns", low=0)
    lam: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    base: tuple[float, ...] | None = param(None, "for each of `layers`, the ratio below which strengths grow")
    boost: float = param(0.2, "growth per relative distance from `base`", low=0)
    cap: float = param(0.6, "upper limit of what has grown", low=0)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": f"{min(2, arch.depth - 1)}-"}

    def resolve(self, arch: Arch) -> Owl:
        asked = dataclasses.replace(self, layers=self.layers or self.defaults(arch)["layers"])
        method = super().resolve(arch)
        assert isinstance(method, Owl) and isinstance(method.layers, tuple)
        if self.base is not None and (len(self.base) != len(method.layers) or min(self.base) <= 0):
            raise VlmFixError(
                f"owl: base must hold {len(method.layers)} numbers above 0, one for each of layers={asked.layers}."
            )
        return method

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.beta_text == 0 and (self.base is None or self.boost == 0)

    @property
    def passes(self) -> int:
        return 1 if self.neutral else 3

    def acts_in(self, branch: str) -> bool:
        return not of_main(branch) or self.base is not None

    def branches(self, call: Call) -> dict[str, Negative]:
        return {"visual": Negative(call.inputs), "text": Negative(call.inputs)}

    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        if rows.session.branch != "main" or self.base is None:
            return
        text = rows.before | (rows.after & ~rows.generated)
        seen, read = ((weights * part).sum(dim=-1) for part in (rows.visual, text))
        ratio = torch.where(read > 0, seen / read, 0.0).mean(dim=1)  # [B, R]
        known = rows.memory(OwlMemory).ratio.setdefault(rows.layer, {})
        first = rows.numbers[0] - rows.session.prompt_len
        if self.gate == 1:  # then no branch is further behind than a round of drafts
            for old in [t for t in known if t < first - 8]:
                del known[old]
        known.update({first + i: ratio[:, i] for i in range(ratio.shape[1])})

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        session = rows.session
        if of_main(session.branch):
            return scores
        real = session.types != PAD
        first = rows.columns(real & (real.cumsum(dim=1) == 1))
        text = (rows.before | (rows.after & ~rows.generated)) & ~first
        sign = 1.0 if session.branch == "visual" else -1.0
        a, b = self.strengths(rows, len(scores))
        return scores + sign * (a * rows.visual - b * text) * scores.abs()

    def strengths(self, rows: Rows, count: int) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """alpha and beta_text of `count` sequences' rows, [count, 1, R, 1] where they grow."""
        if self.base is None:
            return self.alpha, self.beta_text
        main = engine_of(rows.session.call.model).main
        assert isinstance(self.layers, tuple)
        known = main.memory(rows.method, OwlMemory).ratio[rows.layer]
        x = torch.stack([known[p - rows.session.prompt_len] for p in rows.numbers], dim=1)[:, None, :, None]
        x = x[:: len(x) // count]  # a branch reads the prompt that several beams or samples share once
        y = self.base[self.layers.index(rows.layer)]
        more = self.boost * (y - x) / y
        a, b = (torch.where(x < y, (s + more).clamp(max=self.cap), s) for s in (self.alpha, self.beta_text))
        return a, b

    def combine_at(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        visual, text = negatives
        z = (1 + self.lam) * visual - self.lam * text
        return plausible(z.masked_fill(torch.isinf(l), -torch.inf), l, self.beta)
