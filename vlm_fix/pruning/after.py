"""Dropping visual tokens inside the language model, before the input of chosen layers, in one or several stages.

A pre-hook on each layer behind a drop gives it fewer hidden states, their rotary tables and a mask of its own; the cache
of each layer is as long as what reached it, and layer 0's keeps reporting the length that generate counts with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of, is_latent
from vlm_fix.memory import Memory
from vlm_fix.method import Method, shaped
from vlm_fix.packing import left_pack
from vlm_fix.projections import Heard
from vlm_fix.session import PAD, SLACK, VISUAL, Session, View
from vlm_fix.wing import Host

from . import deepstack
from .cache import Owner, ShortLayer
from .columns import ImageColumns
from .kinds import LayerPruner, Tokens
from .rows import Seen, at_columns

AHEAD = "bidirectional image attention"
FIXED = ("default", "linear", "llama3", "yarn")  # rotary embeddings that do not look at the longest position


def check_model(host: Host, method: Method, prompt: bool = True) -> None:
    """Refuse decoders with sliding windows and, for what acts in the prompt, those that tie image tokens to their places."""
    config = host.model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    reason = ""
    if others:
        reason = "sliding windows" if "sliding_attention" in others else " and ".join(sorted(others)).replace("_", " ")
    seen = getattr(config, "use_bidirectional_attention", None) or "gemma" in config.model_type
    if prompt and (seen or not host.family.causal):
        reason = reason or AHEAD
    if prompt and "moe_mm_token_type_ids" in inspect.signature(host.language.forward).parameters:
        reason = "experts, which are chosen by what a token shows"
    if hasattr(config, "attn_temperature_tuning"):  # Llama 4
        reason = reason or "queries, which are scaled by how many keys the cache holds"
    if is_latent(host.model):
        reason = "latent attention, whose cache holds no keys"
    if reason:
        raise refusal(method, reason)


def refusal(method: Method, reason: str) -> VlmFixError:
    """The error for a decoder that tokens cannot be dropped in."""
    return VlmFixError(
        f"{method.name} does not work with this model's {reason}; use a pruner that acts before the language model."
    )


def sees_ahead(mask: torch.Tensor | None, types: torch.Tensor) -> bool:
    """True if a row of a prompt, of `types` [B, n], may look at a later column: mask [B or 1, 1, n, n], None: causal."""
    if mask is None or mask.dim() != 4:
        return False
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    return bool((allowed.triu(1) & (types != PAD).to(mask.device)[:, None, :, None]).any())


def check(host: Host, dropper: LayerPruner) -> None:
    """Raise VlmFixError for decoders, positions or stages that do not go with the pruner."""
    check_model(host, dropper)
    if host.family.mrope and dropper.renumbers:
        raise VlmFixError(
            f"{dropper.name}: positions=compact has no meaning for M-RoPE's 3-D positions; use positions=original."
        )
    stages, depth = dropper.stages, host.arch.depth
    if not stages or any(not 0 <= s < depth for s in stages) or list(stages) != sorted(set(stages)):
        raise VlmFixError(
            f"{dropper.name} drops tokens before layers {', '.join(map(str, stages)) or '(none)'}; name layers between 0 "
            f"and {depth - 1}, each once, ascending."
        )


@dataclass
class Entered(Memory):
    """What a later stage may ask about the prompt: what entered the first layer [B, n, C], and the layer before the stage."""

    first: torch.Tensor | None = None
    seen: Seen | None = None


def install(host: Host, dropper: LayerPruner) -> Iterator[Any]:
    """The hooks of a LayerPruner."""
    layers, stages, owner = host.language.layers, dropper.stages, Owner()
    yield owner

    def enter(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = host.editing
        if session is None:
            return None
        given, stage = args[0] if args else kwargs["hidden_states"], stages.index(i) if i in stages else None
        x = deepstack.add(session, i, given)
        if i == 0 and session.start == 0:
            session.memory(dropper, Entered).first = x
        if stage is not None and session.start == 0 and max(session.last_visual) >= 0:
            x = drop(host, dropper, session, i, stage, module, x, kwargs)
        view = session.at(i)
        if not isinstance(view, View):
            if x is given:
                return None
            return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})
        tables = rotary(host, dropper, view, x, kwargs["position_embeddings"])
        places = positions(dropper, view, kwargs.get("position_ids"))
        mask = view.attention_mask(x.device)
        changed = {"attention_mask": mask, "position_embeddings": tables, "position_ids": places}
        return (x, *args[1:]) if args else (), {**kwargs, **changed} | ({} if args else {"hidden_states": x})

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = host.editing
        return None if session is None or session.start else (args, deepstack.take(session, kwargs))

    def note(i: int, attn: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session, cache, queries = host.editing, cache_of(kwargs), heard[i].taken() if i in heard else None
        if session is None or session.start or max(session.last_visual) < 0:
            return
        view = session.at(i)
        if i == 0 and cache is not None:
            cache.layers[0] = ShortLayer.of(cache.layers[0], view.dropped if isinstance(view, View) else 0, owner)
        x = args[0] if args else kwargs["hidden_states"]
        keys = cache.layers[i].keys if cache is not None else None
        if i + 1 in stages:
            tables, places = kwargs["position_embeddings"], kwargs.get("position_ids")
            session.memory(dropper, Entered).seen = Seen(attn, x, tables, keys, places, queries)

    noted, deep = {s - 1 for s in stages if s} | {0}, deepstack.depths(host)
    if deep:
        yield host.language.register_forward_pre_hook(take, with_kwargs=True)
    for i, layer in enumerate(layers):
        if i >= stages[0] or i <= deep:
            yield layer.register_forward_pre_hook(functools.partial(enter, i), with_kwargs=True)
    # what the module made is kept: when it is wanted, a sharded model has put its weights away
    heard = {stage - 1: Heard(layers[stage - 1].self_attn) for stage in stages if stage}
    yield from heard.values()
    for i in noted:
        yield layers[i].self_attn.register_forward_hook(functools.partial(note, i), with_kwargs=True)


def drop(
    host: Host, dropper: LayerPruner, session: Session, i: int, stage: int, layer: Any, x: torch.Tensor, kwargs: Any
) -> torch.Tensor:
    """Run a stage: -> the hidden states that enter layer `i`; session.views tells the later layers."""
    before, entered = session.at(i), session.memory(dropper, Entered)
    cache = cache_of(kwargs)
    if cache is not None and not isinstance(cache, DynamicCache):
        raise VlmFixError(f"{dropper.name} does not work with a {type(cache).__name__}; use the default dynamic cache.")
    if stage == 0 and sees_ahead(kwargs.get("attention_mask"), session.types):  # a family that is not in the table
        raise refusal(dropper, AHEAD)
    first = entered.first
    assert first is not None, "the first layer's hook ran"
    if isinstance(before, View):
        index = before.index[..., None].expand(-1, -1, first.shape[-1])
        first = first.gather(1, index.to(first.device))
    images = before.translate(session.part(ImageColumns).images, session).to(x.device)
    tables = rotary(host, dropper, before, x, kwargs["position_embeddings"]) if before is not session else None
    places = positions(dropper, before, kwargs.get("position_ids"))
    norm = getattr(layer, "input_layernorm", torch.nn.Identity())  # some decoders normalise what a module has made
    there = next(layer.parameters()).device
    cos, sin = (t.to(there) for t in tables or kwargs["position_embeddings"])
    own = Seen(layer.self_attn, norm(x.to(there)), (cos, sin), None, places)
    previous = entered.seen if i else None
    chosen, hidden = dropper.choose(Tokens(i, stage, x, first.to(x.device), images, before, own, previous))
    chosen = shaped(chosen, images, dropper, "choose")
    hidden = shaped(hidden, x, dropper, "choose")
    if i == dropper.stages[-1]:
        session.forget(dropper)
    types = before.types.to(x.device)
    keep = (images == 0) & (types != PAD) | (chosen & (types == VISUAL))  # a newline of a cut image belongs to no image
    if bool((keep | (types == PAD)).all()):
        return hidden
    index, mask = left_pack(keep)
    session.drop(range(i, len(host.language.layers)), index.to(before.types.device), mask.to(before.types.device))
    return hidden.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def positions(dropper: LayerPruner, view: Session, places: torch.Tensor | None) -> torch.Tensor | None:
    """Position ids [..., B, q] of this forward's rows in the columns of `view`, from those of the whole session; None: none."""
    if places is None or not isinstance(view, View):
        return places
    if dropper.renumbers:
        return renumbered(view).to(places)
    if view.start:
        return places
    return at_columns(places, view.index)


def renumbered(view: Session) -> torch.Tensor:
    """[B, q] this forward's positions without gaps for what was dropped, made once for the layers of a view."""
    if view.forward.renumbered is None:
        view.forward.renumbered = ((view.types != PAD).long().cumsum(dim=1) - 1).clamp(min=0)[:, view.start :]
    return view.forward.renumbered


def tables_of(host: Host, view: Session, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary tables of `renumbered`."""
    return host.language.rotary_emb(x, renumbered(view).to(x.device))


def tables_ahead(host: Host, view: Session, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for an answer's row, whose number grows by one each step: made for many steps at once, where they do not
    depend on the longest position so far."""
    steps = SLACK if getattr(host.language.rotary_emb, "rope_type", None) in FIXED else 1
    start, rows = view.columns.ahead.get(x.device, (0, []))
    if not 0 <= view.start - start < len(rows):
        numbers = (renumbered(view) + torch.arange(steps, device=view.types.device)).to(x.device)
        parts = (numbers, *host.language.rotary_emb(x, numbers))
        start, rows = view.start, list(zip(*(part.split(1, dim=1) for part in parts), strict=True))
        view.columns.ahead[x.device] = start, rows
    view.forward.renumbered, cos, sin = rows[view.start - start]
    return cos, sin


def rotary(
    host: Host, dropper: LayerPruner, view: Session, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, q, D] of this forward's rows in the columns of `view`, from those of the whole session."""
    if dropper.renumbers:
        known = view.forward.tables
        if x.device not in known:
            answer = view.length == 1 and view.start >= view.prompt_len
            make = tables_ahead if answer else tables_of
            known[x.device] = make(host, view, x)
        return known[x.device]
    cos, sin = (t.to(x.device) for t in tables)
    if view.start or not isinstance(view, View):
        return cos, sin
    index = view.index[..., None].to(x.device)
    cos, sin = (t.expand(len(index), -1, -1).gather(1, index.expand(-1, -1, t.shape[-1])) for t in (cos, sin))
    return cos, sin
