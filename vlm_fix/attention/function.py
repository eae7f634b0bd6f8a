"""The attention function that a wrapped model calls: plain SDPA for all rows, then the edited rows written over it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_fix import compiled as graph
from vlm_fix.checkpointing import refuse_unknown
from vlm_fix.memory import ForwardCache
from vlm_fix.method import shaped
from vlm_fix.projections import ask
from vlm_fix.recorder import Done, Recorder
from vlm_fix.session import Session

from .inputs import AttentionInputs
from .kernel import edited_rows, edited_weights
from .plan import Plan, plan_of
from .stages import NO_EDITS, LayerEdits
from .strategies import LayerWork, unedited

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
    ask(module, query, key)
    handle: Any = module._vlm_fix
    engine, layer = handle.engine, handle.layer
    session: Session | None = engine.session
    inputs = AttentionInputs(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if session is None:
        refuse_unknown()
        return unedited(inputs, ForwardCache(), handle.path), None
    if engine.joint:
        return engine.joint.attention(attention, module, query, dropout, scaling, **kwargs), None
    if engine.along is not None and not session.plain:
        more = {"dropout": dropout, "scaling": scaling, **kwargs}
        return engine.along.attention(edited_attention, module, query, key, value, attention_mask, **more), None
    session = session.at(layer)
    recorder: Recorder | None = engine.recorder
    if recorder and recorder.layers is not None and layer not in recorder.layers:
        recorder = None
    plan = None if session.plain else plan_of(handle, session, inputs, recorder is not None)
    if plan is None and recorder is None:
        return unedited(inputs, session.forward, handle.path), None

    edits = plan.for_layer(layer, session) if plan else NO_EDITS
    first = plan.first if plan else 0
    inputs = _without_masked_columns(inputs, edits)
    for i, reader in edits.stages.query_key_readers:
        reader.read_queries_and_keys(inputs.rows_from(first), edits.rows[i])
    work = LayerWork(inputs, edits, first, session.forward, handle.path)
    if recorder:
        _record_unedited(inputs, recorder, layer, session, first if edits.stages.need_weights else query.shape[2])
        work.record = functools.partial(recorder.weights, layer, session, first)
    output = with_edited_rows(plan, work) if plan else work.output()
    if recorder:
        recorder.heads(layer, session, output)
        if layer == recorder.last and session.plain:
            raise Done
    return output, None


def with_edited_rows(plan: Plan, work: LayerWork) -> torch.Tensor:
    """The layer's output [B, q, H, D] under the plan; `work.known_output`, if it is there, is written over."""
    if plan.strategy is None:
        return work.output()
    work.keeps_rows = plan.keeps_rows and not torch.is_grad_enabled()
    rows = plan.strategy(work).transpose(1, 2).to(work.inputs.query.dtype)
    # under autograd the rows are written even if they are only read, so that gradients reach the weights
    if not (plan.stages.change_output or torch.is_grad_enabled()):
        return work.output()
    if plan.edits_all_rows:
        return rows
    output = work.output()
    if plan.reached is not None:
        rows = torch.where(plan.reached[:, :, None, None], rows, output[:, plan.first :])
    output = output.clone() if output.requires_grad else output
    output[:, plan.first :] = rows
    return output


def _without_masked_columns(inputs: AttentionInputs, edits: LayerEdits) -> AttentionInputs:
    """The inputs with a mask that leaves out what the column maskers mask."""
    for i, masker in edits.stages.maskers:
        gone = masker.mask_columns(functools.partial(_unedited_weights, inputs), edits.rows[i])
        if gone is None:
            continue
        rows = inputs.query[:, 0, :, :1].expand(-1, -1, inputs.key.shape[2])  # [B, q, K]
        shaped(gone, rows, masker, "mask_columns", broadcast=True)
        seen, allowed = ~gone[:, None], inputs.allowed(0)
        if allowed is not None and allowed.dtype != torch.bool:
            inputs = replace(inputs, mask=allowed.masked_fill(~seen, -torch.inf))
        else:
            inputs = replace(inputs, mask=seen if allowed is None else allowed & seen)
    return inputs


def _unedited_weights(inputs: AttentionInputs, first: int) -> torch.Tensor:
    return edited_weights(inputs.rows_from(first))


def _record_unedited(inputs: AttentionInputs, recorder: Recorder, layer: int, session: Session, end: int) -> None:
    """Show the recorder the weights of the rows it asks for, up to `end`: those that are read, but not edited."""
    start = recorder.first_row(session)
    if start < end:
        edited_rows(inputs.rows_from(start, end), record=functools.partial(recorder.weights, layer, session, start))
