"""Dropping the keys and values of visual tokens, layer by layer and head by head, once the prompt has been read.

The prompt itself is computed in full; a hook on each self-attention then thins out its cache, and later steps get a mask
of their own. Every layer keeps reporting the sequence's length, so that generate counts as before. A method may thin out
further as the answer grows, and lay columns aside that only some steps compute.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of
from vlm_fix.memory import Memory
from vlm_fix.packing import left_pack
from vlm_fix.projections import Heard
from vlm_fix.session import PAD, VISUAL, Session, View
from vlm_fix.wing import Host

from .after import check_model
from .cache import Owner, ShortLayer, SplitLayer, take
from .columns import ImageColumns
from .kinds import Cached, CachePruner
from .rows import Seen


def check(host: Host, cacher: CachePruner) -> None:
    """Raise VlmFixError for decoders that do not go with the pruner."""
    check_model(host, cacher, prompt=False)


def install(host: Host, cacher: CachePruner) -> Iterator[Any]:
    """The hooks of a CachePruner."""
    owner = Owner()
    yield owner

    def enter(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session, cache = host.editing, cache_of(kwargs)
        if session is None or not session.start or not isinstance(session.at(i), View):
            return None
        if cacher.wanders and cache is not None:
            cacher.before_step(session, i, cache.layers[i])
        x, view = args[0] if args else kwargs["hidden_states"], session.at(i)  # another view after before_step
        assert isinstance(view, View)
        return args, {**kwargs, "attention_mask": view.attention_mask(x.device)}

    def leave(i: int, heard: Heard | None, attn: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session, cache, query = host.editing, cache_of(kwargs), heard.taken() if heard else None
        if session is None or max(session.last_visual) < 0:
            return
        if session.start and not (cacher.wanders and isinstance(session.at(i), View)):
            return
        if cache is None:
            raise VlmFixError(f"{cacher.name} prunes the cache, but this call has none: drop use_cache=False.")
        x, layer = args[0] if args else kwargs["hidden_states"], cache.layers[i]
        types = session.at(i).types if session.start else session.types
        seen = Seen(attn, x, kwargs["position_embeddings"], layer.keys, kwargs.get("position_ids"))
        valid = types.to(x.device) != PAD
        cached = Cached(host, i, session, seen, layer.keys, layer.values, valid, query)
        with torch.no_grad():
            if session.start:
                cacher.after_step(cached, layer)
                return
            waiting = session.memory(cacher, Waiting)
            waiting.scores[i] = cacher.scores(cached)
            if not cacher.together or i == max(cacher.layers or ()):
                images = session.part(ImageColumns).images.to(cached.valid.device)
                scores, waiting.scores = waiting.scores, {}
                for j, keep in cacher.choose({k: v.to(images.device) for k, v in scores.items()}, images).items():
                    keep = keep | ((images == 0) & cached.valid)[:, None]
                    cache.layers[j] = prune(cacher, cached, j, cache.layers[j], keep, scores[j])
                    cache.layers[j].owner = owner

    assert isinstance(cacher.layers, tuple)
    for i in cacher.layers:
        layer = host.language.layers[i]
        yield layer.register_forward_pre_hook(functools.partial(enter, i), with_kwargs=True)
        heard = Heard(layer.self_attn) if cacher.wanders else None
        if heard:
            yield heard
        yield layer.self_attn.register_forward_hook(functools.partial(leave, i, heard), with_kwargs=True)


def prune(
    cacher: CachePruner, cached: Cached, i: int, layer: Any, keep: torch.Tensor, scores: torch.Tensor
) -> ShortLayer:
    """Layer i of the cache after the prompt, with the columns `keep` [B, Hkv or 1, n], which session.views[i] then tells."""
    short = (SplitLayer if cacher.wanders else ShortLayer).of(layer, 0)  # refuses what cannot be thinned out
    assert short.keys is not None
    index = shorten(cached.session, i, short, keep.to(short.keys.device))
    if cacher.rewrites:
        cacher.rewrite(cached, short, scores, cached.session.part(ImageColumns).images.to(scores.device))
    if isinstance(short, SplitLayer):
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


@dataclass
class Waiting(Memory):
    """Scores of the prompt's columns by layer, until their layers are thinned out."""

    scores: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Aside(Memory):
    """Columns of one layer that lie beside its cache, left-padded: which are real, and their places in the session."""

    real: torch.Tensor | None = None  # bool [B, n]
    places: torch.Tensor | None = None  # int64 [B, n]


def lay_aside(session: Session, i: int, layer: SplitLayer, core: torch.Tensor, aside: Aside) -> None:
    """The next steps compute text and the visual columns `core` [B, m] alone; `aside` remembers what else is stored."""
    view = session.at(i)
    types = view.types.to(core.device)
    away = (types == VISUAL) & ~core
    if not away.any():
        return
    index, aside.real = left_pack(away)
    aside.places = view.places().to(core.device).gather(1, index)
    layer.aside = take((layer.keys, layer.values), index[:, None])
    shorten(session, i, layer, ((types != PAD) & ~away)[:, None])


def take_back(session: Session, i: int, layer: SplitLayer, aside: Aside) -> None:
    """The coming step computes all that is stored, in order again."""
    if layer.aside is None:
        return
    assert aside.real is not None and aside.places is not None
    view = session.at(i)
    device, types = view.types.device, view.types
    stored = aside.real.to(device)
    real = torch.cat([stored, types != PAD], dim=1)
    types = torch.cat([stored.to(types.dtype) * VISUAL, types], dim=1)
    places = torch.cat([aside.places.to(device), view.places()], dim=1)
    order = torch.where(real, places, -1).argsort(dim=1, stable=True)[:, -int(real.sum(dim=1).max()) :]
    layer.dropped = session.show([i], places.gather(1, order), types.gather(1, order), rows=False).dropped
    order = order[:, None, : -session.length].to(layer.aside[0].device)  # the new columns are not in the cache yet
    parts: Any = zip(layer.aside, (layer.keys, layer.values), strict=True)
    layer.keys, layer.values = take([torch.cat(part, dim=2) for part in parts], order)
    layer.aside = None


def answer_step(session: Session) -> int:
    """1 for the first step after the prompt."""
    return session.start - session.prompt_len + 1
