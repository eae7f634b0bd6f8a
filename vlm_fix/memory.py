"""What a session keeps between layers and forwards: the memory of each method, and masks that layers share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass
class Memory:
    """Base of what a method remembers in one session: subclass it as a dataclass whose fields have defaults.

    Tensors lead with the batch dimension, also as the values of a dict (of layers, say): a session repeats and selects
    their rows together with those of its cache. What is not such a tensor is left as it is.
    """

    def with_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with other rows: `change` applied to each tensor."""
        values = {f.name: with_rows(getattr(self, f.name), change) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **values)


def with_rows(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`change` applied to every tensor with a batch dimension in dicts and memories."""
    if isinstance(value, torch.Tensor) and value.dim():
        return change(value)
    if isinstance(value, dict):
        return {k: with_rows(v, change) for k, v in value.items()}
    return value.with_rows(change) if isinstance(value, Memory) else value


@dataclass
class ForwardCache:
    """Computed once for the layers of one forward; a model may be spread over several devices."""

    plans: dict[tuple[int, int, torch.device, bool], Any] = field(default_factory=dict)
    """(stack of edits, K, device, True if somebody reads the weights) -> attention.plan.Plan, None where no edit acts"""
    kinds: dict[tuple[int, torch.device], dict[str, torch.Tensor]] = field(default_factory=dict)
    """(K, device) -> `Session.masks`"""
    positions: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict)
    """(first row, end, device) -> `Session.positions`"""
    allowed: dict[torch.device, torch.Tensor | None] = field(default_factory=dict)
    """Device -> `View.attention_mask`"""
    block_masks: dict[tuple[int, int, torch.device], tuple[torch.Tensor | None, BlockMask]] = field(
        default_factory=dict
    )
    """(id of a mask, K, device) -> that mask, held so that its id stays its own, and flex_attention's form of it"""
    once: dict[tuple[int, str, int, torch.device], tuple[torch.Tensor, Any]] = field(default_factory=dict)
    """(method, function, K, device) -> the row positions it was computed for, and the value: `Rows.once`"""
    forms: dict[Any, Any] = field(default_factory=dict)  # as `ColumnCache.forms`, where they do not hold for longer
    renumbered: torch.Tensor | None = None  # pruning.after.renumbered
    tables: dict[torch.device, Any] = field(default_factory=dict)  # rotary tables of these positions
    rotary: Any = None  # rotary tables and position ids (None: 3-D) of a second branch's columns

    def copied(self) -> ForwardCache:
        """The same values in dicts of its own."""
        return ForwardCache(**{f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass
class ColumnCache:
    """Column masks that hold until columns other than generated ones are added; wider than the columns there are."""

    kinds: dict[torch.device, dict[str, torch.Tensor]] = field(default_factory=dict)
    groups: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """(method, layer, device) -> the mask they were made of, and the groups: `Rows.groups`"""
    once: dict[tuple[int, str, int, torch.device], Any] = field(default_factory=dict)
    """(method, function, layer, device) -> the value: `Rows.kept`"""
    wide: dict[tuple[int, str, int, torch.device], tuple[int, Any, Any]] = field(default_factory=dict)
    """The same -> how many columns it reaches, what it was made of, and the value: `Rows.ahead`"""
    forms: dict[Any, Any] = field(default_factory=dict)
    """(edits, layer, device) -> how many columns it reaches, and the attention.forms.ScoreForm; None: there is none"""
    shown: dict[torch.device, torch.Tensor] = field(default_factory=dict)  # `Session.shown`
    padded: bool | None = None  # `Session.padded`
    ahead: dict[torch.device, tuple[int, list[Any]]] = field(default_factory=dict)
    """Device -> a row's position, and from there on numbers and rotary tables row by row: pruning.after.tables_ahead"""

    def copied(self) -> ColumnCache:
        """The same values in dicts of its own."""
        known = dict(self.kinds), dict(self.groups), dict(self.once), dict(self.wide), dict(self.forms)
        return ColumnCache(*known, padded=self.padded)
