"""Which query rows of a forward a method acts in."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from vlm_fix.errors import VlmFixError


def of_main(branch: str) -> bool:
    """True for "main" and for what looks at the model as the main branch has it ("main look"): no branch of a contrast."""
    return branch.partition(" ")[0] == "main"


class RowScope(enum.Enum):
    """The rows a method acts in; decode rows, which follow the prompt, are in every scope."""

    LAST = "last"  # the prompt's last row, which predicts the first new token
    AFTER_IMAGE = "after_image"  # also the prompt's rows after its last image
    ALL = "all"  # every row of the prompt


def check_scopes(methods: Iterable[Any]) -> None:
    """VlmFixError unless the `row_scope` of each method is a RowScope."""
    for method in methods:
        if not isinstance(method.row_scope, RowScope):
            names = ", ".join(f"RowScope.{scope.name}" for scope in RowScope)
            raise VlmFixError(f"{method.name}: row_scope is {method.row_scope!r}; it must be one of {names}.")


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
