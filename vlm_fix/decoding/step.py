"""What an edit of the next-token distribution sees of a step."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlm_fix.call import Call
from vlm_fix.families import image_token_ids, split_pixels
from vlm_fix.session import Session
from vlm_fix.wing import Host

from .head import Head


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
    """The pixels of each prompt's images, image by image (or tile by tile)."""
    ids, pixels = call.inputs["input_ids"], call.inputs.get("pixel_values")
    found: list[list[torch.Tensor]] = [[] for _ in ids]
    if pixels is None or not len(pixels):
        return found
    if call.family.crosses:  # [rows, images, tiles, 3, H, W], blank where there is none
        return [list(row[(row != 0).flatten(-3).any(dim=-1)]) for row in pixels.detach()]
    images, along = split_pixels(call.inputs, pixels)
    token = image_token_ids(call.model, call.family)[0]
    shown = (ids == token) & call.inputs["attention_mask"].bool()
    ends = shown.sum(dim=1).cumsum(dim=0).cpu()  # an image has tokens in proportion to its pixels
    share, start = float(ends[-1]) / sum(image.shape[along] for image in images), 0
    for image in images:
        row = int(torch.searchsorted(ends, (start + image.shape[along] / 2) * share, right=True))
        if row < len(found):
            found[row].append(image)
        start += image.shape[along]
    return found
