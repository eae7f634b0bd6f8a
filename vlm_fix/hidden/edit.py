"""The base classes of methods that change hidden states: what layers read and write of the residual stream, and the tower's MLPs.

A decoder layer passes the places in this order:
  layer_input, attention_output, mlp_input, mlp_raw, mlp_output, layer_output; after the last layer and its norm: final_output
A method inherits one class for each place where it acts. Shapes: B samples, R edited rows, C channels, all float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix.call import Call
from vlm_fix.method import Layers, Method, param
from vlm_fix.rows import Rows
from vlm_fix.scope import RowScope
from vlm_fix.session import Session


@dataclass(frozen=True)
class HiddenEdit(Method):
    """Changes hidden states on the rows of `row_scope`, in `layers`.

    Inherit from the places below. Each gets and returns float32 [B, R, C] for R edited rows. `sees` names the layers in
    which it is called, if not `layers`; none: it does nothing with these parameters.
    """

    kind: ClassVar[str] = "hidden"
    idle_reason: ClassVar[str] = "no row of it was reached."
    keeps_history: ClassVar[bool] = False
    """True if it remembers something of each generated token, which beam search would have to move between its rows."""

    reads_image_columns: ClassVar[bool] = False
    """True if it takes something from the image's columns of the language model."""

    layers: Layers = param(None, "language-model layers to edit")

    @property
    def row_scope(self) -> RowScope:
        return RowScope.LAST

    @property
    def sees(self) -> Sequence[int]:
        return self.layers  # type: ignore[return-value]

    def acts_at(self, place: str) -> bool:
        """False if these parameters change nothing at one of its places."""
        return True

    @property
    def reads_prompt(self) -> bool:
        """True if it looks at a prompt before that is answered."""
        return type(self).on_prompt is not HiddenEdit.on_prompt

    def on_prompt(self, session: Session, call: Call) -> None:
        """Prepare for a prompt with an image, once for each branch, such as by a text-only pass (`hidden.states`)."""

    def changed_something(self, session: Session) -> bool:
        """False if the finished session shows that nothing could be edited; the user is then told `idle_reason`."""
        return True


@dataclass(frozen=True)
class LayerInputEdit(HiddenEdit, ABC):
    """Changes the residual stream before a layer, or only looks at it."""

    @abstractmethod
    def layer_input(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited or not."""


@dataclass(frozen=True)
class AttentionOutputEdit(HiddenEdit, ABC):
    """Changes what self-attention adds, after o_proj and after the norm that some models put there."""

    @abstractmethod
    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class MLPInputEdit(HiddenEdit, ABC):
    """Changes what the MLP reads, after the norm before it, or only looks at it."""

    @abstractmethod
    def mlp_input(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited or not."""


@dataclass(frozen=True)
class MLPRawEdit(HiddenEdit, ABC):
    """Changes what the MLP itself makes, before the norm that some models put behind it."""

    @abstractmethod
    def mlp_raw(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class MLPOutputEdit(HiddenEdit, ABC):
    """Changes what the MLP adds, after that norm."""

    @abstractmethod
    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class LayerOutputEdit(HiddenEdit, ABC):
    """Changes the residual stream after a layer."""

    @abstractmethod
    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class FinalOutputEdit(HiddenEdit, ABC):
    """Changes what the last norm gives to the language head; the last layer has to be among those it `sees`."""

    @abstractmethod
    def final_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[B, R, C] -> the same, edited."""


@dataclass(frozen=True)
class VisionMLPEdit(Method, ABC):
    """Changes what the MLPs of the vision tower add, for all images at once."""

    @property
    def vision_layers(self) -> Sequence[int]:
        """The tower's layers in which it acts; none: it does nothing there."""
        return ()

    @abstractmethod
    def vision_mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """[images, N, C] or, where a tower packs its images into one row, [N, C] -> the same, edited. float32."""
