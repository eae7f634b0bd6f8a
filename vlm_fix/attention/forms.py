"""Edits of one decode row in a form that one launch can run: slopes and biases by column, and gains of groups of columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class ScoreForm(NamedTuple):
    """A change of scores that looks at no other score: z <- (up if z >= 0 else down) z + bias.

    Each broadcasts to [B, H, 1, K]; None: 1, 1 and 0. Like a log-weight, the bias is added after all slopes of a stack.
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None  # None: `up`
    bias: torch.Tensor | None = None

    def then(self, other: ScoreForm) -> ScoreForm:
        """This change, and `other` after it."""
        up, down = other.slopes(self.up, self.down)
        biases = [own for own in (self.bias, other.bias) if own is not None]
        return ScoreForm(up, down, biases[0] + biases[1] if len(biases) == 2 else biases[0] if biases else None)

    def slopes(self, up: torch.Tensor | None, down: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The slopes of this change after one with the slopes up and down."""
        if up is None or self.up is None:
            return (self.up, self.down) if up is None else (up, down)
        first, second = (up, up if down is None else down), (self.up, self.up if self.down is None else self.down)
        if down is None and self.down is None:
            both = up * self.up
            return torch.where(up >= 0, both, both), None
        return (
            first[0] * torch.where(first[0] >= 0, *second),  # z >= 0: a negative slope turns it to the other side
            first[1] * torch.where(first[1] >= 0, second[1], second[0]),
        )

    def of(self, z: torch.Tensor) -> torch.Tensor:
        """The changed scores [B, H, R, K]."""
        if self.up is not None:
            z = z * (self.up if self.down is None else torch.where(z >= 0, self.up, self.down))
        return z if self.bias is None else z + self.bias

    def widened(self, width: int) -> ScoreForm:
        """The same for up to `width` columns, of which the new ones keep their scores."""

        def wide(x: torch.Tensor | None, value: float) -> torch.Tensor | None:
            if x is None or x.shape[-1] in (1, width):
                return None if x is None else x.float().contiguous()
            return torch.nn.functional.pad(x.float(), (0, width - x.shape[-1]), value=value)

        return ScoreForm(wide(self.up, 1.0), wide(self.down, 1.0), wide(self.bias, 0.0))


class MassForm(NamedTuple):
    """A change of weights by the mass of groups of columns: a_j <- gain_g a_j for the columns j of group g.

    groups [B, 1 or H, G, K] 0 or 1, no column in two of them; gains(masses [B, H, G]) -> [B, H, G].
    """

    groups: torch.Tensor
    gains: Callable[[torch.Tensor], torch.Tensor]
