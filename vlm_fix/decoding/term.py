"""How large the term is that a contrast adds to the log-probabilities: what a control with noise has to match."""

from __future__ import annotations

import math

import torch


class Term:
    """The spread of d = combined - log p over the tokens left uncut, pooled over the rows and steps of one call.

    A row of n uncut tokens adds sum (d - mean d)^2 to `squares` and n - 1 to `dof`: a constant added to a whole row cancels
    in the softmax. Rows that are not contrasted add nothing: those behind their end token, those without an image,
    and those that `Contrast.gate` leaves as they are, which are counted. All of it stays on the device until it is asked for.
    """

    def __init__(self, ends: int | list[int] | torch.Tensor | None) -> None:
        self.ends = torch.as_tensor([] if ends is None else ends, dtype=torch.long).flatten()
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.gates: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows that a gate left as they are, of how many

    def add(
        self,
        main: torch.Tensor,
        combined: torch.Tensor,
        generated: torch.Tensor,
        sure: torch.Tensor | None = None,
        blind: torch.Tensor | None = None,
    ) -> None:
        """A step: log-probabilities and scores [B, V], -inf where cut off, after the tokens [B, t]; sure [B, 1]: gated;
        blind [B, 1]: without an image."""
        self.ends = self.ends.to(generated.device)
        ended = torch.isin(generated, self.ends).any(dim=1, keepdim=True).to(main.device)
        ended = ended if blind is None else ended | blind
        left = main.isfinite() & combined.isfinite() & ~(ended if sure is None else ended | sure)
        count = left.sum(dim=1, keepdim=True)
        d = torch.where(left, combined - main, 0.0)
        d = torch.where(left, d - d.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
        self.steps.append((d.square().sum(), (count - 1).clamp(min=0).sum()))
        if sure is not None:
            self.gates.append(((sure & ~ended).sum(), (~ended).sum()))

    @property
    def gated(self) -> tuple[int, int] | None:
        """How many rows a gate left as they are, and of how many, over all steps; None without a gate."""
        counts = (int(torch.stack(part).sum()) for part in zip(*self.gates, strict=True))
        return (next(counts), next(counts)) if self.gates else None

    @property
    def squares(self) -> float:
        """The sum of squared deviations."""
        return math.fsum(torch.stack([s for s, _ in self.steps]).tolist()) if self.steps else 0.0

    @property
    def dof(self) -> int:
        """Degrees of freedom: uncut tokens less one, summed over rows and steps."""
        return int(torch.stack([n for _, n in self.steps]).sum()) if self.steps else 0

    @property
    def sd(self) -> float | None:
        """Standard deviation, in nats; None where no row had two tokens left."""
        return math.sqrt(self.squares / self.dof) if self.dof else None
