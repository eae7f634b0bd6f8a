"""What an edit of the next-token distribution sees of a step."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.arch import Family
from vlm_fix.call import Call
from vlm_fix.families import image_token_ids, split_pixels
from vlm_fix.session import Session
from vlm_fix.wing import Host

from .head import Head

BY_ROW = ("idefics2", "idefics3", "smolvlm")  # their pixels are [rows, images, 3, H, W], blank where a row has fewer


@dataclass(frozen=True)
class Step:
    """What a `LogitEdit` sees beside the distribution: B' rows (beams and samples lie beside their prompt)."""

    host: Host
    session: Session  # the main branch's, with what an edit that is an AttentionEdit too has seen
    prompts: Callable[[], list[int]]  # a checksum of each prompt, see `fingerprints`
    generated: torch.Tensor  # [B', t]
    seen: dict[int, tuple[torch.Tensor, int]]  # layer -> rows [B', n, C], generated tokens before the first
    head: Head

    @property
    def index(self) -> int:
        """Number of generated tokens."""
        return self.generated.shape[1]

    def seeds(self, seed: int) -> list[int]:
        """One per row, from `seed`, the row's images and tokens: the same whatever else is in the batch."""
        base = self.prompts()
        times = len(self.generated) // len(base)
        rows = self.generated.cpu().numpy()
        return [zlib.crc32(f"{seed},{base[i // times]}".encode() + row.tobytes()) for i, row in enumerate(rows)]

    def state(self, layer: int) -> torch.Tensor:
        """[B', C] the input of `layer` in the row that predicts."""
        rows, first = self.seen[layer]
        return rows[:, self.index - first]

    def exit(self, layer: int, norm: bool) -> torch.Tensor:
        """[B', V] float32 logits of the input of `layer`, through the final norm (if asked) and all that follows it."""
        return self.head(self.state(layer), norm).float()


def fingerprints(call: Call) -> list[int]:
    """A checksum of each prompt: its images' pixels and its tokens without padding."""
    ids, mask = call.inputs["input_ids"], call.inputs["attention_mask"].bool()
    sums = [zlib.crc32(row[keep].cpu().numpy().tobytes()) for row, keep in zip(ids, mask, strict=True)]
    for row, images in enumerate(images_of_rows(call)):
        for image in images:
            sums[row] = checksum(image, sums[row])
    return sums


def checksum(image: torch.Tensor, start: int = 0) -> int:
    """Of an image's pixels as generate gets them."""
    return zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes(), start)


def images_of_rows(call: Call) -> list[list[torch.Tensor]]:
    """The pixels of each prompt's images, image by image (or tile by tile), without what pads them in their batch."""
    inputs, family = call.inputs, call.family
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
    found: list[list[torch.Tensor]] = [[] for _ in ids]
    if pixels is None or not len(pixels):
        return found
    if family.crosses:  # [rows, images, tiles, 3, H, W], blank where there is none
        return [list(row[(row != 0).flatten(-3).any(dim=-1)]) for row in pixels.detach()]
    if family.name in BY_ROW:
        mask = inputs.get("pixel_attention_mask")
        masks = torch.ones_like(pixels[:, :, 0]) if mask is None else mask
        pairs = [zip(row, masks[i], strict=True) for i, row in enumerate(pixels.detach())]
        return [[_corner(image, real) for image, real in row if bool((image != 0).any())] for row in pairs]
    images = [_unpadded(inputs, family, i, x) for i, x in enumerate(split_pixels(inputs, pixels)[0])]
    shown = (ids == image_token_ids(call.model, family)[0]) & inputs["attention_mask"].bool()
    ends = shown.sum(dim=1).cumsum(dim=0).cpu()  # an image has tokens in proportion to its pixels
    share, start = float(ends[-1]) / sum(image.numel() for image in images), 0
    for image in images:
        row = int(torch.searchsorted(ends, (start + image.numel() / 2) * share, right=True))
        if row < len(found):
            found[row].append(image)
        start += image.numel()
    return found


def _unpadded(inputs: dict[str, Any], family: Family, i: int, image: torch.Tensor) -> torch.Tensor:
    """Image i [1, ...] of a batch without the padding that brought it to the size of the batch's largest."""
    mask, places = inputs.get("pixel_attention_mask", inputs.get("pixel_mask")), inputs.get("image_position_ids")
    if image.dim() == 5:  # [1, tiles, 3, H, W]
        return image[(image != 0).flatten(-3).any(dim=-1)]
    if family.cells == "placed" and places is not None:  # patches with (x, y), -1: padding
        return image[:, (places[i] >= 0).all(dim=-1)]
    if family.cells == "sizes" and inputs.get("image_sizes") is not None:
        h, w = inputs["image_sizes"][i].tolist()
        return image[..., :h, :w]
    if mask is None or len(mask) <= i:
        return image
    real = mask[i].bool()
    if real.dim() == 1 and real.shape[0] == image.shape[1]:
        return image[:, real]
    return _corner(image, real) if real.shape == image.shape[-2:] else image


def _corner(image: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The upper left part of an image [..., H, W] where `real` [H, W] is not 0."""
    return image[..., : int(real.any(dim=1).sum()), : int(real.any(dim=0).sum())]
