"""RITUAL, random image transformations as a complement (Woo et al., 2024)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.method import Method
from vlm_fix.methods.procedures.pixels import changed, normalisation

from .transforms import COLOURS, TRANSFORMS, Draw


@dataclass(frozen=True)
class Ritual(Contrast):
    """Adds what a second look at the image, turned, cropped or coloured anew, says.

    Each image gets one of `transforms`, drawn once. z = log p + alpha log p', tokens with p < beta max p cut off; p' sees
    the transformed image. It is no contrast: what both branches find likely wins.

    horizontal_flip, vertical_flip; rotation by U(-180, 180) degrees; color_jitter: brightness, contrast and saturation
    times U(0, 2) and hue + U(-.5, .5), in a random order; blur: a Gaussian of U(1.5, 2) pixels over 13; crop: U(.08, 1) of
    the area, at the image's size.

    Source: arXiv 2405.17821; official code sangminwoo/RITUAL@52065a6 (alpha 3, beta .1, the six transforms alike).
    Deviations: there the file is transformed before the processor, here its pixels after it: turned and cropped squares,
    colours through the processor's mean and std, a blur in pixels of the processed size. What is drawn depends on `seed` and
    the image, so that batching changes nothing. A processor's tiles are transformed each for itself. RITUAL+, which asks the
    model what transform to take, is left out.
    """

    name: ClassVar[str] = "ritual"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.17821"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (1.0, 2.0)}

    alpha: float = param(3.0, "weight of the transformed image's logits", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    transforms: tuple[str, ...] = param(tuple(TRANSFORMS), f"what to draw from: {', '.join(TRANSFORMS)}")
    seed: int = param(0, "seed of what is drawn", low=0, high=2**32 - 1)
    mean: tuple[float, ...] | None = param(None, "mean of each channel, as the image processor subtracts it")
    std: tuple[float, ...] | None = param(
        None, "standard deviation of each channel, as the image processor divides by it"
    )

    def resolve(self, arch: Arch) -> Method:
        unknown = [name for name in self.transforms if name not in TRANSFORMS]
        if unknown or not self.transforms:
            raise VlmFixError(f"ritual: transforms={'|'.join(self.transforms)} must be some of {'|'.join(TRANSFORMS)}.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise VlmFixError(f"ritual: {name}={value} must hold one number for each of the 3 channels.")
        return super().resolve(arch)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def negative(self, call: Call) -> dict[str, Any]:
        mean, std = self.colours(call.model.config.name_or_path)

        def change(image: torch.Tensor) -> torch.Tensor:
            draw = Draw(zlib.crc32(image.numpy().tobytes(), self.seed))
            transform = TRANSFORMS[self.transforms[draw.below(len(self.transforms))]]
            return (transform(image * std + mean, draw) - mean) / std

        return {**call.inputs, "pixel_values": changed(call, change, self.name)}

    def colours(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std [3, 1, 1] of the image processor; 0 and 1 where no transform has to know them."""
        needed = any(name in COLOURS for name in self.transforms)
        found = normalisation(path) if needed and not (self.mean and self.std) else ((0.0,) * 3, (1.0,) * 3)
        if found is None:
            raise VlmFixError(
                f"ritual needs the model's image processor to know colours, but {path!r} has none: load the model from its "
                "directory or hub name, give mean= and std= of each channel, or take other transforms than "
                f"{' and '.join(COLOURS)}."
            )
        mean, std = self.mean or found[0], self.std or found[1]
        return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible(l + self.alpha * l_neg, l, self.beta)
