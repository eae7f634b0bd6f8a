"""The rows of one step that go together: a chunk of one prompt, or the decode rows of several requests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from vlm_fix.attention.function import with_edited_rows
from vlm_fix.attention.inputs import AttentionInputs
from vlm_fix.attention.plan import Plan, plan_of
from vlm_fix.attention.strategies import AttentionPath, LayerWork
from vlm_fix.attention.wing import LayerHandle
from vlm_fix.session import Session

from .engine import ServedEngine
from .sessions import BatchSession

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Group:
    """B requests of one engine with q rows each; `tokens` are their places among the step's, request by request."""

    engine: ServedEngine
    session: Session
    tokens: list[int]
    requests: list[int]  # their rows in the batch
    columns: int  # K, of the longest
    spans: list[tuple[int, int]] | None = None
    """By request, the first of its columns among the step's tokens and how many there are; None: some lie in pages alone"""
    blocks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # see `pages`
    masks: dict[torch.device, torch.Tensor | None] = field(default_factory=dict)  # see `mask`
    replaced: dict[int, bool] = field(default_factory=dict)  # see `replaces`
    blank: torch.Tensor | None = None  # in place of keys, while only their number is asked for

    @functools.cached_property
    def index(self) -> slice | torch.Tensor:
        """The places of its tokens."""
        first, last = self.tokens[0], self.tokens[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.tokens) else torch.tensor(self.tokens)

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] of the step -> [B, q, ...]; a view where the tokens lie in one piece."""
        return x[self.index].view(-1, self.session.length, *x.shape[1:])

    def put(self, x: torch.Tensor, new: torch.Tensor) -> None:
        """Write [B, q, ...] to its places in the step's [tokens, ...]."""
        x[self.index] = new.reshape(-1, *x.shape[1:])

    def pages(self, table: torch.Tensor, width: int) -> torch.Tensor:
        """[B, n] blocks of `width` columns of its requests; found once a step for all layers with this table."""
        place = table.data_ptr(), width
        if place not in self.blocks:
            rows = torch.tensor(self.requests, device=table.device)
            self.blocks[place] = table[rows, : -(-self.columns // width)].long()
        return self.blocks[place]

    @functools.cached_property
    def columns_at(self) -> slice | torch.Tensor:
        """The places of its columns among the step's tokens: one piece, or [B, K] with an end's repeated behind it."""
        assert self.spans is not None
        first, count = self.spans[0]
        if self.spans == [(first + i * count, count) for i in range(len(self.spans))]:
            return slice(first, first + count * len(self.spans))
        firsts, counts = torch.tensor(self.spans).T[:, :, None]
        return firsts + torch.minimum(torch.arange(self.columns), counts - 1)

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [tokens, Hkv, D] of this forward -> those of its columns [B, Hkv, K, D], without a page."""
        at = self.columns_at
        return (x[at].view(-1, self.columns, *x.shape[1:]) if isinstance(at, slice) else x[at]).transpose(1, 2)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """[B, 1, q, K] True where its rows may look; None if they may look everywhere. Made once a step."""
        if device not in self.masks:
            session = self.session
            if isinstance(session, BatchSession):
                made = session.seen(self.columns, device)
            elif session.length == 1:
                made = None
            else:
                rows = torch.arange(session.start, session.start + session.length, device=device)
                made = (torch.arange(self.columns, device=device) <= rows[:, None])[None, None]
            self.masks[device] = made
        return self.masks[device]

    def plan(
        self, layer: int, query: torch.Tensor, scaling: float, softcap: float | None
    ) -> tuple[Plan | None, AttentionInputs]:
        """What is to be done in a layer, and its inputs, of which the keys are still to be found; query [tokens, H, D].

        The engine must be acting.
        """
        handle = LayerHandle(self.engine, layer, self.engine.attention.stacks[layer], AttentionPath.AUTO)
        q = self.pick(query).transpose(1, 2)
        if self.blank is None:
            self.blank = q.new_empty(1).expand(1, 1, self.columns, 1)
        kwargs = {"softcap": softcap} if softcap else {}
        inputs = AttentionInputs(None, q, self.blank, self.blank, None, scaling, 0.0, kwargs)  # type: ignore[arg-type]
        return plan_of(handle, self.session, inputs, recorded=False), inputs

    def edit(
        self,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        gather: Callable[[Group], KeysValues],
        scaling: float,
        softcap: float | None,
    ) -> None:
        """Write the edited rows over `output` [tokens, H, D], as one layer made them; query [tokens, H, D].

        gather: keys and values [B, Hkv, K, D] of a group, asked for where scores are needed.
        """
        with self.engine.acting(self.session):
            plan, inputs = self.plan(layer, query, scaling, softcap)
            if plan is None:
                return
            if plan.stages.need_weights:
                inputs.key, inputs.value = gather(self)
                inputs.mask = self.mask(query.device)
                inputs.module = _module(inputs.query.shape[1] // inputs.key.shape[1])
            self._write(plan, layer, inputs, output)

    def replaces(self, layer: int, query: torch.Tensor, scaling: float, softcap: float | None) -> bool:
        """True if `edit` writes all of its rows in a layer without asking what they were. Found once a step for a stack."""
        stack = self.engine.attention.stacks[layer]
        if id(stack) not in self.replaced:
            found = False
            if stack:
                with self.engine.acting(self.session):
                    plan, _ = self.plan(layer, query, scaling, softcap)
                if plan is not None and plan.edits_all_rows and not plan.keeps_rows:
                    found = plan.stages.need_weights and plan.stages.change_output
            self.replaced[id(stack)] = found
        return self.replaced[id(stack)]

    def _write(self, plan: Plan, layer: int, inputs: AttentionInputs, output: torch.Tensor) -> None:
        known = self.pick(output)
        work = LayerWork(
            inputs, plan.for_layer(layer, self.session), plan.first, self.session.forward, AttentionPath.AUTO
        )
        work.known_output = known
        new = with_edited_rows(plan, work)
        if new is not known or not isinstance(self.index, slice):
            self.put(output, new)


def _module(groups: int) -> Any:
    """What transformers' SDPA function reads of an attention module."""
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)
