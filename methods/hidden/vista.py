"""VISTA, visual information steering with token-logit augmentation (Li et al., ICML 2025)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vlm_fix import Arch, Layers, Memory, MLPOutputEdit, RowScope, VlmFixError, param
from vlm_fix.call import Call
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step
from vlm_fix.hidden.push import Gate, pushed
from vlm_fix.hidden.states import last_rows, unit_between, whole_prompt
from vlm_fix.method import parse_layers
from vlm_fix.rows import Rows
from vlm_fix.session import Session
from vlm_fix.wing import engine_of

from .steering import scaled


@dataclass
class VISTAMemory(Memory):
    directions: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> unit vectors [B, 1, C]


@dataclass(frozen=True)
class VISTA(MLPOutputEdit, LogitEdit):
    """Turns what every MLP writes towards what the image brought to the prompt, and mixes the logits of late layers in.

    With h_l [C] the output of layer l in the prompt's last row, in a pass with the image and one without image tokens:
        v_l = h_l(image) - h_l(text only);   for each row x [C] of layer l's MLP output
        x <- ||x|| n(n(x) + lam (1 + max(0, cos(x, -v_l))) n(v_l)),  n(x) = x / ||x||            (VSV, off at lam = 0)
        z = (1 - alpha) logits + alpha mean over mixed_layers of (language head of layer i's output)  (SLA, off at alpha = 0)
    Cost: two passes over the prompt more, one of them without its images; language heads for every token.

    Source: arXiv 2502.03628; official code LzVv123456/VISTA@dc62252: lam .17 for captions and .01 for yes/no questions on
    LLaVA-1.5 (tuned for each model; it is a share of the MLP output's own length), alpha .3, outputs of layers 25 to 30
    of 32 without the final norm, scaled here to the depth. As there, and unlike the paper's text, vectors are added to MLP
    outputs, not to the stream, and on all rows of the prompt: `prompt_rows=last` leaves the others alone.
    Deviations: the official code's PCA of a single pair adds 1 to the first coordinate of layer 0's vector, which is left
    out, and v_l is 0 where the passes differ by no more than rounding; it takes one prompt at a time. SLA acts on the
    distribution after any contrast and leaves rows without an image.
    """

    name: ClassVar[str] = "vista"
    kind: ClassVar[str] = "hidden"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.03628"
    needs_image: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"lam": (0.08, 0.3)}

    lam: float = param(0.17, "strength of the steering, as a share of the MLP output's length; 0: none", low=0)
    alpha: float = param(0.3, "share of the late layers' logits; 0: none", low=0, high=1)
    mixed_layers: Layers = param(None, "layers whose outputs' logits are mixed in")
    prompt_rows: str = param("all", "prompt rows that are steered in the first pass", choices=("last", "all"))

    def resolve(self, arch: Arch) -> VISTA:
        method = super().resolve(arch)
        assert isinstance(method, VISTA)
        for name, strength in {"layers": "lam", "mixed_layers": "alpha"}.items():
            if getattr(self, name) is not None and not getattr(self, strength) and not method.neutral:
                raise VlmFixError(f"vista: {name} are those of {strength}, which is 0; leave them out.")
        last = arch.depth - 2  # the output of the last layer makes the logits themselves
        chosen = (
            method.mixed_layers or f"{min(scaled(25, arch.depth), max(last, 0))}-{min(scaled(30, arch.depth), last)}"
        )
        if last < 0 or max(parse_layers(chosen, arch.depth, "vista: mixed_layers")) > last:
            raise VlmFixError(f"vista: mixed_layers={chosen!r} must end before the last layer, {arch.depth - 1}.")
        return dataclasses.replace(method, mixed_layers=parse_layers(chosen, arch.depth, "vista"))

    @property
    def row_scope(self) -> RowScope:
        return RowScope(self.prompt_rows)

    @property
    def neutral(self) -> bool:
        return self.lam == 0 and self.alpha == 0

    @property
    def sees(self) -> tuple[int, ...]:
        return self.layers if self.lam else ()  # type: ignore[return-value]

    @property
    def control(self) -> str:
        layers = "|".join(map(str, self.sees))
        return (
            f"random_direction:strength={self.lam:g},prompt_rows={self.prompt_rows},layers={layers}" if layers else ""
        )

    def on_prompt(self, session: Session, call: Call) -> None:
        """Run the two passes."""
        engine, times = engine_of(call.model), session.types.shape[0] // call.batch  # beams repeat each prompt
        image, text = (last_rows(engine, x) for x in (whole_prompt(call, self.name), call.without_images()))
        directions = session.memory(self, VISTAMemory).directions
        for layer in self.sees:
            unit = unit_between(image[layer], text[layer], call.model.dtype)
            directions[layer] = unit.repeat_interleave(times, dim=0)[:, None]

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        v = rows.memory(VISTAMemory).directions[rows.layer].to(x.device)
        return pushed(x, v, self.lam, gate=Gate("away"))

    @property
    def exits(self) -> tuple[int, ...]:
        return tuple(i + 1 for i in self.mixed_layers or ()) if self.alpha else ()  # type: ignore[operator]

    @property
    def edits_logits(self) -> bool:
        return self.alpha > 0

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        late = sum(step.exit(i, norm=False).to(l.device) for i in self.exits) / len(self.exits)
        mixed = ((1 - self.alpha) * l + self.alpha * late).masked_fill(torch.isinf(l), -torch.inf)
        return torch.where(step.session.shown(l.device), mixed, l)
