"""One more forward of the language model over a prompt, without edits, for methods that must know something in advance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.families.compat import cache_of, with_cache
from vlm_fix.method import Method
from vlm_fix.scope import RowScope
from vlm_fix.session import Rows, Session
from vlm_fix.wing import engine_of


@dataclass
class PlainWeights:
    """Recorder of one layer: calls `read(a [B, H, r, K], rows)` with the plain weights of the rows after the image."""

    method: Method
    read: Callable[[torch.Tensor, Rows], None]

    def first_row(self, session: Session) -> int:
        return session.rows_in(RowScope.AFTER_IMAGE, needs_image=True).first

    def weights(self, layer: int, session: Session, first: int, a: torch.Tensor, i: int) -> None:
        positions = torch.arange(a.shape[2], device=a.device) + session.start + first + i
        self.read(a, Rows(layer, session, self.method, positions, **session.masks(a.shape[-1], a.device)))

    def heads(self, layer: int, session: Session, output: torch.Tensor) -> None:
        return None


@torch.no_grad()
def preview(session: Session, kwargs: dict[str, Any], looks: dict[int, Any] | None = None) -> torch.Tensor:
    """Hidden states [B, q, C] after the final norm; kwargs are the language model's (`Method.prepare`).

    looks: layer -> its recorder. States are the session's own. A cache with earlier columns is copied for the pass.
    """
    engine, cache = engine_of(session.call.model), cache_of(kwargs)
    plain = Session(
        session.call,
        branch="preview",
        plain=True,
        prompt_len=session.prompt_len,
        states=session.states,
        looks=looks or {},
    )
    plain.advance(session.start, session.types)
    plain.last_visual = session.last_visual
    own = with_cache({**kwargs, "use_cache": False}, copy.deepcopy(cache) if session.start else None)
    engine.session = plain
    try:
        return engine.language(**own).last_hidden_state
    finally:
        engine.session = session
