"""Which columns of a prompt show which image, and what is left of a prompt after pruning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class ImageColumns:
    """A session part: the images behind the image columns of a prompt."""

    images: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int16))
    """[B, n] which image of its row a column shows, from 1; 0: none"""
    vision: list[list[Any]] = field(default_factory=list)  # per row, its images as the tower saw them (ImageTokens)
    newlines: list[list[tuple[int, int]]] = field(default_factory=list)  # per row: where image rows start and end


@dataclass
class Kept:
    """What is left of a prompt: its mask [B, n], the last position id [..., B, 1], and its length before pruning.

    `index` [B, n] are the kept columns' places in the whole prompt.
    """

    mask: torch.Tensor
    last_position: torch.Tensor
    full_length: int
    index: torch.Tensor

    def repeat(self, times: int) -> None:
        """Repeat every row for beams, in place."""
        self.mask = self.mask.repeat_interleave(times, dim=0)
        self.index = self.index.repeat_interleave(times, dim=0)
        self.last_position = self.last_position.repeat_interleave(times, dim=-2)

    def take(self, rows: torch.Tensor) -> Kept:
        """The given rows."""
        mask, index, last = self.mask[rows], self.index[rows], self.last_position.index_select(-2, rows)
        return dataclasses.replace(self, mask=mask, index=index, last_position=last)
