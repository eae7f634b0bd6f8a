"""The base class of methods that drop image tokens before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix.arch import Arch
from vlm_fix.method import Method, param


@dataclass(frozen=True)
class TokenPruner(Method):
    """Drops visual tokens before the language model."""

    kind: ClassVar[str] = "pruning"
    keep: float | None = param(None, "visual tokens kept per image: a count (> 1) or a share in (0, 1]", above=0)
    positions: str | None = param(
        None, "position ids of what is kept: re-numbered or as before (family default)", choices=("compact", "original")
    )

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        """Vision layers whose attention column scores `select` needs."""
        return ()

    def shrink(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Grid of tokens (h, w) of an image -> the grid that the vision tower shall make of it; for a smaller image."""
        return grid

    def select(self, image: Any) -> torch.Tensor:
        """`pruning.encoder.ImageTokens` of one image -> indices of the kept tokens, ascending."""
        raise NotImplementedError

    @classmethod
    def edits(cls, what: str) -> bool:
        """True if the class overwrites `what`."""
        return getattr(cls, what) is not getattr(TokenPruner, what)

    def budget(self, tokens: int) -> int:
        """Number of tokens kept out of `tokens`."""
        keep = 1.0 if self.keep is None else self.keep
        return max(1, min(tokens, round(keep * tokens) if keep <= 1 else int(keep)))
