"""VCD, visual contrastive decoding (Leng et al., CVPR 2024)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import Contrast, VlmFixError, param
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.families import split_pixels


@dataclass(frozen=True)
class VCD(Contrast):
    """Contrasts the next token with what a noised image would give.

    x' = sqrt(abar_t) x + sqrt(1 - abar_t) N(0, 1) on the normalised pixels, once per image, where
    abar = cumprod(1 - beta), beta = sigmoid(linspace(-6, 6, 1000)) (.5e-2 - 1e-5) + 1e-5;
    z = (1 + alpha) log p - alpha log p', tokens with p < beta max p cut off.

    Source: arXiv 2311.16922; official code DAMO-NLP-SG/VCD (alpha 1, beta .1 in the paper, .2 in its scripts; t = 500).
    Deviations: the official code patches sampling only and silently does nothing in greedy or beam search; this works in
    all. The noise of an image is seeded by `seed` and the image itself, so that batching does not change the answer.
    Qwen-VL's two temporal copies of a patch get the same noise, as noise on the image would.
    """

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.16922"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    noise_step: int = param(500, "diffusion step t of the noise", low=0, high=999)
    seed: int = param(0, "seed of the noise", low=0, high=2**32 - 1)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        if call.inputs.get("pixel_values") is None:
            raise VlmFixError("vcd needs pixel_values to noise them; pass the processor's output to generate.")
        return call.with_pixels(lambda pixels: self.noised(pixels, call))

    def noised(self, pixels: torch.Tensor, call: Call) -> torch.Tensor:
        """Normalised pixels [n, 3, H, W], or Qwen-VL's flattened patches [sum thw, 3 * T * P * P] -> the same, noised."""
        keep, noise = coefficients(self.noise_step)
        grid = call.inputs.get("image_grid_thw")
        images, dim = split_pixels(call.inputs, pixels)
        frames = getattr(call.model.config.vision_config, "temporal_patch_size", 1) if grid is not None else 1
        result = []
        for image in images:
            host = image.detach().float().cpu().contiguous()
            generator = torch.Generator().manual_seed(zlib.crc32(host.numpy().tobytes(), self.seed))
            if frames > 1:
                patches = host.view(len(host), 3, frames, -1)
                eps = torch.randn(patches[:, :, :1].shape, generator=generator).expand_as(patches).reshape(host.shape)
            else:
                eps = torch.randn(host.shape, generator=generator)
            result.append((keep * host + noise * eps).to(image))
        return torch.cat(result, dim=dim)

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)


def coefficients(step: int) -> tuple[float, float]:
    """(sqrt(abar_t), sqrt(1 - abar_t)); t = 500 gives (.863, .505)."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    abar = torch.cumprod(1 - betas, dim=0)[step]
    return float(abar.sqrt()), float((1 - abar).sqrt())
