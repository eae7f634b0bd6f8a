"""VTI, visual and textual intervention (Liu et al., ICLR 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Arch, MLPOutputEdit, RowScope, Sample, VisionMLPEdit, VlmFixError, param
from vlm_fix.hidden.push import pushed
from vlm_fix.rows import Rows
from vlm_fix.tensors import Tensors

from .files import Source, of_part
from .masked_images import masked_differences
from .pairs import answer_states

SHARE = 0.1  # the official code's factor on both strengths


@dataclass(frozen=True)
class VTI(MLPOutputEdit, VisionMLPEdit):
    """Turns MLP outputs of decoder and vision tower along directions from truthful captions and from masked images.

        x <- ||x|| n(n(x) + .1 alpha n(d)),  n(x) = x / ||x||
    for each row x [C] of layer l's MLP output with d = text_l [C] and alpha = alpha_text, on all rows, and for token t of the
    tower's layer l with d = vision_l[t] [Cv] and alpha = alpha_vision. `calibrate`:
        text: over pairs i of captions of one image, D_i [depth, C] = last token's layer outputs, truthful less hallucinated
        vision: over images i, D_i [N, Cv] for each layer = its output, mean over `trials` images with `masked` of the
                patches at the image's mean colour, less that of the image itself
        d = mean_i D_i + p,  p the first principal component of the D_i (unit length over all of D, the sign with which the
        largest of its projections is positive)
    A tower whose images differ in size has one direction for all tokens (the mean over them).

    Source: arXiv 2410.15778; official code shengliu66/VTI@bb5dfee: .9 and .9 (README; its scripts default to .8 and 0), 50
    trials, 99 % masked, 50 to 70 COCO pairs. Deviations: its PCA of images reshapes [layers, N, C] to [N, layers C] without
    moving axes, so that components mix; here each layer has its own. Its text PCA also holds the embedding, and the last
    layer's state after the final norm; here layer outputs alone. Masked patches of packed images (Qwen-VL) take the mean
    patch.
    """

    name: ClassVar[str] = "vti"
    kind: ClassVar[str] = "hidden"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.15778"
    calibrates_on: ClassVar[str] = "pairs"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha_text": (0.3, 0.6)}
    row_scope = RowScope.ALL

    file: Source | None = param(
        None, "the directions: safetensors, text.LAYER [C], vision.LAYER [(N,) Cv]; by calibrate"
    )
    alpha_text: float = param(0.9, "strength in the decoder", low=0)
    alpha_vision: float = param(0.9, "strength in the vision tower", low=0)
    masked: float = param(0.99, "calibrate: share of an image's patches that are masked", low=0, high=1)
    trials: int = param(50, "calibrate: masked images that are averaged", low=1)

    def resolve(self, arch: Arch) -> VTI:
        method = super().resolve(arch)
        assert isinstance(method, VTI) and isinstance(method.layers, tuple)
        if method.file is None and not method.neutral:
            raise VlmFixError(
                "vti: the directions of this model are unknown; run `vlm-fix calibrate vti --model NAME --out vti.json` and "
                "pass calibration='vti.json', or name a safetensors file: vti:file=FILE."
            )
        if method.neutral:
            return method
        if self.alpha_vision and not arch.vision_depth:
            raise VlmFixError(
                "vti: the vision tower has no transformer blocks to steer; set alpha_vision=0 to go without."
            )
        if self.layers is not None and not self.alpha_text:
            raise VlmFixError("vti: layers are those of alpha_text, which is 0; leave them out.")
        parts = (
            ("text", self.alpha_text, arch.depth, ("C",)),
            ("vision", self.alpha_vision, arch.vision_depth, ("Cv", "N, Cv")),
        )
        unit = dict[str, torch.Tensor]()
        for part, wanted, depth, shapes in parts:
            unit |= of_part(method.file, self.name, part, depth, shapes) if wanted else {}  # type: ignore[arg-type]
        sizes = {t.shape[-1] for key, t in unit.items() if key.startswith("text.")}
        if sizes - {arch.hidden}:
            raise VlmFixError(
                f"vti: {method.file} is of another model: this one has {arch.hidden} channels, not {max(sizes)}."
            )
        layers = tuple(i for i in method.layers if f"text.{i}" in unit)
        if self.alpha_text and not layers:
            told = ", ".join(map(str, method.layers))
            raise VlmFixError(
                f"vti: {method.file} holds no text direction but zeros, if anything, for the layers {told}."
            )
        return dataclasses.replace(method, layers=layers, file=Tensors(unit))

    @property
    def neutral(self) -> bool:
        return self.alpha_text == 0 and self.alpha_vision == 0

    @property
    def control(self) -> str:
        layers = "|".join(map(str, self.sees))
        return f"random_direction:strength={SHARE * self.alpha_text:g},layers={layers}" if layers else ""

    @property
    def sees(self) -> tuple[int, ...]:
        return self.layers if self.alpha_text else ()  # type: ignore[return-value]

    @property
    def vision_layers(self) -> tuple[int, ...]:
        if not self.alpha_vision or not isinstance(self.file, Tensors):
            return ()
        return tuple(int(key.partition(".")[2]) for key in self.file.named if key.startswith("vision."))

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert isinstance(self.file, Tensors)
        return pushed(x, self.file.on(f"text.{rows.layer}", x.device), SHARE * self.alpha_text)

    def vision_mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        assert isinstance(self.file, Tensors)
        d = self.file.on(f"vision.{layer}", x.device)
        if d.shape[-1] != x.shape[-1] or (d.dim() == 2 and d.shape[0] != x.shape[-2]):
            raise VlmFixError(
                f"vti: vision.{layer} is {list(d.shape)}, but the tower's layer has {list(x.shape[-2:])}: calibrate again on "
                "this model, with images of this size."
            )
        return pushed(x, d, SHARE * self.alpha_vision)

    def calibrate(
        self, model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """file, for the parts whose strength is not 0. Cost: two forwards a pair, `trials` runs of the tower an image."""
        found: dict[str, torch.Tensor] = {}
        if self.alpha_text:
            states = answer_states(model, samples, "last", progress)  # [pairs, 2, depth, C]
            found |= {f"text.{i}": d for i, d in enumerate(direction(states[:, 0] - states[:, 1]))}
        if self.alpha_vision:
            apart = masked_differences(model, samples, self.masked, self.trials, seed, progress)
            found |= {f"vision.{i}": direction(d) for i, d in apart.items()}
        return {"file": Tensors(found)}


def direction(d: torch.Tensor) -> torch.Tensor:
    """[n, ...] differences -> their mean plus their first principal component."""
    mean = d.mean(dim=0)
    u, _, v = torch.linalg.svd((d - mean).flatten(1).double(), full_matrices=False)
    largest = u[:, 0].abs().argmax()
    return mean + (u[largest, 0].sign() * v[0]).to(d.dtype).view_as(mean)
