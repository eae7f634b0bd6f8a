"""The vision tower run once more beside a call: on other pixels, or on pixels that are made to mislead it."""

from __future__ import annotations

import zlib

import torch
from torch.nn.functional import cosine_similarity

from vlm_fix.call import Call
from vlm_fix.families import get_part
from vlm_fix.pruning.encoder import ImageTokens
from vlm_fix.wing import engine_of


def parted(pixels: torch.Tensor, call: Call) -> torch.Tensor:
    """Images [n, 3, H, W] or Qwen-VL's patches [S, 3 T P P] -> [n or S, 3, T, ...], T temporal copies of a patch, else 1."""
    frames = getattr(call.model.config.vision_config, "temporal_patch_size", 1) if pixels.dim() == 2 else 1
    return pixels.reshape(len(pixels), 3, frames, -1)


def looked(call: Call, pixels: torch.Tensor, grid: torch.Tensor | None) -> list[ImageTokens]:
    """What the vision tower says of images [n, 3, H, W], or of patches [S, 3 T P P] with their grids [n, 3]."""
    engine, other = engine_of(call.model), Call(call.model, call.family, {})
    tower, outer, engine.call = get_part(call.model, call.family.vision), engine.call, other
    try:
        if grid is None:
            tower(pixels, output_hidden_states=True, return_dict=True)
        else:
            tower(pixels, grid_thw=grid)
    finally:
        engine.call = outer
    return other.views


def features(call: Call, pixels: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
    """x [N, ...] of one image, as the projector gets them, each token as one row; gradients flow to the pixels."""
    (image,) = looked(call, pixels, grid)
    assert image.raw is not None
    return image.raw().flatten(1)


def misled(
    call: Call,
    v: torch.Tensor,
    grid: torch.Tensor | None,
    epsilon: float,
    scale: float,
    steps: int,
    lr: float,
    seed: int,
) -> torch.Tensor:
    """One image v [1, 3, H, W], or its patches [S, 3 T P P] and grid [3] -> v' = clip(v + scale d), laid out like v.

    Adam on d, at first U(-lr, lr), |d| <= epsilon, lowers mean_i cos(x_i(v'), x_i(v)) until it is below 0.
    """
    place = zlib.crc32(v.detach().float().cpu().contiguous().numpy().tobytes(), seed)
    grids = None if grid is None else grid[None]
    with torch.inference_mode(False), torch.enable_grad():
        x = parted(v.detach().clone().to(torch.promote_types(v.dtype, torch.float32)), call)
        low, high = x.min(), x.max()
        d = torch.rand(x[:, :, :1].shape, generator=torch.Generator().manual_seed(place)).to(x)
        d, m, s = lr * (2 * d - 1), torch.zeros_like(d), torch.zeros_like(d)

        def moved(d: torch.Tensor) -> torch.Tensor:
            return (x + scale * d).clamp(low, high).view(v.shape).to(v)

        clean = features(call, v.detach().clone(), grids).detach()
        for step in range(1, steps + 1):
            d = d.detach().clamp(-epsilon, epsilon).requires_grad_()
            near = cosine_similarity(features(call, moved(d), grids), clean, dim=1).mean()
            if float(near.detach()) < 0:
                break
            (g,) = torch.autograd.grad(near, d)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            d = d.detach() - lr * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        return moved(d.detach().clamp(-epsilon, epsilon))
