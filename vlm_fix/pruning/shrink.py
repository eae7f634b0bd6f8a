"""Fewer visual tokens by a smaller image: the vision tower itself sees fewer patches.

The prompt still has one placeholder per token of the whole image, so the few features are put at evenly spaced places of
the full grid, and the pruning hooks drop the other places: masks, positions and caches then follow as for any pruner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import interpolate

from vlm_fix.errors import VlmFixError
from vlm_fix.families import get_part

from .encoder import ImageTokens

Grid = tuple[int, int]


def places(grid: Grid, small: Grid) -> torch.Tensor:
    """Indices, in a grid of h x w, of the centres of h' x w' equal fields; ascending, h' w' of them."""
    (h, w), (rows, columns) = grid, small
    y = (2 * torch.arange(rows) + 1) * h // (2 * rows)
    x = (2 * torch.arange(columns) + 1) * w // (2 * columns)
    return (y[:, None] * w + x).flatten()


def install(engine: Any, shrink: Callable[[Grid], Grid]) -> Iterator[Any]:
    """Hooks that give the vision tower images of `shrink(grid)` tokens instead of `grid`, and note them for the pruner."""
    tower = get_part(engine.model, engine.family.vision)
    encoder: Any = {"clip": Clip, "qwen": QwenVL}[engine.family.encoder](engine.model, shrink)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return encoder.before(args, kwargs) if running() else (args, kwargs)

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = running()
        if call is not None:
            call.vision += encoder.after(output)
        return output

    def running() -> Any:
        """The call whose images are made smaller; None in a method's own pass, which sees them as they are."""
        session = engine.session
        return None if session and session.plain else engine.call or (session and session.call)

    yield tower.register_forward_pre_hook(before, with_kwargs=True)
    yield tower.register_forward_hook(after, with_kwargs=True)


def spread(x: torch.Tensor, index: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """x with n entries along `dim` -> `size` entries, those of x at `index`, zeros elsewhere."""
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy(dim, index.to(x.device), x)


class Clip(threading.local):
    """Square towers with learned position embeddings: these are interpolated, as transformers does it.

    Of both classes each thread has its own state: that of the tower's run in it.
    """

    def __init__(self, model: Any, shrink: Callable[[Grid], Grid]):
        self.model, self.shrink, self.patch = model, shrink, model.config.vision_config.patch_size

    def before(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pixels = args[0] if args else kwargs["pixel_values"]
        self.pixels, self.grid = pixels, (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        self.small = self.shrink(self.grid)
        small = resize(pixels, (self.small[0] * self.patch, self.small[1] * self.patch))
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        return ((small, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": small})

    def after(self, output: Any) -> list[ImageTokens]:
        full, index = self.grid[0] * self.grid[1], places(self.grid, self.small)
        extra = output.last_hidden_state.shape[1] - len(index)  # the class token

        def widen(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :extra], spread(x[:, extra:], index, full, 1)], dim=1)

        output.last_hidden_state = widen(output.last_hidden_state)
        output.hidden_states = tuple(
            None if x is None else widen(x) for x in output.hidden_states
        )  # None: not asked for
        return [ImageTokens(self.grid, {}, chosen=index, pixels=pixels) for pixels in self.pixels]


class QwenVL(threading.local):
    """Packed patches: put together to an image, resized, cut up again."""

    def __init__(self, model: Any, shrink: Callable[[Grid], Grid]):
        self.tower, self.shrink = model.model.visual, shrink

    def before(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        patches = args[0] if args else kwargs["hidden_states"]
        name = "grid_thw"
        sizes = (kwargs[name] if name in kwargs else args[1]).tolist()
        if any(t != 1 for t, _, _ in sizes):
            raise VlmFixError("downsample_image works on images; for a video, pass fewer or smaller frames.")
        merge, patch = self.tower.spatial_merge_size, self.tower.config.patch_size
        self.grids = [(h // merge, w // merge) for _, h, w in sizes]
        self.smalls = [self.shrink(grid) for grid in self.grids]
        self.pixels, made = patches.split([t * h * w for t, h, w in sizes]), []
        for x, (h, w), (h2, w2) in zip(self.pixels, self.grids, self.smalls, strict=True):
            side = merge * patch
            image = resize(to_image(x, (h, w), merge, patch)[None], (h2 * side, w2 * side))[0]
            made.append(to_patches(image, merge, patch))
        grid_thw = torch.tensor([[1, h * merge, w * merge] for h, w in self.smalls], device=patches.device)
        return (torch.cat(made),), {**{k: v for k, v in kwargs.items() if k != "hidden_states"}, name: grid_thw}

    def after(self, output: Any) -> list[ImageTokens]:
        index = [places(grid, small) for grid, small in zip(self.grids, self.smalls, strict=True)]

        def widen(features: torch.Tensor) -> torch.Tensor:
            parts = zip(features.split([h * w for h, w in self.smalls]), index, self.grids, strict=True)
            return torch.cat([spread(x, i, h * w, 0) for x, i, (h, w) in parts])

        output.pooler_output = widen(output.pooler_output)
        if getattr(output, "deepstack_features", None):
            output.deepstack_features = [widen(x) for x in output.deepstack_features]
        return [
            ImageTokens(grid, {}, chosen=i, pixels=p) for grid, i, p in zip(self.grids, index, self.pixels, strict=True)
        ]


def resize(pixels: torch.Tensor, size: Grid) -> torch.Tensor:
    """[n, C, H, W] -> [n, C, *size], bicubic with antialiasing, in float32."""
    if pixels.shape[-2:] == torch.Size(size):
        return pixels
    return interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False).to(pixels.dtype)


def to_image(patches: torch.Tensor, grid: Grid, merge: int, patch: int) -> torch.Tensor:
    """Qwen-VL's packed patches of an image of h x w tokens -> [channels and frames, pixels, pixels]."""
    h, w = grid
    image = patches.view(h, w, merge, merge, -1, patch, patch).permute(4, 0, 2, 5, 1, 3, 6)
    return image.reshape(-1, h * merge * patch, w * merge * patch)


def to_patches(image: torch.Tensor, merge: int, patch: int) -> torch.Tensor:
    """The inverse of `to_image`."""
    depth, height, width = image.shape
    h, w = height // (merge * patch), width // (merge * patch)
    packed = image.view(depth, h, merge, patch, w, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    return packed.reshape(h * w * merge**2, -1)
