"""The base class of methods that change what a layer writes to the residual stream."""

from __future__ import annotations

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

    Overwrite what you need; each gets and returns float32 [B, R, C] for R edited rows:
      attention_output(x, rows) -> what self-attention adds (after o_proj, and after the norm that some models put there)
      mlp_output(x, rows)       -> what the MLP adds
      layer_output(x, rows)     -> the residual stream after the layer
      sees                      -> layers in which it is called, if not `layers`
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

    def attention_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x

    def mlp_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x

    def layer_output(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return x

    def changed_something(self, session: Session) -> bool:
        """False if the finished session shows that nothing could be edited; the user is then told `idle_reason`."""
        return True

    @classmethod
    def edits(cls, what: str) -> bool:
        """True if the class overwrites `what` ("attention_output", "mlp_output", "layer_output")."""
        return getattr(cls, what) is not getattr(HiddenEdit, what)
