"""One more forward of the language model over a prompt, without edits, for methods that must know something in advance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.families.compat import cache_of, with_cache
from vlm_fix.method import Method
from vlm_fix.recorder import Done, Recorder
from vlm_fix.rows import Rows
from vlm_fix.scope import RowScope
from vlm_fix.session import Session
from vlm_fix.wing import engine_of


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


@torch.no_grad()
def preview(session: Session, kwargs: dict[str, Any], recorder: Recorder | None = None) -> torch.Tensor | None:
    """Hidden states [B, q, C] after the final norm, None where `recorder.last` ends the pass before.

    kwargs are the language model's (`InputEdit.prepare`). Memories are the session's own. A cache with earlier columns is
    copied for the pass.
    """
    engine, cache = engine_of(session.call.model), cache_of(kwargs)
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
    own = with_cache({**kwargs, "use_cache": False}, copy.deepcopy(cache) if session.start else None)
    engine.session = plain
    try:
        with engine.recording(recorder or Recorder()):
            return engine.language(**own).last_hidden_state
    except Done:
        return None
    finally:
        engine.session = session
