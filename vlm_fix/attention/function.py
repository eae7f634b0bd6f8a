"""The attention function that a wrapped model calls: plain SDPA for all rows, then the edited rows written over it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_fix import compiled as graph
from vlm_fix.session import Rows, Session

from .apart import apart_attention
from .columns import column_attention
from .edits import AttentionEdit, Columns
from .flex import block_mask, flex_rows
from .kernel import Scores, edited_heads, edited_rows, edited_weights

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
    handle = getattr(module, "_vlm_fix", None)  # absent on attention modules outside the language model
    if handle is None:
        function: Any = sdpa_attention_forward
    elif graph.tracing(handle.engine, query.shape[2]):
        return graph.attention(handle, query, key, value, attention_mask, scaling, kwargs), None
    else:
        function = edited_attention
    return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@graph.uncompiled
def edited_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attention` of a layer of the language model."""
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"))
    fused = scores.softcap is None or _by_flex(query)  # some kernel runs all rows

    def plain() -> tuple[torch.Tensor, None]:
        if scores.softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return capped([]).transpose(1, 2).to(query.dtype), None

    def capped(forms: list[Columns]) -> torch.Tensor:
        visible = _visible(key, value, query, attention_mask, 0)
        if not fused:
            return edited_rows(query, *visible, scores, [])
        made, place = session._masks if session else {}, ("flex", id(attention_mask), key.shape[2], query.device)
        if place not in made:  # layers with and without a window take turns; the mask is kept, and its id with it
            made[place] = attention_mask, block_mask(query, key, visible[2])
        return flex_rows(query, *visible[:2], made[place][1], scores, forms)

    handle: Any = module._vlm_fix
    session: Session | None = handle.engine.session
    if session is None:
        return plain()
    if handle.engine.joint:
        return handle.engine.joint.attention(attention, module, query, dropout, scaling, **kwargs), None
    session = session.at(handle.layer)
    plan = None if session.plain else _plan(handle, session, query, key)
    probe = session.looks.get(handle.layer) if session.plain else handle.engine.probe
    if plan is None and probe is None and session.tap is None:
        return plain()
    first = plan.first if plan else 0
    edits = (
        [(e, Rows(handle.layer, session, e, plan.positions, **plan.masks), m) for e, m in plan.edits] if plan else []
    )
    for edit, view, _ in edits:
        if edit.edits("hides"):
            attention_mask = _without(edit, view, query, key, value, attention_mask, scores)
    for edit, view, _ in edits:
        if edit.edits("scan"):
            edit.scan(query[:, :, first:], key, _visible(key, value, query, attention_mask, first)[2], scores, view)
    # under autograd the rows are written even if they are only seen, so that gradients reach the weights
    writes = plan is not None and (plan.changes or torch.is_grad_enabled())
    output = None
    if not (plan and plan.whole and plan.by_weights and writes) or session.tap:
        output = plain()[0]
        if session.tap:
            session.tap(handle.layer, output.transpose(1, 2))
    start, end = probe.first_row(session) if probe else 0, first if plan and plan.by_weights else query.shape[2]
    if probe and start < end:  # rows that are looked at, but not edited
        note = functools.partial(probe.weights, handle.layer, session, start)
        allowed = _visible(key, value, query, attention_mask, start)[2]
        allowed = allowed if allowed is None else allowed[:, :, : end - start]
        edited_rows(query[:, :, start:end], key, value, allowed, scores, [], note)
    rows, kept = None, None
    if plan and plan.spares and not torch.is_grad_enabled():
        base = output
        kept = functools.cache(lambda: (plain()[0] if base is None else base)[:, first:].transpose(1, 2))
    if plan and plan.by_weights and probe is None and fused and _by_columns(plan, query.shape[2]):
        forms = [_from_first(e.form(view), first) for e, view, _ in edits if e.edits("columns")]
        if scores.softcap is None:
            rows = column_attention(
                module, query, key, value, attention_mask, scores.scaling, forms, dropout=dropout, **kwargs
            ).transpose(1, 2)
        else:
            rows = capped(forms)
        rows = edited_heads(rows[:, :, first:], edits)
    elif plan and plan.by_weights:
        see = functools.partial(probe.weights, handle.layer, session, first) if probe else None
        windowed = query.shape[2] > 1 and kwargs.get("sliding_window") is not None
        visible = _visible(key, value, query, attention_mask, first)
        if probe is None and scores.softcap is None and _by_apart(plan, query):
            rows = apart_attention(
                module, query, key, value, attention_mask, scores.scaling, *edits[0][:2], kept, **kwargs
            )
        if rows is None:
            rows = edited_rows(query[:, :, first:], *visible, scores, edits, see, windowed, kept)
    elif plan:
        assert output is not None
        rows = edited_heads(output[:, first:].transpose(1, 2), edits)
    if plan and rows is not None and writes:
        rows = rows.transpose(1, 2).to(query.dtype)
        if output is None:
            output = rows
        else:
            if plan.touched is not None:
                rows = torch.where(plan.touched[:, :, None, None], rows, output[:, first:])
            output = output.clone() if output.requires_grad else output
            output[:, first:] = rows
    assert output is not None
    if probe:
        probe.heads(handle.layer, session, output)
    return output, None


def _from_first(form: Columns, first: int) -> Columns:
    """A form of the rows from `first` on, as one of all rows."""
    return form if form.rows is None else form._replace(rows=pad(form.rows, (0, 0, first, 0), value=1.0))


def _without(
    edit: AttentionEdit,
    rows: Rows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: Scores,
) -> torch.Tensor | None:
    """The mask of all rows without the columns that `edit` hides."""

    def look(i: int) -> torch.Tensor:
        return edited_weights(query[:, :, i:], key, _visible(key, value, query, mask, i)[2], scores, [], False)

    gone = edit.hides(look, rows)
    if gone is None:
        return mask
    seen, allowed = ~gone[:, None], _visible(key, value, query, mask, 0)[2]
    if allowed is None or allowed.dtype == torch.bool:
        return seen if allowed is None else allowed & seen
    return allowed.masked_fill(~seen, -torch.inf)


@dataclass(frozen=True)
class Plan:
    """What a stack of edits does in one forward, shared by the layers that have it."""

    edits: list[
        tuple[AttentionEdit, torch.Tensor | None]
    ]  # with the rows [B, R] each applies to, None: all from `first`
    first: int
    positions: torch.Tensor  # [R]
    masks: dict[str, torch.Tensor]
    touched: torch.Tensor | None  # [B, R] rows that any edit applies to, None: all
    whole: bool  # every row is edited
    by_weights: bool  # scores or weights are needed
    changes: bool  # something is changed, not only looked at
    spares: bool  # rows may be left as they are
    linear: bool  # all that is done to scores and weights is `columns`, on the same rows


def _plan(handle: Any, session: Session, query: torch.Tensor, key: torch.Tensor) -> Plan | None:
    """The edits of this layer that touch rows of this forward; None without any."""
    stack = handle.stack
    if not stack:
        return None
    place = (id(stack), key.shape[2], query.device)  # a model may be spread over several devices
    if place not in session._masks:
        session._masks[place] = _made_plan(handle.engine, session, stack, query, key)
    return session._masks[place]


def _made_plan(
    engine: Any, session: Session, stack: list[AttentionEdit], query: torch.Tensor, key: torch.Tensor
) -> Plan | None:
    chosen, count, device = [], query.shape[2], query.device
    for edit in (e for e in stack if e.acts_in(session.branch)):
        firsts = tuple(
            f if v >= 0 or not edit.needs_image else count
            for f, v in zip(session.first_rows(edit.rows), session.last_visual, strict=True)
        )
        if min(firsts) < count:
            chosen.append((edit, firsts))
    if not chosen:
        return None
    first = min(min(firsts) for _, firsts in chosen)
    masks: dict[tuple[int, ...], torch.Tensor | None] = {}
    for _, firsts in chosen:
        rows = torch.arange(first, count, device=device)
        masks[firsts] = rows[None] >= torch.tensor(firsts, device=device)[:, None] if max(firsts) > first else None
    engine.touched.update(edit for edit, _ in chosen)
    assert session.prompt_len is not None
    prompt = session.start < session.prompt_len
    for edit, _ in chosen:
        if edit.spares == "prompt" and not prompt:
            session.state(edit)["changed", "later"] = True
    partial = [m for m in masks.values() if m is not None]
    touched = torch.stack(partial).any(dim=0) if len(partial) == len(masks) else None
    raw = {"logits", "log_weights"}
    kinds = {w for edit, _ in chosen for w in (*raw, "weights", "heads", "see") if edit.edits(w)}
    return Plan(
        [(edit, masks[firsts]) for edit, firsts in chosen],
        first,
        torch.arange(session.start + first, session.start + count, device=device),
        session.masks(key.shape[2], device),
        touched,
        whole=first == 0 and touched is None,
        by_weights=bool(kinds & {*raw, "weights", "see"}),
        changes=bool(kinds & {*raw, "weights", "heads"}),
        spares=any(edit.spares == "any" or (edit.spares == "prompt" and prompt) for edit, _ in chosen),
        linear=len(masks) == 1
        and not kinds & {"weights", "see"}
        and all(getattr(type(e), w) is getattr(AttentionEdit, w) for e, _ in chosen for w in raw),
    )


PATH = "auto"  # tests set "kernel", "columns" or "flex"


def _by_flex(query: torch.Tensor) -> bool:
    """Capped scores of a prompt: compiled on CUDA; elsewhere the row kernel forms less at once."""
    return query.shape[2] > 1 and (PATH == "flex" or (PATH == "auto" and query.is_cuda))


def _by_columns(plan: Plan, count: int) -> bool:
    """The chooser: SDPA over changed keys costs one more pass over all rows, the row kernel a few times its rows' share.

    Edits that are no `columns` always go through the kernel, in chunks of rows.
    """
    rows = count - plan.first
    return plan.linear and (PATH in ("columns", "flex") if PATH != "auto" else rows > 1 and 4 * rows >= count)


def _by_apart(plan: Plan, query: torch.Tensor) -> bool:
    """One edit with `apart` on all rows of a prompt; not below float32, where the sums would be rounded."""
    edit = plan.edits[0][0]
    alone = plan.whole and len(plan.edits) == 1 and edit.edits("apart") and not any(map(edit.edits, ("heads", "see")))
    return alone and query.shape[2] > 1 and torch.finfo(query.dtype).bits >= 32 and PATH != "kernel"


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
