"""Dropping the keys and values of visual tokens, layer by layer and head by head, once the prompt has been read.

The prompt itself is computed in full; a hook on each self-attention then thins out its cache, and later steps get a mask
of their own. Every layer keeps reporting the sequence's length, so that generate counts as before. A method may thin out
further as the answer grows, and lay columns aside that only some steps compute.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of
from vlm_fix.method import Layers, Method, param
from vlm_fix.session import PAD, VISUAL, Session, View, left_pack

from .after import (
    Seen,
    ShortLayer,
    attention_chunks,
    by_head,
    check_model,
    rotated,
    rows_attention,
    share_of,
    top_per_image,
)


@dataclass
class Cached:
    """One layer after its self-attention, as a CachePruner sees it: n columns, left-padded; keys are rotated.

    After the prompt `keys` and `values` are all of it, whatever was dropped since; after a later step what it computed.
    """

    engine: Any
    layer: int
    session: Session
    seen: Seen  # seen.x [B, q, C]: what went into self-attention; after the prompt q = n
    keys: torch.Tensor  # [B, Hkv, n, D]
    values: torch.Tensor  # [B, Hkv, n, D]
    valid: torch.Tensor  # [B, n] False on padding
    projected: torch.Tensor | None = None  # after a step: [B, q, H D] what q_proj made of seen.x

    def last_row(self) -> torch.Tensor:
        """[B, n] causal softmax attention of the prompt's last token, mean over heads."""
        rows = torch.zeros_like(self.valid)
        assert self.session.prompt_len is not None
        rows[:, self.session.prompt_len - 1] = True
        return rows_attention(self.seen, rows, self.valid)[:, 0]

    def step_rows(self) -> torch.Tensor:
        """[B, H, q, n] softmax attention of the rows of a step after the prompt."""
        assert self.projected is not None
        attn, view = self.seen.attn, self.session.at(self.layer)
        assert isinstance(view, View)
        cos, sin = (t.expand(len(self.projected), -1, -1) for t in self.seen.rotary)
        mask = view.attention_mask(self.keys.device)
        query = rotated(attn, by_head(attn, self.projected), cos, sin)
        chunks = [*attention_chunks(query, self.keys, None if mask is None else mask[:, 0], attn.scaling)]
        return torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]


@dataclass(frozen=True)
class CachePruner(Method):
    """Drops keys and values of visual tokens after the prompt. Overwrite `scores`."""

    name: ClassVar[str] = "cache_pruner"
    kind: ClassVar[str] = "pruning"

    keep: float = param(0.5, "keys kept per image and layer: a count (> 1) or a share in (0, 1]", above=0)
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

    def before_step(self, session: Session, i: int, layer: SplitLayer) -> None:
        """If it wanders: before layer i computes a step after the prompt."""

    def after_prompt(self, cached: Cached, scores: torch.Tensor, layer: SplitLayer) -> None:
        """If it wanders: `layer` was pruned to the columns of session.at(i), whose scores are [B, m]."""

    def after_step(self, cached: Cached, layer: SplitLayer) -> None:
        """If it wanders: after a step's self-attention over the columns of session.at(i)."""


class SplitLayer(ShortLayer):
    """A ShortLayer that can lay columns aside: `keys` and `values` are what a step computes, the rest stays stored."""

    aside: tuple[torch.Tensor, torch.Tensor] | None = None  # keys, values [B, Hkv, r, D]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.aside:
            keys, values = (t.repeat_interleave(repeats, dim=0) for t in self.aside)
            self.aside = keys, values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise VlmFixError(_ONE_WAY)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:  # type: ignore[override]
        raise VlmFixError(_ONE_WAY)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise VlmFixError(_ONE_WAY)


_ONE_WAY = (
    "this pruner chooses what a step computes by the steps before it, so that its cache cannot be rolled back, nor its "
    "rows moved: decode greedily or by sampling, or take another pruner."
)


def install(engine: Any) -> list[Any]:
    """The hooks of engine.cacher."""
    cacher = engine.cacher
    check_model(engine, cacher, prompt=False)
    projected: dict[int, torch.Tensor] = {}  # from q_proj to the end of the same self-attention

    def note(i: int, module: Any, args: Any, output: torch.Tensor) -> None:
        if engine.session is not None and not engine.session.plain and engine.session.start:
            projected[i] = output

    def enter(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session, cache = engine.session, cache_of(kwargs)
        if session is None or session.plain or not session.start or not isinstance(session.at(i), View):
            return None
        if cacher.wanders and cache is not None:
            cacher.before_step(session, i, cache.layers[i])
        x = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "attention_mask": session.at(i).attention_mask(x.device), "position_ids": None}

    def leave(i: int, attn: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session, cache = engine.session, cache_of(kwargs)
        if session is None or session.plain or max(session.last_visual) < 0:
            return
        if session.start and not (cacher.wanders and isinstance(session.at(i), View)):
            return
        if cache is None:
            raise VlmFixError(f"{cacher.name} prunes the cache, but this call has none: drop use_cache=False.")
        x, layer = args[0] if args else kwargs["hidden_states"], cache.layers[i]
        types = session.at(i).types if session.start else session.types
        seen = Seen(attn, x, kwargs["position_embeddings"], layer.keys)
        cached = Cached(
            engine, i, session, seen, layer.keys, layer.values, types.to(x.device) != PAD, projected.pop(i, None)
        )
        with torch.no_grad():
            if session.start:
                cacher.after_step(cached, layer)
            else:
                cache.layers[i] = prune(cached, layer)

    layers = [(i, engine.language.layers[i]) for i in cacher.layers]
    return [
        *(m.register_forward_pre_hook(functools.partial(enter, i), with_kwargs=True) for i, m in layers),
        *(m.self_attn.register_forward_hook(functools.partial(leave, i), with_kwargs=True) for i, m in layers),
        *(m.self_attn.q_proj.register_forward_hook(functools.partial(note, i)) for i, m in layers if cacher.wanders),
    ]


def prune(cached: Cached, layer: Any) -> ShortLayer:
    """The cache layer after the prompt, thinned out; session.views[i] tells its columns from then on."""
    cacher, session = cached.engine.cacher, cached.session
    short = (SplitLayer if cacher.wanders else ShortLayer).of(layer, 0)  # refuses what cannot be thinned out
    assert session.images is not None
    images = session.images.to(cached.valid.device)
    scores = cacher.scores(cached)
    quota = functools.partial(share_of, cacher.keep)
    stays = (images == 0) & cached.valid
    keep = torch.stack([top_per_image(s, images, images, quota) | stays for s in scores.unbind(dim=1)], dim=1)
    index = shorten(session, cached.layer, short, keep)
    if cacher.wanders:
        cacher.after_prompt(cached, scores[:, 0].gather(1, index[:, 0]), short)
    return short


def shorten(session: Session, i: int, layer: ShortLayer, keep: torch.Tensor) -> torch.Tensor:
    """Leave layer i the columns `keep` [B, Hkv or 1, n] of those it has, as many of a row in every head.

    -> [B, Hkv or 1, m] which these were; session.at(i) tells the first head's.
    """
    index, mask = (t.view(*keep.shape[:2], -1) for t in left_pack(keep.flatten(0, 1)))
    device = session.at(i).places().device
    layer.dropped = session.drop([i], index[:, 0].to(device), mask[:, 0].to(device), rows=False).dropped
    if not torch.equal(index, torch.arange(keep.shape[2], device=index.device).expand_as(keep)):
        layer.keys, layer.values = take((layer.keys, layer.values), index)
    return index


def take(parts: Any, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `index` [B, Hkv or 1, m] of keys and values [B, Hkv, n, D]: row by row, far faster than gather on a CPU."""
    batch, heads, n, _ = parts[0].shape
    first = n * torch.arange(batch * heads, device=index.device).view(batch, heads, 1)
    keys, values = (torch.nn.functional.embedding(first + index, x.flatten(0, 2)) for x in parts)
    return keys, values


def lay_aside(session: Session, i: int, layer: SplitLayer, core: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    """The next steps compute text and the visual columns `core` [B, m] alone; `state` remembers what else is stored."""
    view = session.at(i)
    assert view.types is not None
    types = view.types.to(core.device)
    away = (types == VISUAL) & ~core
    if not away.any():
        return
    index, state["real"] = left_pack(away)
    state["places"] = view.places().to(core.device).gather(1, index)
    layer.aside = take((layer.keys, layer.values), index[:, None])
    shorten(session, i, layer, ((types != PAD) & ~away)[:, None])


def take_back(session: Session, i: int, layer: SplitLayer, state: dict[str, torch.Tensor]) -> None:
    """The coming step computes all that is stored, in order again."""
    if layer.aside is None:
        return
    view = session.at(i)
    assert view.types is not None
    device, types = view.types.device, view.types
    stored = state.pop("real").to(device)
    real = torch.cat([stored, types != PAD], dim=1)
    types = torch.cat([stored.to(types.dtype) * VISUAL, types], dim=1)
    places = torch.cat([state.pop("places").to(device), view.places()], dim=1)
    order = torch.where(real, places, -1).argsort(dim=1, stable=True)[:, -int(real.sum(dim=1).max()) :]
    layer.dropped = session.show([i], places.gather(1, order), types.gather(1, order), rows=False).dropped
    order = order[:, None, : -session.length].to(layer.aside[0].device)  # the new columns are not in the cache yet
    parts: Any = zip(layer.aside, (layer.keys, layer.values), strict=True)
    layer.keys, layer.values = take([torch.cat(part, dim=2) for part in parts], order)
    layer.aside = None
