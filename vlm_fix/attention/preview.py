"""One more forward of the language model over a prompt, without edits, for methods that must know something in advance.

Where it can, the prompt then goes on from it: rows that no method changes are not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlm_fix.families.compat import CACHE_NAMES, cache_of, is_latent, with_cache
from vlm_fix.method import Method
from vlm_fix.recorder import Done, Recorder
from vlm_fix.rows import Rows
from vlm_fix.scope import RowScope
from vlm_fix.session import Session
from vlm_fix.wing import Host, engine_of

from .edits import AttentionEdit, ColumnMasker, LayerInputReader, PromptStart, QueryKeyReader, WeightReader

READERS = (
    LayerInputReader | QueryKeyReader | WeightReader | ColumnMasker | PromptStart
)  # of rows that they may not change
BY_ROW = {
    "inputs_embeds": -2,
    "position_ids": -1,
    "cache_position": -1,
}  # inputs of the language model: their dimension of rows
KNOWN = {*BY_ROW, *CACHE_NAMES, "input_ids", "attention_mask", "use_cache", "return_dict"}


@dataclass
class PlainWeights(Recorder):
    """Recorder of one layer: calls `read(a [B, H, r, K], rows)` with the plain weights of the rows after the image."""

    method: Method
    layer: int
    read: Callable[[torch.Tensor, Rows], None]

    def __post_init__(self) -> None:
        self.layers, self.last = (self.layer,), self.layer

    def first_row(self, session: Session) -> int:
        return session.rows_in(RowScope.AFTER_IMAGE, needs_image=True).first

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        device = weights.device
        positions = torch.arange(weights.shape[2], device=device) + session.start + first + i
        masks = session.masks(weights.shape[-1], device)
        visual, before, after = (masks[name] for name in ("visual", "before", "after"))
        self.read(weights, Rows(layer, session, self.method, positions, visual, before, after))


@dataclass
class Earlier:
    """A session's `part`: the hidden states [B, i, C] of rows that a preview has run for the forward that now begins."""

    states: torch.Tensor | None = None

    def before(self, output: Any) -> None:
        """Put them before the states of the rows that the forward ran."""
        if self.states is not None:
            states, self.states = self.states, None
            output.last_hidden_state = torch.cat(
                [states.to(output.last_hidden_state.device), output.last_hidden_state], 1
            )


@dataclass
class Preview:
    """A forward without edits over the rows of `session`'s forward.

    states: [B, q, C] after the final norm, None where `recorder.last` ended the pass before. kept: its keys are in the cache.
    """

    session: Session
    kwargs: dict[str, Any]
    states: torch.Tensor | None
    kept: int | None

    def rest(self, first: int | None = None) -> dict[str, Any]:
        """The language model's inputs without the rows before column `first`, the first one that the method may change; None:
        the prompt's last.

        All rows where the pass could not keep its keys, or where another method changes rows before.
        """
        session, cache = self.session, cache_of(self.kwargs)
        if self.kept is None or self.states is None:
            return self.kwargs
        last = min(session.prompt_len - 1 - session.start, session.length - 1)
        row = max(0, min(self.kept, last, last if first is None else first - session.start))
        cache.crop(row - session.length)
        if not row:
            return self.kwargs
        session.part(Earlier).states = self.states[:, :row]
        session.advance(session.start + row, session.types[:, session.start + row :])
        narrow = {
            name: x.narrow(dim, row, x.shape[dim] - row)
            for name, dim in BY_ROW.items()
            if (x := self.kwargs.get(name)) is not None
        }
        return {**self.kwargs, **narrow}


@torch.no_grad()
def preview(session: Session, kwargs: dict[str, Any], method: Method, recorder: Recorder | None = None) -> Preview:
    """Run the plain pass that `method` asks for, to its end where the prompt can go on from its keys (`Preview.rest`).

    kwargs are the language model's (`InputEdit.prepare`). Memories are the session's own. Otherwise a cache with earlier
    columns is copied for the pass.
    """
    engine, cache, recorder = engine_of(session.call.model), cache_of(kwargs), recorder or Recorder()
    plain = Session(
        session.call,
        branch="preview",
        plain=True,
        prompt_len=session.prompt_len,
        states=session.states,
        kept=session.kept,
    )
    plain.advance(session.start, session.types)
    plain.last_visual = session.last_visual
    parts = goes_on(engine, session, kwargs) and (min(session.last_visual) >= 0 or not method.needs_image)
    kept = _first_row(engine, session, method) if parts else None
    if kept is None:
        own = with_cache({**kwargs, "use_cache": False}, copy.deepcopy(cache) if session.start else None)
    else:
        own, recorder.last = kwargs, None
    engine.session = plain
    try:
        with engine.recording(recorder):
            return Preview(session, kwargs, engine.language(**own).last_hidden_state, kept)
    except Done:
        return Preview(session, kwargs, None, None)
    finally:
        engine.session = session


def goes_on(host: Host, session: Session, kwargs: dict[str, Any]) -> bool:
    """True for a prompt of causal rows, inside `generate`, that can be run in parts over one cache."""
    cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
    return (
        host.call is not None
        and session.branch == "main"
        and session.start + session.length >= session.prompt_len
        and host.recorder is None
        and not torch.is_grad_enabled()
        and host.family.causal
        and len(host.arch.attention) == host.arch.depth
        and type(cache) is DynamicCache
        and not cache.offloading
        and host.keeps_columns(cache)
        and not is_latent(host.model)
        and not getattr(host.model.config.get_text_config(), "output_hidden_states", False)
        and kwargs.get("return_dict") is not False
        and kwargs.get("inputs_embeds") is not None
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
        and not any(v is not None and v is not False for k, v in kwargs.items() if k not in KNOWN)
    )


def _first_row(host: Host, session: Session, method: Method) -> int | None:
    """The first row of this forward that a method other than `method` changes or reads; None if that is the first of all."""
    first = session.length
    for other in host.active:
        if other is method:
            continue
        if (
            not isinstance(other, AttentionEdit)
            or isinstance(other, READERS)
            or getattr(other, "prepares", False)
            or getattr(other, "contrasts", False)
        ):
            return None
        first = min(first, session.rows_in(other.row_scope, other.needs_image).first)
    return first or None
