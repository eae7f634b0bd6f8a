"""Greedy and sampling, faster: one decode step of all branches as one batch, so that the weights are read once.

The main branch's forward is widened to the rows of all branches; attention alone runs branch by branch, each on its own
cache, mask and edits. A step that guesses wrong (it never does under greedy and sampling) is noticed by the processor,
which compares the tokens and lets the branch catch up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache

from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.families import prompt_positions
from vlm_fix.families.compat import CACHE_NAMES, cache_of, is_latent, set_cache, with_cache
from vlm_fix.hidden.edit import HiddenEdit
from vlm_fix.session import PAD, TEXT, Session, View
from vlm_fix.wing import Host, JointForward

from . import few_rows
from .kinds import Contrast, LogitEdit

UNUSED = {"attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw"}  # once positions are given
KNOWN = {"input_ids", "position_ids", *CACHE_NAMES, "use_cache", "return_dict"} | UNUSED


def joinable(
    host: Host, session: Session, branches: list[Any], args: Any, kwargs: dict[str, Any], gated: bool = False
) -> bool:
    """True for a plain decode step of one token per row, with every branch right behind it.

    gated: some steps may do without the branches, which is less work yet where rows one after the other are as fast.
    """
    cache, ids = cache_of(kwargs), kwargs.get("input_ids")
    return (
        not args
        and session.length == 1
        and ids is not None
        and type(cache) is DynamicCache
        and not cache.offloading
        and host.keeps_columns(cache)
        and not is_latent(host.model)
        and not any(v is not None and v is not False for k, v in kwargs.items() if k not in KNOWN)
        and "position_ids" not in session.call.inputs
        # one row after the other is faster than few at once where a float32 vector product has its own kernel
        and (
            not (len(ids) == 1 and ids.device.type == "cpu" and host.model.dtype == torch.float32)
            or (few_rows.applies(1 + len(branches), ids.device, host.model.dtype) and not gated)
        )
        and all(isinstance(m, AttentionEdit | Contrast | LogitEdit) for m in host.active)
        and not any(isinstance(m, HiddenEdit) for m in host.active)
        and all(
            b.tokens is not None
            and len(b.tokens) == len(ids)
            and session.start == session.prompt_len + b.tokens.shape[1]
            for b in branches
        )
    )


class JointCache(Cache):
    """Looks like the main cache; new keys go to each branch's own."""

    def __init__(self, caches: list[Any]):
        super().__init__(layers=caches[0].layers)
        self.caches = caches

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(self.caches)
        parts = zip(self.caches, key_states.chunk(count), value_states.chunk(count), strict=True)
        own, *_ = [cache.update(k, v, layer_idx, *args, **kwargs) for cache, k, v in parts]
        return own


class Joint(JointForward):
    """The joined forwards of one call: row block 0 is the main branch, block i the i-th second branch."""

    def __init__(self, host: Host, main: Session, branches: list[Any], cache: Any):
        self.host, self.branches = host, branches
        self.caches = [cache, *(b.cache for b in branches)]
        self.sessions = [main, *(host.sessions[b.cache] for b in branches)]
        self.padded = [bool((s.types == PAD).any()) for s in self.sessions]
        self.masks: list[torch.Tensor | None] = []
        self.few: few_rows.FewRows | None = None  # while a step of few rows runs
        _, first = prompt_positions(host.model, host.family, main.call.inputs)
        first = first.repeat_interleave(len(branches[0].tokens) // len(first))
        self.first = torch.cat([first, *(b.next_position.to(first.device) for b in branches)])[:, None]

    def widen(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a forward for all branches; `attention` adds the masks."""
        ids, step = kwargs["input_ids"], self.branches[0].tokens.shape[1]
        for branch, session in zip(self.branches, self.sessions[1:], strict=True):
            session.answer = torch.cat([branch.tokens, ids], dim=1)
            text = torch.full_like(ids, TEXT, dtype=torch.uint8)
            session.advance(session.types.shape[1], text.to(session.types.device), text=True)
        pairs = zip(self.sessions, self.padded, strict=True)
        self.masks = [(s.types != PAD)[:, None, None] if padded else None for s, padded in pairs]
        self.ids, self.host.joint = ids, self
        if few_rows.applies(len(ids) * len(self.sessions), ids.device, self.host.model.dtype):
            self.few = few_rows.FewRows()
            self.few.__enter__()
        positions = self.first + step
        inputs = {
            **{k: v for k, v in kwargs.items() if k not in UNUSED},
            "input_ids": ids.repeat(len(self.sessions), 1),
            "position_ids": positions.expand(3, -1, -1) if self.host.family.mrope else positions,
        }
        return with_cache(inputs, JointCache(self.caches))

    def prepare(
        self, edit: Callable[[Session, dict[str, Any]], dict[str, Any]], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The language model's inputs after `edit(session, inputs)` of each branch's own rows."""
        count = len(self.sessions)
        rows = zip(kwargs["inputs_embeds"].chunk(count), kwargs["position_ids"].chunk(count, dim=-2), strict=True)
        own = [
            edit(session, {**kwargs, "inputs_embeds": x, "position_ids": positions})
            for session, (x, positions) in zip(self.sessions, rows, strict=True)
        ]
        embeds, positions = ([k[name] for k in own] for name in ("inputs_embeds", "position_ids"))
        return {**kwargs, "inputs_embeds": torch.cat(embeds), "position_ids": torch.cat(positions, dim=-2)}

    def attention(
        self, function: Callable[..., Any], module: Any, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[n B, H, 1, D] -> [n B, 1, H, D], each branch over its own cache."""
        host, outputs = self.host, list[torch.Tensor]()
        blocks = zip(self.sessions, self.caches, self.masks, query.chunk(len(self.sessions)), strict=True)
        host.joint = None
        try:
            for host.session, cache, mask, q in blocks:
                layer = cache.layers[module.layer_idx]
                assert host.session is not None
                view = host.session.at(module.layer_idx)
                mask = view.attention_mask(q.device) if isinstance(view, View) else mask
                mask = mask if mask is None else mask.to(q.device)
                outputs.append(function(module, q, layer.keys, layer.values, mask, *args, **kwargs)[0])
        finally:
            host.session, host.joint = self.sessions[0], self
        return torch.cat(outputs)

    def leave(self) -> None:
        """The step is over, whether it came to its end or not."""
        self.host.joint = None
        if self.few is not None:
            self.few.__exit__(None, None, None)
            self.few = None

    def split(self, output: Any) -> Any:
        """Split the joint output: hand each branch its logits and return the main branch's output."""
        self.leave()
        logits = output.logits.chunk(len(self.sessions))
        for branch, session, own in zip(self.branches, self.sessions[1:], logits[1:], strict=True):
            branch.pending, branch.tokens = own[:, -1], session.answer
        output.logits = logits[0]
        set_cache(output, self.caches[0])
        return output
