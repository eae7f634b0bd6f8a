"""What an edit sees of the rows it works on, in one layer and one forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vlm_fix.memory import Memory
from vlm_fix.method import Method
from vlm_fix.packing import pad_to
from vlm_fix.session import SLACK, VISUAL, Session

T = TypeVar("T")
M = TypeVar("M", bound=Memory)


@dataclass
class Rows:
    """What an edit sees of the rows it works on. Masks are [B, 1, 1, K] booleans over the columns."""

    layer: int
    session: Session
    method: Method
    positions: torch.Tensor  # [R] absolute positions of the rows
    visual: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    first: int | None = None  # the first of the positions, where the host knows it
    heads: tuple[int, ...] | None = None  # the query heads that the edit is asked about; None: all

    @property
    def numbers(self) -> range:
        """The positions as numbers of the host, which need not wait for the device where `first` is known."""
        first = int(self.positions[0]) if self.first is None else self.first
        return range(first, first + len(self.positions))

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Those of x [B, H, ...] that the edit is asked about."""
        return x if self.heads is None else x[:, list(self.heads)]

    def memory(self, kind: type[M]) -> M:
        """What the method remembers in the session, see `Session.memory`."""
        return self.session.memory(self.method, kind)

    @property
    def age(self) -> torch.Tensor:
        """How many columns each column lies before a row's own; broadcasts to [B, 1, R, K]."""
        return self.session.ages(self.positions, self.visual.shape[-1])

    @property
    def generated(self) -> torch.Tensor:
        """The columns after the prompt, as booleans; broadcasts to [B, 1, R, K]."""
        return self.session.generated(self.visual.shape[-1], self.visual.device)

    @property
    def prefill(self) -> bool:
        """True while the prompt is processed (its last row included)."""
        return self.session.start < self.session.prompt_len

    def once(self, make: Callable[[Rows], T]) -> T:
        """make(self), a method of the edit, computed once a forward and shared by the layers with the same columns."""
        place = (id(self.method), make.__name__, self.visual.shape[-1], self.visual.device)
        known = self.session.forward.once.get(place)
        if known is None or known[0] is not self.positions:  # the first layer, or another chunk of rows
            known = self.session.forward.once[place] = self.positions, make(self)
        return known[1]

    def kept(self, make: Callable[[Rows], T]) -> T:
        """make(self), a method of the edit, computed once in the layer and kept while generated columns are added."""
        place, made = (id(self.method), make.__name__, self.layer, self.visual.device), self.session.columns.once
        if place not in made:
            made[place] = make(self)
        return made[place]

    def ahead(self, make: Callable[[Rows], T], of: Any = None) -> T:
        """make(rows) over these columns and those of the next steps: it may be wider than K.

        It is computed once in the layer for `of` (that very object) and kept while generated columns are added.
        """
        session, width, device = self.session, self.visual.shape[-1], self.visual.device
        if width != session.types.shape[1] or device not in session.columns.kinds:  # a static cache or a window
            return make(self)
        place = (id(self.method), make.__name__, self.layer, device)
        known = session.columns.wide.get(place)
        if known is None or known[0] < width or known[1] is not of:
            kinds: Any = session.columns.kinds[device]
            made = make(dataclasses.replace(self, **kinds))
            known = session.columns.wide[place] = kinds["visual"].shape[-1], of, made
        return known[2]

    def columns(self, mask: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """[B, n] booleans over the columns seen so far -> [B, 1, 1, K]; columns that came later are False.

        `layer`: the layer in whose columns the mask was made, if not this one (tokens may be dropped in between); -1: in
        all columns of the session.
        """
        if layer is not None:
            mask = self.session.translate(mask, self.session.whole.at(layer))
        width = self.visual.shape[-1]
        full = pad_to(mask.to(self.visual.device), self.session.types.shape[1])
        return pad_to(full[:, max(0, full.shape[1] - width) :], width)[:, None, None]

    def groups(self, mask: torch.Tensor, make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """make(mask [B, (H,) n], visual [B, n]) -> [B, G, n], over the columns seen so far -> [B, G, K].

        It is made once for `mask` (that very tensor) and kept while generated columns, 0 in every group, are added.
        """
        session, width = self.session, self.visual.shape[-1]
        place, total = (id(self.method), self.layer, self.visual.device), session.types.shape[1]
        of, wide = session.columns.groups.get(place, (None, self.visual))
        if of is not mask or wide.shape[-1] < max(total, width):
            device = self.visual.device
            made = make(pad_to(mask, total).to(device), (session.types == VISUAL).to(device))
            wide = torch.nn.functional.pad(made, (0, max(0, width - total) + SLACK))
            session.columns.groups[place] = mask, wide
        offset = max(0, total - width)
        return wide[..., offset : offset + width]
