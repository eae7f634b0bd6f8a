"""Which query rows of a forward a method acts in."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch


class RowScope(enum.Enum):
    """The rows a method acts in; decode rows, which follow the prompt, are in every scope."""

    LAST = "last"  # the prompt's last row, which predicts the first new token
    AFTER_IMAGE = "after_image"  # also the prompt's rows after its last image
    ALL = "all"  # every row of the prompt


class RowRange(NamedTuple):
    """The rows of one forward that are in a scope: in sample b, those from `starts[b]` on, up to `end`."""

    starts: tuple[int, ...]
    end: int

    @property
    def first(self) -> int:
        """The first row that is in the range for any sample; `end` or more if there is none."""
        return min(self.starts)

    def mask(self, first: int, device: torch.device) -> torch.Tensor | None:
        """[B, end - first] booleans of the rows from `first` on; None if all of them are in the range."""
        if max(self.starts) <= first:
            return None
        starts = torch.tensor(self.starts, device=device)
        return torch.arange(first, self.end, device=device)[None] >= starts[:, None]
