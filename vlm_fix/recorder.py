"""What a pass writes down of attention, layer by layer, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from vlm_fix.session import Session


class Done(Exception):
    """A pass has shown all that is wanted of it: what runs it suppresses this."""


class Recorder:
    """Override what is wanted; rows and layers that nobody asks for cost nothing."""

    layers: Collection[int] | None = None  # the layers that are recorded, None: all
    last: int | None = (
        None  # where a pass of `run_prompt` or `preview` ends: after this layer's attention; None: at its end
    )

    def first_row(self, session: Session) -> int:
        """Return the first query row of this forward whose weights are wanted; by default none is."""
        return session.length

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        """See the weights [B, H, r, K] of the query rows from first + i on, as all edits have left them, in chunks."""

    def heads(self, layer: int, session: Session, outputs: torch.Tensor) -> None:
        """See the per-head outputs [B, q, H, D] of all rows, as o_proj gets them."""


class LastHeads(Recorder):
    """Calls `keep(layer, outputs [B, H, D])` with the head outputs of the last row, up to layer `last` (None: of all layers)."""

    def __init__(self, keep: Callable[[int, torch.Tensor], None], last: int | None = None):
        self.keep, self.last = keep, last

    def heads(self, layer: int, session: Session, outputs: torch.Tensor) -> None:
        self.keep(layer, outputs[:, -1].float())
