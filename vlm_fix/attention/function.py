"""The attention function that a wrapped model calls: plain SDPA for all rows, then the edited rows written over it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..session import Rows, Session
from .kernel import edited_heads, edited_rows

NAME = "vlm_fix"  # must not contain "flash": transformers would take it for FlashAttention


def register() -> None:
    """Make NAME known. The mask function is registered too: without it a padded batch silently gets no mask."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, q, D], key and value [B, Hkv, K, D] -> [B, q, H, D]."""

    def plain() -> tuple[torch.Tensor, None]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    handle = getattr(module, "_vlm_fix", None)  # absent on attention modules outside the language model
    session: Session | None = handle.engine.session if handle else None
    if handle is None or session is None:
        return plain()
    if handle.engine.joint:
        return handle.engine.joint.attention(attention, module, query, dropout, scaling, **kwargs), None
    session = session.at(handle.layer)
    edits, first = _active(handle, session, query, key)
    whole = first == 0 and query.shape[2] == 1 and all(mask is None for _, _, mask in edits)
    by_weights = any(any(map(edit.edits, ("logits", "weights", "see"))) for edit, _, _ in edits)
    # under autograd the rows are written even if they are only seen, so that gradients reach the weights
    writes = torch.is_grad_enabled() or any(
        any(map(edit.edits, ("logits", "weights", "heads"))) for edit, _, _ in edits
    )
    probe = None if session.plain else handle.engine.probe
    if not (edits and whole and by_weights and writes) or session.tap:
        output = plain()[0]
        if session.tap:
            session.tap(handle.layer, output.transpose(1, 2))
    else:
        output = torch.empty(query.shape[0], 1, query.shape[1], value.shape[-1], dtype=query.dtype, device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if probe and not by_weights:
        start = probe.first_row(session)
        note = functools.partial(probe.weights, handle.layer, session, start)
        edited_rows(query[:, :, start:], *_visible(key, value, query, attention_mask, start), scale, [], note)
    if not edits:
        if probe:
            probe.heads(handle.layer, session, output)
        return output, None
    if by_weights:
        see = functools.partial(probe.weights, handle.layer, session, first) if probe else None
        windowed = query.shape[2] > 1 and kwargs.get("sliding_window") is not None
        visible = _visible(key, value, query, attention_mask, first)
        for edit, view, _ in edits:
            if edit.edits("scan"):
                edit.scan(query[:, :, first:], key, visible[2], scale, view)
        rows = edited_rows(query[:, :, first:], *visible, scale, edits, see, windowed)
    else:
        rows = edited_heads(output[:, first:].transpose(1, 2), edits)
    if writes:
        rows = rows.transpose(1, 2).to(output.dtype)
        touched = _union(edits)
        if touched is not None:
            rows = torch.where(touched[:, :, None, None], rows, output[:, first:])
        output = output.clone() if output.requires_grad else output
        output[:, first:] = rows
    if probe:
        probe.heads(handle.layer, session, output)
    return output, None


def _active(handle: Any, session: Session, query: torch.Tensor, key: torch.Tensor) -> tuple[list[Any], int]:
    """The edits of this layer that touch rows of this forward, with their views and row masks, and the first such row."""
    chosen, count = [], query.shape[2]
    for edit in () if session.plain else handle.engine.edits[handle.layer]:
        if not edit.acts_in(session.branch):
            continue
        firsts = [
            f if v >= 0 or not edit.needs_image else count
            for f, v in zip(session.first_rows(edit.rows), session.last_visual, strict=True)
        ]
        if min(firsts) < count:
            chosen.append((edit, firsts))
    if not chosen:
        return [], count
    first = min(min(firsts) for _, firsts in chosen)
    positions = torch.arange(session.start + first, session.start + count, device=query.device)
    edits = []
    for edit, firsts in chosen:
        handle.engine.touched.add(edit)
        mask = None
        if max(firsts) > first:
            rows = torch.arange(first, count, device=query.device)
            mask = rows[None] >= torch.tensor(firsts, device=query.device)[:, None]
        masks = session.masks(key.shape[2], query.device)  # a model may be spread over several devices
        edits.append((edit, Rows(handle.layer, session, edit, positions, **masks), mask))
    return edits, first


def _visible(
    key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, mask: torch.Tensor | None, first: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and the mask of the rows from `first` on; no mask means causal, as SDPA reads it."""
    if mask is not None:
        return key, value, mask[:, :, first:, : key.shape[2]]
    count, width = query.shape[2], key.shape[2]
    if count == 1:
        return key, value, None
    columns = torch.arange(width, device=key.device)
    return key, value, (columns[None] <= torch.arange(first, count, device=key.device)[:, None])[None, None]


def _union(edits: list[Any]) -> torch.Tensor | None:
    masks = [mask for _, _, mask in edits]
    if any(mask is None for mask in masks):
        return None
    return torch.stack(masks).any(dim=0)
