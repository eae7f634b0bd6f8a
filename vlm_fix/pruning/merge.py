"""Pruners that add what they drop to what they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .encoder import ImageTokens
from .kinds import TokenPruner


@dataclass(frozen=True)
class TokenMerger(TokenPruner):
    """A TokenPruner that also changes the features of the tokens it keeps."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("reduce",),)

    def reduce(self, image: ImageTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """One image -> indices of the kept tokens [n], ascending, and their new features [n, C]."""
        raise NotImplementedError

    def select(self, image: ImageTokens) -> torch.Tensor:
        return self.reduce(image)[0]


def nearest(x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """[n, C], [m, C] -> [n]: for each row of `x` the row of `to` with the highest cosine, the first of equals."""
    x, to = (torch.nn.functional.normalize(v.float(), dim=-1) for v in (x, to))
    return (x @ to.T).argmax(dim=-1)


def means(x: torch.Tensor, home: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, ...] rows that go to groups `home` [n] -> the groups' means [count, ...] in float32, 0 for none, and sizes [count]."""
    home = home.to(x.device)
    size = torch.bincount(home, minlength=count)
    flat = x.float().reshape(len(x), x.shape[1:].numel())
    total = torch.zeros(count, flat.shape[1], device=x.device).index_add(0, home, flat)
    return (total / size.clamp(min=1)[:, None]).view(count, *x.shape[1:]), size
