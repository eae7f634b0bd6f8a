"""Hooks that let HiddenEdit methods change what self-attention, MLP and whole layers put into the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch

from vlm_fix import compiled
from vlm_fix.errors import VlmFixError
from vlm_fix.families import final_norm
from vlm_fix.hooks import made
from vlm_fix.method import Method, shaped
from vlm_fix.options import GenerateOptions
from vlm_fix.rows import Rows
from vlm_fix.scope import check_scopes
from vlm_fix.session import Session
from vlm_fix.tensors import one_stream
from vlm_fix.wing import Host, Wing, idle_reason

from .edit import (
    AttentionOutputEdit,
    FinalOutputEdit,
    HiddenEdit,
    LayerInputEdit,
    LayerOutputEdit,
    MLPInputEdit,
    MLPOutputEdit,
    MLPRawEdit,
)

Stage = Callable[[torch.Tensor, Rows], torch.Tensor]
STAGES = {
    "layer_input": LayerInputEdit,
    "attention_output": AttentionOutputEdit,
    "mlp_input": MLPInputEdit,
    "mlp_raw": MLPRawEdit,
    "mlp_output": MLPOutputEdit,
    "layer_output": LayerOutputEdit,
    "final_output": FinalOutputEdit,
}

MIXERS = ("self_attn", "linear_attn", "conv", "cross_attn")  # all but the first: layers of hybrid decoders
MLPS = ("mlp", "feed_forward")


def mlp_of(layer: Any) -> Any:
    """The MLP of a layer, in the decoder or in a vision tower; None where it has none."""
    return next((m for name in MLPS if (m := getattr(layer, name, None)) is not None), None)


def writers(layer: Any) -> dict[str, Any]:
    """The modules whose outputs a decoder layer adds to the residual stream (its last norm, where it has one), and itself.

    Mllama's cross-attention layers multiply what both modules make by a gate before they add it.
    """
    if hasattr(layer, "post_feedforward_layernorm"):  # Gemma 3, EXAONE 4
        attention, mlp = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    elif hasattr(layer, "post_self_attn_layernorm"):  # GLM-4V
        attention, mlp = layer.post_self_attn_layernorm, layer.post_mlp_layernorm
    else:
        attention = next(m for name in MIXERS if (m := getattr(layer, name, None)) is not None)
        mlp = mlp_of(layer)
    return {"attention_output": attention, "mlp_output": mlp, "layer_output": layer}


def places(language: Any, i: int) -> dict[str, Any]:
    """Layer i's modules by place, in the order in which a hook on several of one module must act."""
    layer = language.layers[i]
    made = {"layer_input": layer, "mlp_input": mlp_of(layer), "mlp_raw": mlp_of(layer), **writers(layer)}
    return made | ({"final_output": final_norm(language)} if i == len(language.layers) - 1 else {})


class HiddenWing(Wing):
    """Hooks on the modules that write to the residual stream."""

    order = 30
    runs = tuple(STAGES.values())

    def __init__(self, host: Host):
        super().__init__(host)
        self.edits = [m for m in host.active if isinstance(m, HiddenEdit) and m.sees]

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.edits else None

    def check(self) -> None:
        self.host.need_image_columns([edit.name for edit in self.edits if edit.reads_image_columns])
        check_scopes(self.edits)

    def one_graph(self, rows: int) -> bool:
        return True

    def refuse(self, options: GenerateOptions) -> None:
        history = [edit.name for edit in self.edits if edit.keeps_history]
        if history and options.beams > 1:
            raise VlmFixError(
                f"{history[0]} remembers each generated token, which does not go with beam search (num_beams="
                f"{options.beams}); use greedy or sampling."
            )

    def on_prompt(self, session: Session) -> None:
        for edit in self.edits:
            edit.on_prompt(session, session.call)

    def install(self) -> Iterable[Any]:
        for i in range(len(self.host.language.layers)):
            for what, module in places(self.host.language, i).items():
                here = [e for e in self.edits if i in e.sees and isinstance(e, STAGES[what]) and e.acts_at(what)]
                if not here:
                    continue
                self.host.callbacks[what, i] = functools.partial(self.edit, [(e, getattr(e, what)) for e in here], i)
                if what.endswith("_input"):
                    yield module.register_forward_pre_hook(functools.partial(self._read, what, i), with_kwargs=True)
                else:
                    yield module.register_forward_hook(functools.partial(self._write, what, i))

    def _read(self, what: str, layer: int, module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]] | None:
        """A module's arguments with the edited rows in the first of them [B, q, C]."""
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        new = compiled.through(self.host, what, layer, x, x.shape[1])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    def _write(
        self, what: str, layer: int, module: Any, args: Any, output: Any
    ) -> torch.Tensor | tuple[Any, ...] | None:
        """The module's output [B, q, C], or a tuple that begins with it, with the edited rows in it."""
        x = made(args, output)
        new = compiled.through(self.host, what, layer, x, x.shape[1])
        whole = output[0] if isinstance(output, tuple) else output
        if new is not None and new.shape != whole.shape:
            new = new.view_as(whole)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    def edit(self, edits: Sequence[tuple[HiddenEdit, Stage]], layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """x [B, q, C] with the edited rows written over a copy; None if no row is edited."""
        if self.host.editing is None:
            return None
        session, new = self.host.editing.at(layer), x
        for edit, changed in edits:
            one_stream(x, edit.name)
            seen = _rows(edit, session, layer, x)
            if seen is None:
                continue
            first, mask, rows = seen
            self.host.touched.add(edit)
            old = new[:, first:] if first else new
            given = old.float()
            part = changed(given, rows)
            part = shaped(part, old, edit, changed.__name__)
            if type(edit).changed_something is HiddenEdit.changed_something:
                self.host.effects.note(edit, part, given)
            if part is given:  # it only looked
                continue
            part = part.to(x.dtype)
            part = part if mask is None else torch.where(mask[..., None], part, old)
            new = part if first == 0 else torch.cat([new[:, :first], part], dim=1)
        return None if new is x else new

    def unused(self, session: Session) -> Iterator[tuple[Method, str]]:
        for edit in self.edits:
            if not (edit in self.host.touched and edit.changed_something(session)):
                yield edit, idle_reason(edit, session)


def _rows(
    edit: HiddenEdit, session: Session, layer: int, x: torch.Tensor
) -> tuple[int, torch.Tensor | None, Rows] | None:
    """The first edited row of this forward, which samples edit which rows from there on [B, R] (None: all), the view."""
    device, edited = x.device, session.rows_in(edit.row_scope, edit.needs_image)
    first = edited.first
    if first >= edited.end:
        return None
    masks = session.masks(session.types.shape[1], device)
    positions = session.positions(first, edited.end, device)
    rows = Rows(layer, session, edit, positions, **masks, first=session.start + first, heads=None)
    return first, edited.mask(first, device), rows
