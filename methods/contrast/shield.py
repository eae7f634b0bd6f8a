"""SHIELD: the vision tower's own bias subtracted, and a contrast with an attacked image (Huang et al., ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, VlmFixError, param
from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.families import split_pixels
from vlm_fix.inputs import InputEdit
from vlm_fix.pruning.encoder import ImageTokens, shown_tokens, views
from vlm_fix.session import VISUAL, Session
from vlm_fix.wing import engine_of

from .tower import looked, misled, parted


@dataclass(frozen=True)
class SHIELD(InputEdit, Contrast):
    """Takes from each image token what the tower says of pure noise, and contrasts with an image made to mislead the tower.

    x [N, Cv]: the features before the projector M; b [N, Cv]: their mean over `samples` images of U(0, 1) at each normalised
    pixel, of the same size. The answer sees M(x - bias b). The other branch sees the image v' = clip(v + scale d): `steps` of
    Adam with `lr` on the pixels' d, |d| <= epsilon, lower sim(v') = mean_i cos(x_i(v'), x_i(v)), until it is below 0.
    z = (1 + alpha) l - alpha l', tokens with p < beta max p cut off.

    Source: arXiv 2510.16596; official code hukcc/SHIELD@0a60786 (bias .1 on POPE, .01 on CHAIR and MME; 32 samples; alpha 2,
    on MME .5; beta .35, on MME .5; epsilon .14, 30 steps, scale 12, lr .14 on POPE, else .02: here POPE's).
    Left out, as they need CLIP's text tower and a caption of the image that the model wrote before: the re-weighting of
    tokens by their likeness to the caption, and the caption's words behind the image. The official attack lowers CLIP's
    likeness of image and caption; here it lowers the tower's own likeness to what it saw, beginning from d ~ U(-lr, lr),
    since at d = 0 nothing would move; from the same beginning and with this likeness both end within 5e-7 of the image's
    range. Deviations: v' is clipped to the least and largest value of the image itself, not to the processor's black and
    white. Noise belongs to the size (the official one is drawn once and kept), the beginning of an attack to the image, both
    to `seed`, and each image is attacked alone, so that batching changes nothing. Qwen-VL: both temporal copies of a patch
    get the same; the features of several depths that Qwen3-VL adds later keep their bias. Images only: a prompt with a video
    is refused.
    """

    name: ClassVar[str] = "shield"
    kind: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.16596"
    on_logits: ClassVar[bool] = True
    own_keys: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.5, 1.0)}

    alpha: float = param(2.0, "contrast strength; 0: no attack", low=0)
    beta: float = param(0.35, "plausibility cut-off", low=0, high=1)
    bias: float = param(0.1, "share of the tower's answer to noise that is subtracted", low=0)
    samples: int = param(32, "images of noise", low=1)
    epsilon: float = param(0.14, "largest change of a pixel, before `scale`", low=0)
    scale: float = param(12.0, "factor on the change of the normalised pixels", low=0)
    steps: int = param(30, "steps of the attack", low=1)
    lr: float = param(0.14, "step size of the attack", above=0)
    seed: int = param(0, "seed of the noise and of the attack's beginning", low=0, high=2**32 - 1)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.bias == 0

    @property
    def contrasts(self) -> bool:
        return self.alpha > 0

    @property
    def prepares(self) -> bool:
        return self.bias > 0

    @property
    def previews(self) -> bool:
        return False

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        return ()

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        new = session.types[:, session.start :] == VISUAL
        if session.branch != "main" or session.start >= session.prompt_len or not bool(new.any()):
            return kwargs
        session.need_whole_prompt(self.name)
        call, embeds = session.call, kwargs["inputs_embeds"]
        self.check(call)
        images, known = views(call), dict[tuple[int, ...], torch.Tensor]()
        shown, features = shown_tokens(call, images, self.name), list[torch.Tensor]()
        for image in images:
            assert image.pixels is not None and image.raw is not None and image.project is not None
            size = (*image.pixels.shape, *image.grid)
            known[size] = known[size] if size in known else self.noise(call, image)
            features.append(image.project(image.raw().float() - self.bias * known[size]))
        places = session.on_images(shown + 1, engine_of(call.model).tokens)[:, -embeds.shape[1] :].to(embeds.device)
        changed = torch.cat(features).to(embeds)[(places - 1).clamp(min=0)]
        return {**kwargs, "inputs_embeds": torch.where((places > 0)[..., None], changed, embeds)}

    def check(self, call: Call) -> None:
        if call.inputs.get("pixel_values") is None or call.inputs.get("pixel_values_videos") is not None:
            raise VlmFixError("shield needs pixel_values of images, and no video; pass a video's frames as images.")

    @torch.no_grad()
    def noise(self, call: Call, image: ImageTokens) -> torch.Tensor:
        """b [N, ..., Cv] of an image of this size, float32."""
        assert image.pixels is not None
        generator, grid = torch.Generator().manual_seed(self.seed), None
        drawn = torch.rand(self.samples, *image.pixels.shape, generator=generator)
        if image.pixels.dim() == 2:
            drawn = parted(drawn.flatten(0, 1), call)
            drawn = drawn[:, :, :1].expand_as(drawn).flatten(1)
            merge = call.model.config.vision_config.spatial_merge_size
            size = (image.frames, image.grid[0] // image.frames * merge, image.grid[1] * merge)
            grid = torch.tensor([size] * self.samples, device=image.pixels.device)
        seen = looked(call, drawn.to(image.pixels), grid)
        return torch.stack([one.raw().float() for one in seen if one.raw]).mean(dim=0)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        self.check(call)
        return call.with_pixels(lambda pixels: self.attacked(pixels, call))

    def attacked(self, pixels: torch.Tensor, call: Call) -> torch.Tensor:
        """pixel_values as a processor makes them -> the same, each image attacked."""
        images, dim = split_pixels(call.inputs, pixels)
        grids, how = (
            call.inputs.get("image_grid_thw", [None] * len(images)),
            (self.epsilon, self.scale, self.steps, self.lr),
        )
        made = [misled(call, v, grid, *how, seed=self.seed) for v, grid in zip(images, grids, strict=True)]
        return torch.cat(made, dim=dim)

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)
