"""The images of a prompt as segments of equal rank: their columns, their places, and who sees whom."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch

from vlm_fix import VlmFixError
from vlm_fix.families import attention_modules
from vlm_fix.families.compat import cache_of
from vlm_fix.methods.procedures.pictures import ONE_RUN, image_blocks
from vlm_fix.pruning.rows import Seen, half_turned, is_turned
from vlm_fix.session import PAD, Session
from vlm_fix.wing import engine_of


def check(session: Session, embeds: torch.Tensor, places: torch.Tensor) -> None:
    """VlmFixError for images that are no single run of tokens, and for other embeddings of positions than plain rotary ones."""
    family, language = session.call.family, engine_of(session.call.model).language
    if family.cells not in ONE_RUN:
        raise VlmFixError(
            f"pine needs each image as one run of tokens, not in tiles or from a resampler ({family.name})."
        )
    rotary, attn = getattr(language, "rotary_emb", None), next(iter(attention_modules(language).values()))
    if rotary is None or len(inspect.signature(rotary.forward).parameters) != 2:
        raise VlmFixError(f"pine needs one rotary embedding for all layers, which {family.name} has not.")
    tables = tuple(t.to(embeds.dtype) for t in turns(session, places))
    whole = tables[0].shape[-1] == getattr(attn, "head_dim", None)
    if not whole or not is_turned(Seen(attn, embeds, (tables[0], tables[1]), None, places)):
        raise VlmFixError(f"pine needs a plain rotary embedding of whole heads, which {family.name} has not.")


def segments_of(session: Session, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """segment [B, n], lengths and ahead [B, M] (see PINEMemory) of a prompt at the positions [B or 1, n]."""
    blocks = image_blocks(session.call)
    times, most = len(session.types) // len(blocks), max(map(len, blocks))
    segment = torch.zeros(session.types.shape, dtype=torch.long)
    lengths, ahead = torch.zeros(2, len(segment), max(1, most), dtype=torch.long)
    for row, at in enumerate(places.expand(len(segment), -1).tolist()):
        own = blocks[row // times]
        if len(own) < 2:
            continue
        edges = [*(first for first, _ in own), own[-1][1]]
        for m, (first, last) in enumerate(itertools.pairwise(edges)):
            segment[row, first:last] = m + 1
            lengths[row, m], ahead[row, m] = at[last] - at[first], at[edges[-1]] - at[last]
    return tuple(x.to(session.types.device) for x in (segment, lengths, ahead))  # type: ignore[return-value]


def allowed(session: Session, kwargs: dict[str, Any], segment: torch.Tensor) -> torch.Tensor:
    """[B, 1, n, K] booleans: causal without padding, and all of the other images."""
    text, cache = session.call.model.config.get_text_config(), cache_of(kwargs)
    windows = {*(getattr(text, "layer_types", None) or ["full_attention"])} != {"full_attention"}
    if windows or getattr(text, "sliding_window", None) or not session.call.family.causal:
        raise VlmFixError("pine's mask needs full causal attention in every layer; use pine:mask=false on this model.")
    columns, real = torch.arange(segment.shape[1], device=segment.device), (session.types != PAD).to(segment.device)
    images = (segment[:, :, None] > 0) & (segment[:, None] > 0) & (segment[:, :, None] != segment[:, None])
    allowed = ((columns <= columns[:, None]) & real[:, None]) | images | (columns == columns[:, None])
    width = cache.get_mask_sizes(session.length, 0)[0] if cache is not None else len(columns)
    return torch.nn.functional.pad(allowed, (0, max(0, width - len(columns))))[:, None]


def turns(session: Session, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, q, D] of positions, of length 1."""
    language = engine_of(session.call.model).language
    x = language.get_input_embeddings().weight[:1, :1].float()
    if session.call.family.mrope:
        places = places[-3:] if places.dim() == 3 else places.expand(3, *places.shape)
    cos, sin = language.rotary_emb(x.to(places.device), places)
    size = getattr(language.rotary_emb, "attention_scaling", 1.0)
    return cos.float() / size, sin.float() / size


def turned(session: Session, x: torch.Tensor, offset: int) -> torch.Tensor:
    """x [H, r, D], turned on by `offset` positions."""
    cos, sin = turns(session, torch.tensor([[offset]], device=x.device))
    return half_turned(x[None], cos.to(x), sin.to(x))[0]


def image_weights(z: torch.Tensor, segment: torch.Tensor, own: int = 0) -> torch.Tensor:
    """z [H, r, n] without positions -> s [H, r, M]: softmax over the images' columns but those of `own`, mean over each."""
    a = z.masked_fill((segment == 0) | (segment == own), -torch.inf).softmax(dim=-1)
    return torch.stack([a[..., segment == m + 1].mean(dim=-1) for m in range(int(segment.max()))], dim=-1)


def stood_back(s: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """s [..., M] -> how many positions each image stands before the last place: those of the images with a higher s."""
    order = s.argsort(dim=-1, descending=True, stable=True)
    size = lengths[order]
    return torch.zeros_like(s).scatter(-1, order, (size.cumsum(dim=-1) - size).to(s))
