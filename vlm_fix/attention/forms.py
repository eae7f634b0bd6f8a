"""Edits of one decode row in a form that one launch can run: slopes and biases by column, weights that move between columns."""

from __future__ import annotations

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
            return up * self.up, None
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


class Condition(NamedTuple):
    """first m_1 + second m_2 + third m_3 >= least, of the weight m_g that a row gives to each group of columns."""

    first: float
    second: float
    third: float
    least: float


ALWAYS = Condition(0.0, 0.0, 0.0, -1.0)


class TransferForm(NamedTuple):
    """A change of weights that moves them from some columns to others, where the row meets all conditions.

    a_j <- a_j (1 + move (m_2 + m_3) / m_1) for the columns j of group 1;  a_j <- keep a_j for those of groups 2 and 3.
    """

    groups: torch.Tensor  # [B, 1 or H, 1, K] uint8: 0 (left alone) to 3
    keep: float
    move: float
    conditions: tuple[Condition, ...]  # three at most

    @property
    def numbers(self) -> list[float]:
        """keep, move and three conditions."""
        given = (*self.conditions, ALWAYS, ALWAYS, ALWAYS)[:3]
        return [self.keep, self.move, *(x for condition in given for x in condition)]


def transferred(a: torch.Tensor, groups: torch.Tensor, numbers: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, H, 1, K] by `TransferForm.numbers` -> edited ones, and whether any row met the conditions and changed."""
    keep, move, *rest = numbers
    m = [(a * (groups == g)).sum(dim=-1, keepdim=True) for g in (1, 2, 3)]
    hold = torch.ones_like(m[0], dtype=torch.bool)
    for i in range(0, len(rest), 4):
        hold = hold & (rest[i] * m[0] + rest[i + 1] * m[1] + rest[i + 2] * m[2] >= rest[i + 3])
    moved = m[1] + m[2]
    gain = 1 + move * moved / m[0].clamp(min=torch.finfo(a.dtype).tiny)
    gains = torch.where(groups == 1, gain, torch.where(groups >= 2, keep, 1.0))
    return torch.where(hold, a * gains, a), (hold & (moved > 0)).any()
