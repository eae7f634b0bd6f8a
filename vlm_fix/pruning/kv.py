"""Dropping the keys and values of visual tokens, layer by layer and head by head, once the prompt has been read.

The prompt itself is computed in full; a hook on each self-attention then thins out its cache, and later steps get a mask
of their own. Every layer keeps reporting the sequence's length, so that generate counts as before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import VlmFixError
from ..method import Layers, Method, param
from ..session import PAD, Session, View, left_pack
from .after import Seen, ShortLayer, attention_of, check_model, rows_attention, share_of, top_per_image


@dataclass
class Cached:
    """One layer after the prompt, as a CachePruner sees it: n columns, left-padded; keys are rotated."""

    engine: Any
    layer: int
    session: Session
    seen: Seen  # seen.x [B, n, C]: what went into self-attention
    keys: torch.Tensor  # [B, Hkv, n, D]
    values: torch.Tensor  # [B, Hkv, n, D]
    valid: torch.Tensor  # [B, n] False on padding

    def last_row(self) -> torch.Tensor:
        """[B, n] causal softmax attention of the prompt's last token, mean over heads."""
        rows = torch.zeros_like(self.valid)
        assert self.session.prompt_len is not None
        rows[:, self.session.prompt_len - 1] = True
        return rows_attention(self.seen, rows, self.valid)[:, 0]


@dataclass(frozen=True)
class CachePruner(Method):
    """Drops keys and values of visual tokens after the prompt. Overwrite `scores`."""

    name: ClassVar[str] = "cache_pruner"
    kind: ClassVar[str] = "pruning"

    keep: float = param(0.5, "keys kept per image and layer: a count (> 1) or a share in (0, 1]", low=0)
    layers: Layers = param(None, "language-model layers whose cache is pruned")

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    @property
    def wanders(self) -> bool:
        """True if what a step computes depends on the steps before it: rows then cannot change places, as beams do."""
        return False

    def scores(self, cached: Cached) -> torch.Tensor:
        """[B, Hkv, n] or [B, 1, n] (the same choice in all heads); the highest of each image's columns are kept."""
        raise NotImplementedError

    def first_pick(self, cached: Cached, scores: torch.Tensor, view: View) -> None:
        """After a layer's cache was pruned to the columns of `view`; scores are those columns' [B, m]."""

    def picked(self, session: Session, layer: int) -> torch.Tensor | None:
        """[B, m] which columns of session.at(layer) this decode step computes; None: all."""
        return None

    def pick(self, session: Session, layer: int, weights: Any) -> None:
        """After a decode step; weights() -> [B, m] attention of the new row, mean over heads."""


def install(engine: Any) -> list[Any]:
    """The hooks of engine.cacher."""
    cacher = engine.cacher
    check_model(engine, cacher, prompt=False)

    def enter(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = engine.session
        if session is None or session.plain or not session.start or not isinstance(session.at(i), View):
            return None
        view, x = session.at(i), args[0] if args else kwargs["hidden_states"]
        mask, chosen = view.attention_mask(x.device), cacher.picked(session, i)
        if chosen is not None:
            chosen = chosen.to(x.device)[:, None, None]
            mask = chosen if mask is None else mask & chosen
        return args, {**kwargs, "attention_mask": mask, "position_ids": None}

    def leave(i: int, attn: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session, cache = engine.session, kwargs.get("past_key_values")
        if session is None or session.plain or max(session.last_visual) < 0:
            return
        x = args[0] if args else kwargs["hidden_states"]
        if session.start:
            view = session.at(i)
            if isinstance(view, View) and session.length == 1:
                assert view.types is not None and cache is not None
                seen = (view.types != PAD).to(x.device)[:, None]
                cacher.pick(session, i, lambda: _new_row(attn, x, kwargs, cache.layers[i].keys, seen))
            return
        if cache is None:
            raise VlmFixError(f"{cacher.name} prunes the cache, but this call has none: drop use_cache=False.")
        prune(engine, session, i, cache, Seen(attn, x, kwargs["position_embeddings"], cache.layers[i].keys))

    layers = [(i, engine.language.layers[i]) for i in cacher.layers]
    return [
        *(m.register_forward_pre_hook(functools.partial(enter, i), with_kwargs=True) for i, m in layers),
        *(m.self_attn.register_forward_hook(functools.partial(leave, i), with_kwargs=True) for i, m in layers),
    ]


def _new_row(attn: Any, x: torch.Tensor, kwargs: Any, keys: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    cos, sin = (t.expand(len(x), -1, -1) for t in kwargs["position_embeddings"])
    return attention_of(attn, x, cos, sin, keys, allowed)[:, 0]


@torch.no_grad()
def prune(engine: Any, session: Session, i: int, cache: Any, seen: Seen) -> None:
    """Thin out layer `i` of the cache; session.views[i] tells its columns from then on."""
    cacher, layer = engine.cacher, cache.layers[i]
    assert session.types is not None and session.images is not None
    ShortLayer.of(layer, 0)  # refuses what cannot be thinned out, before anything is
    types, images = session.types.to(seen.x.device), session.images.to(seen.x.device)
    cached = Cached(engine, i, session, seen, layer.keys, layer.values, types != PAD)
    scores = cacher.scores(cached)
    quota = functools.partial(share_of, cacher.keep)
    stays = (images == 0) & (types != PAD)
    keep = torch.stack([top_per_image(s, images, images, quota) | stays for s in scores.unbind(dim=1)], dim=1)
    index, mask = left_pack(keep.flatten(0, 1))  # every head keeps the same number of a row's columns
    index, mask = index.view(*keep.shape[:2], -1), mask.view(*keep.shape[:2], -1)
    view = session.drop([i], index[:, 0].to(session.types.device), mask[:, 0].to(session.types.device))
    cacher.first_pick(cached, scores[:, 0].gather(1, index[:, 0]), view)
    if not view.dropped:
        return
    index = index.expand(-1, layer.keys.shape[1], -1)[..., None]
    short = ShortLayer.of(layer, view.dropped)
    short.keys, short.values = (t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in (layer.keys, layer.values))
    cache.layers[i] = short
