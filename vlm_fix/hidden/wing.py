"""Hooks that let HiddenEdit methods change what self-attention, MLP and whole layers put into the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch

from vlm_fix import compiled
from vlm_fix.method import Method
from vlm_fix.session import Rows, Session
from vlm_fix.wing import Host, Wing

from .edit import AttentionOutputEdit, HiddenEdit, LayerOutputEdit, MLPOutputEdit

Stage = Callable[[torch.Tensor, Rows], torch.Tensor]
STAGES = {"attention_output": AttentionOutputEdit, "mlp_output": MLPOutputEdit, "layer_output": LayerOutputEdit}

MIXERS = ("self_attn", "linear_attn", "conv")  # the last two: layers of hybrid decoders
MLPS = ("mlp", "feed_forward")


def writers(layer: Any) -> dict[str, Any]:
    """The modules whose outputs a decoder layer adds to the residual stream (its last norm, where it has one), and itself."""
    if hasattr(layer, "post_feedforward_layernorm"):  # Gemma 3, EXAONE 4
        attention, mlp = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    elif hasattr(layer, "post_self_attn_layernorm"):  # GLM-4V
        attention, mlp = layer.post_self_attn_layernorm, layer.post_mlp_layernorm
    else:
        attention = next(m for name in MIXERS if (m := getattr(layer, name, None)) is not None)
        mlp = next(m for name in MLPS if (m := getattr(layer, name, None)) is not None)
    return {"attention_output": attention, "mlp_output": mlp, "layer_output": layer}


class HiddenWing(Wing):
    """Hooks on the modules that write to the residual stream."""

    order = 30

    def __init__(self, host: Host):
        super().__init__(host)
        self.edits = [m for m in host.active if isinstance(m, HiddenEdit)]

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.edits else None

    def one_graph(self, rows: int) -> bool:
        return True

    def install(self) -> Iterable[Any]:
        for i, layer in enumerate(self.host.language.layers):
            for what, module in writers(layer).items():
                edits = [(e, getattr(e, what)) for e in self.edits if i in e.sees and isinstance(e, STAGES[what])]
                if edits:
                    self.host.callbacks[what, i] = functools.partial(self.edit, edits, i)
                    yield module.register_forward_hook(functools.partial(self._write, what, i))

    def _write(
        self, what: str, layer: int, module: Any, args: Any, output: Any
    ) -> torch.Tensor | tuple[Any, ...] | None:
        """The module's output [B, q, C], or a tuple that begins with it, with the edited rows in it."""
        x = output[0] if isinstance(output, tuple) else output
        new = compiled.through(self.host, what, layer, x, x.shape[1])
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    def edit(self, edits: Sequence[tuple[HiddenEdit, Stage]], layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """x [B, q, C] with the edited rows written over a copy; None if no row is edited."""
        if self.host.editing is None:
            return None
        session, new = self.host.editing.at(layer), x
        for edit, changed in edits:
            seen = _rows(edit, session, layer, x)
            if seen is None:
                continue
            first, mask, rows = seen
            self.host.touched.add(edit)
            old = new[:, first:]
            part = changed(old.float(), rows).to(x.dtype)
            part = part if mask is None else torch.where(mask[..., None], part, old)
            new = part if first == 0 else torch.cat([new[:, :first], part], dim=1)
        return None if new is x else new

    def unused(self, session: Session) -> Iterator[tuple[Method, str]]:
        for edit in self.edits:
            if not (edit in self.host.touched and edit.changed_something(session)):
                yield edit, edit.idle_reason


def _rows(
    edit: HiddenEdit, session: Session, layer: int, x: torch.Tensor
) -> tuple[int, torch.Tensor | None, Rows] | None:
    """The first edited row of this forward, which samples edit which rows from there on [B, R] (None: all), the view."""
    device, edited = x.device, session.rows_in(edit.row_scope, edit.needs_image)
    first = edited.first
    if first >= edited.end:
        return None
    positions = torch.arange(session.start + first, session.start + edited.end, device=device)
    rows = Rows(layer, session, edit, positions, **session.masks(session.types.shape[1], device))
    return first, edited.mask(first, device), rows
