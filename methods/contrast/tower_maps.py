"""A vision tower's attention made counterfactual, as a factor for each image token."""

from __future__ import annotations

import zlib

import torch
from torch.nn.functional import interpolate

from vlm_fix.pruning.encoder import ImageTokens


def map_of(image: ImageTokens, layer: int, how: str, seed: int) -> torch.Tensor:
    """[N] float32 factors of one image's N tokens; a video's frames each have a map of their own."""
    assert image.pixels is not None
    frames, pixels = image.heads[layer], image.pixels.detach().float().cpu().contiguous().numpy()
    generator = torch.Generator().manual_seed(zlib.crc32(pixels.tobytes(), seed))
    size, maps = (image.grid[0] // len(frames), image.grid[1]), []
    for query, key, scale in frames:  # one for an image
        total = torch.zeros(size, device=query.device)
        for q, k in zip(query.float(), key.float(), strict=True):  # S x S for one head at a time
            a = edited((q @ k.T * scale).softmax(dim=-1), how, generator)
            total += interpolate(a[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        maps.append((total / len(query)).flatten())
    return torch.cat(maps)


def edited(a: torch.Tensor, how: str, generator: torch.Generator) -> torch.Tensor:
    """One head's attention [S, S] of the tower -> the same, counterfactual."""
    if how == "shuffle":
        return a.flatten()[torch.randperm(a.numel(), generator=generator).to(a.device)].view_as(a)
    if how == "random":
        return 2 * torch.rand(a.shape, generator=generator).to(a.device)
    return a.max() - a if how == "reversed" else a.mean().expand_as(a)
