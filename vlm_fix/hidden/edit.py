"""The base class of methods that change what a layer writes to the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix.method import Layers, Method, param
from vlm_fix.scope import RowScope
from vlm_fix.session import Rows, Session


@dataclass(frozen=True)
class HiddenEdit(Method):
    """Changes what a layer writes to the residual stream, on the rows of `row_scope`, in `layers`.

    Inherit from the stages below: `AttentionOutputEdit`, `MLPOutputEdit`, `LayerOutputEdit`. Each gets and returns float32
    [B, R, C] for R edited rows. `sees` names the layers in which it is called, if not `layers`.
    """

    kind: ClassVar[str] = "hidden"
    idle_reason: ClassVar[str] = "no row of it was reached."
    layers: Layers = param(None, "language-model layers to edit")

    @property
    def row_scope(self) -> RowScope:
        return RowScope.LAST

    @property
    def sees(self) -> Sequence[int]:
        return self.layers  # type: ignore[return-value]

    def changed_something(self, session: Session) -> bool:
        """False if the finished session shows that nothing could be edited; the user is then told `idle_reason`."""
        return True


@dataclass(frozen=True)
class AttentionOutputEdit(HiddenEdit, ABC):
    """Changes what self-attention adds, after o_proj and after the norm that some models put there."""

    @abstractmethod
    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class MLPOutputEdit(HiddenEdit, ABC):
    """Changes what the MLP adds."""

    @abstractmethod
    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class LayerOutputEdit(HiddenEdit, ABC):
    """Changes the residual stream after a layer."""

    @abstractmethod
    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""
