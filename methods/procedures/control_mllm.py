"""ControlMLLM and ++: the user points, and a latent learned at test time turns attention there (Wu et al., 2024, 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Layers, Memory, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.attention.differentiable import attended
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.decoding.kinds import Contrast
from vlm_fix.inputs import InputEdit
from vlm_fix.method import with_weights
from vlm_fix.session import VISUAL, Session

from . import regions


@dataclass
class Energies(Memory):
    """energy [B, steps + 1]: E of each prompt before each step and after the last."""

    energy: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True)
class ControlMLLM(InputEdit, Contrast):
    """Adds a latent p [N, C] to an image's N embeddings, learned for this prompt, so that the text looks at the region.

    a [N]: attention to the image, mean over `layers`, heads and `rows` of the prompt. With region weights m [N] (1 in a box or
    mask; around points and scribbles exp(-D^2 / 2 sigma^2) / (sqrt(2) pi sigma), D the distance to the nearest one, from 0 to 1),
    E = 400 (1 - sum m a / sum a)^2. The model's weights stay as they are. Version 1: all layers, all text after the image;
    `steps` of p <- p - lr dE/dp, where the image gets p' = .5 p + .5 p'_before. Version ++: the last row, layers 14-25 of 32
    (M-RoPE families: 12-27 of 28), Adam with lr (1e-3 added to its root), and the answer is contrasted with that without p:
    (1 + contrast) l - contrast l_without where softmax(l) >= .1 of its largest.

    Source: arXiv 2407.21534 and its ++; official code mrwu-mac/ControlMLLM@57e16e7 (v1: 5 steps, lr 1, sigma .1; ++: 4
    forwards, so 3 steps, lr .03, sigma .4, contrast .7; Qwen2.5-VL 1 step, .02, .01), layers scaled here. Deviations:
    version 1's code adds each step's p' to embeddings that hold those of the steps before (accumulate=true; the paper's p' is
    the only one added). A region's cells are those it touches, as in the code for Qwen; LLaVA's takes cells by their centre
    (cover=centre). The contrast is VCD's formula, whose fork is not in the repository. Regions are shares of what the image
    processor shows. Each prompt of a batch has a latent of its own, in one pass; layers after the last one read do not run,
    the others are computed twice in place of being kept.
    """

    name: ClassVar[str] = "control_mllm"
    kind: ClassVar[str] = "procedure"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.21534"
    own_keys: ClassVar[bool] = True

    box: tuple[float, ...] | None = param(None, "left|top|right|bottom of the region, as shares of the image")
    point: tuple[float, ...] | None = param(None, "x|y, as shares of the image")
    scribble: tuple[float, ...] | None = param(None, "x|y|x|y|... of its points")
    mask: str | None = param(None, "image file whose bright pixels are the region")
    image: int = param(0, "which image of a prompt is pointed at, from 0", low=0)
    version: str = param("++", "ControlMLLM (1) or ControlMLLM++", choices=("1", "++"))
    rows: str | None = param(None, "rows of the prompt that should look there", choices=("text", "last"))
    steps: int | None = param(None, "steps of the optimiser; 0: none", low=0)
    lr: float | None = param(None, "its step size", low=0)
    sigma: float | None = param(None, "width around points and scribbles", above=0)
    contrast: float | None = param(None, "strength of the contrast with the answer without p; 0: none", low=0)
    accumulate: bool = param(False, "version 1: add each step's latent to those before, as its code does")
    cover: str = param("touch", "cells of a box or mask", choices=("touch", "centre"))
    layers: Layers = param(None, "layers whose attention is turned")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        if self.version == "1":
            return {"rows": "text", "steps": 5, "lr": 1.0, "sigma": 0.1, "contrast": 0.0}
        first, last, depth = (12, 27, 28) if arch.family.mrope else (14, 25, 32)
        layers = tuple(sorted({min(round(i / depth * arch.depth), arch.depth - 1) for i in range(first, last + 1)}))
        tuned = (
            {"steps": 1, "lr": 0.02, "contrast": 0.01}
            if arch.family.mrope
            else {"steps": 3, "lr": 0.03, "contrast": 0.7}
        )
        return {"rows": "last", "sigma": 0.4, "layers": layers, **tuned}

    def resolve(self, arch: Arch) -> ControlMLLM:
        method: Any = super().resolve(arch)
        return method.but(layers=with_weights(self.name, method.layers, arch))

    @property
    def neutral(self) -> bool:
        return self.steps == 0

    @property
    def contrasts(self) -> bool:
        return bool(self.contrast)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return call.inputs

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        assert self.contrast is not None
        return plausible((1 + self.contrast) * l - self.contrast * l_neg, l, 0.1)

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        if session.branch == "negative" or session.start or not bool((session.types == VISUAL).any()):
            return kwargs
        session.need_whole_prompt(self.name)
        if session.call.model.training:
            raise VlmFixError(
                "control_mllm learns at test time and passes no gradients on; call model.eval() or unwrap."
            )
        if session.kept:
            raise VlmFixError("control_mllm needs every token of the image's grid; use it without a pruning method.")
        embeds, (chosen, weights) = kwargs["inputs_embeds"], regions.pointed(self, session)
        rows = torch.zeros_like(session.types, dtype=torch.bool)
        for row, last in zip(rows, session.last_visual, strict=True):
            end = session.prompt_len  # assisted decoding adds guesses behind it
            row[min(last + 1, end - 1) if self.rows == "text" and last >= 0 else end - 1 : end] = True
        p = torch.zeros_like(embeds, dtype=torch.float32)
        before, added, m, s, energies = p, p, p, p, list[torch.Tensor]()
        assert isinstance(self.layers, tuple) and self.steps is not None and self.lr is not None
        with attended(session, kwargs, rows, self.layers) as attention:
            for step in range(1, self.steps + 2):
                p = p.detach().requires_grad_()
                shown = 0.5 * p + 0.5 * before if self.version == "1" else p
                x = (embeds.detach() + (added + shown) * chosen[..., None]).to(embeds.dtype)
                a = attention(x) * chosen
                share = (a * weights).sum(dim=1) / a.sum(dim=1).clamp(min=torch.finfo(a.dtype).tiny)
                energy = 400 * (1 - share) ** 2 * chosen.any(dim=1)
                energies.append(energy.detach())
                if step > self.steps:
                    break
                (grad,) = torch.autograd.grad(energy.sum(), p)
                before = shown.detach()
                added = added + before if self.accumulate and self.version == "1" else added
                if self.version == "1":
                    p = p - self.lr * grad
                else:
                    m, s = 0.9 * m + 0.1 * grad, 0.999 * s + 0.001 * grad**2
                    p = p - self.lr * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-3)
        session.memory(self, Energies).energy = torch.stack(energies, dim=1)
        return {**kwargs, "inputs_embeds": x.detach()}
