"""What a user points at in an image, as weights of its image tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import adaptive_max_pool2d

from vlm_fix import VlmFixError
from vlm_fix.families import image_token_ids
from vlm_fix.images import read_image
from vlm_fix.session import Session
from vlm_fix.wing import engine_of

from .pictures import ONE_RUN
from .pixels import cells_of


def pointed(method: Any, session: Session) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, n] each: the columns of the image that is pointed at, and m."""
    call = session.call
    if call.family.cells not in ONE_RUN:
        raise VlmFixError(
            f"{method.name} needs images that are one run of tokens, not tiles or from a resampler ({call.family.name})."
        )
    ids, tokens = call.inputs["input_ids"], engine_of(call.model).tokens
    ends = (
        torch.isin(ids, torch.tensor(image_token_ids(call.model, call.family), device=ids.device))
        .sum(dim=1)
        .cumsum(dim=0)
    )
    chosen, weights, seen = torch.zeros(int(ends[-1])), torch.zeros(int(ends[-1])), dict[int, int]()
    for cells in cells_of(call):
        row = int(torch.searchsorted(ends, int(cells.max()), right=True))
        seen[row] = seen.get(row, -1) + 1
        if seen[row] == method.image:
            chosen[cells], weights[cells] = 1.0, of(method, (cells.shape[0], cells.shape[1]))
    if not chosen.any():
        raise VlmFixError(
            f"control_mllm: image={method.image} is pointed at, but no prompt has that many; they count from 0."
        )
    return session.on_images(chosen, tokens).bool(), session.on_images(weights, tokens)


def of(method: Any, size: tuple[int, int]) -> torch.Tensor:
    """[h, w] of an image of these cells, by the one region among the method's `box`, `point`, `scribble` and `mask`."""
    given = [k for k in ("box", "point", "scribble", "mask") if getattr(method, k) is not None]
    if len(given) != 1:
        what = " and ".join(given) or "none"
        raise VlmFixError(
            f"{method.name} takes one region, and got {what}: give one of box=, point=, scribble= and mask=."
        )
    if method.box is not None:
        return of_box(method.box, size, method.cover, method.name)
    if method.mask is not None:
        return of_mask(method.mask, size, method.cover, method.name)
    return of_points(method.point or method.scribble or (), size, method.sigma, method.name)


def of_box(box: tuple[float, ...], size: tuple[int, int], cover: str, name: str) -> torch.Tensor:
    """[h, w] 1 in the cells that the box (left, top, right, bottom, as shares of the image) touches, or whose centre it holds."""
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise VlmFixError(
            f"{name}: box={'|'.join(map(str, box))} must be left|top|right|bottom as shares of the image: 0.1|0.2|0.5|0.6."
        )
    h, w = size
    found = torch.zeros(h, w)
    if cover == "touch":
        spans = [
            (math.floor(a * n + 1e-9), math.ceil(b * n - 1e-9))
            for a, b, n in ((box[1], box[3], h), (box[0], box[2], w))
        ]
        found[slice(*spans[0]), slice(*spans[1])] = 1
        return found
    y, x = ((torch.arange(n) + 0.5) / n for n in size)
    found[((y > box[1]) & (y < box[3]))[:, None] & (x > box[0]) & (x < box[2])] = 1
    return _some(found, name)


def of_mask(path: str, size: tuple[int, int], cover: str, name: str) -> torch.Tensor:
    """The same for an image file whose bright pixels are the region."""
    if not Path(path).is_file():
        raise VlmFixError(f"{name}: there is no mask {path!r}; give an image file whose bright pixels are the region.")
    image = read_image(path, upright=False, mode="L")
    bright = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width) > 127
    if cover == "touch":
        return _some(adaptive_max_pool2d(bright.float()[None], size)[0], name)
    y, x = (((torch.arange(n) + 0.5) / n * side).long() for n, side in zip(size, bright.shape, strict=True))
    return _some(bright[y][:, x].float(), name)


def of_points(points: tuple[float, ...], size: tuple[int, int], sigma: float, name: str) -> torch.Tensor:
    """[h, w] exp(-D^2 / 2 sigma^2) / (sqrt(2) pi sigma), D a cell's distance to the nearest point, from 0 to 1 in the image."""
    if not points or len(points) % 2 or not all(0 <= p <= 1 for p in points):
        raise VlmFixError(f"{name}: points are x|y|x|y|... as shares of the image, and {points} are not.")
    h, w = size
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    each = [((x - px * w) ** 2 + (y - py * h) ** 2).sqrt() for px, py in zip(points[::2], points[1::2], strict=True)]
    d = torch.stack(each).amin(dim=0)
    d = (d - d.min()) / (d.max() - d.min()).clamp(min=1e-9)
    return (-(d**2) / (2 * sigma**2)).exp() / (math.sqrt(2) * math.pi * sigma)


def _some(found: torch.Tensor, name: str) -> torch.Tensor:
    if not found.any():
        raise VlmFixError(f"{name}: the region holds no image token's centre: use cover=touch, or a larger one.")
    return found


def shares(at: list[float], size: tuple[int, int], how: Any) -> list[float]:
    """Coordinates x, y, ... in pixels of a picture -> shares of what the image processor `how` shows the model of it."""
    (width, height), left, top = size, 0.0, 0.0
    if getattr(how, "do_center_crop", False) and "shortest_edge" in (how.size or {}):
        scale = how.size["shortest_edge"] / min(size)
        cut = (how.crop_size["width"] / scale, how.crop_size["height"] / scale)
        left, top = (width - cut[0]) / 2, (height - cut[1]) / 2
        width, height = cut  # type: ignore[assignment]
    found = [(v - (top if i % 2 else left)) / (height if i % 2 else width) for i, v in enumerate(at)]
    if all(not 0 <= v <= 1 for v in found[::2]) or all(not 0 <= v <= 1 for v in found[1::2]):
        raise VlmFixError(
            f"what is pointed at lies outside of what the model is shown of a picture of {size[0]} x {size[1]} pixels."
        )
    return [min(max(v, 0.0), 1.0) for v in found]
