"""The rows of one step that go together: a chunk of one prompt, or the decode rows of several requests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

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


class Looks(NamedTuple):
    """How the rows of a layer look at its columns."""

    scaling: float
    softcap: float | None
    window: int | None  # of how many columns, its own among them, a row sees the newest

    def mask(self, first: int, count: int, columns: int, device: torch.device) -> torch.Tensor:
        """[count, columns] True where the rows from column `first` on may look."""
        rows = torch.arange(first, first + count, device=device)[:, None]
        places = torch.arange(columns, device=device)
        return places <= rows if self.window is None else (places <= rows) & (places > rows - self.window)


@dataclass(slots=True)
class ServedInputs(AttentionInputs):
    """Inputs of rows of which a window may hide columns that are there."""

    hidden_columns: bool = False

    @property
    def windowed(self) -> bool:
        return self.hidden_columns


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
    blocks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)  # see `pages`
    masks: dict[tuple[Looks, torch.device], torch.Tensor | None] = field(default_factory=dict)  # see `mask`
    replaced: dict[int, bool] = field(default_factory=dict)  # see `replaces`
    blanks: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # in place of keys, while only their number is asked for

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

    @functools.cached_property
    def decodes(self) -> bool:
        """True if its rows come after the prompts."""
        return self.session.length == 1 and self.session.start >= self.session.prompt_len

    def reach(self, window: int | None) -> int:
        """How many of its newest columns a layer has: in a prompt all, later those in its window, as transformers' caches."""
        return min(self.columns, window) if window and self.decodes else self.columns

    def pages(self, table: torch.Tensor, width: int, window: int | None) -> tuple[torch.Tensor, slice]:
        """[B, n] blocks of `width` columns of its requests, and which of these columns a layer with this window has.

        Found once a step for all layers with this table.
        """
        first = self.columns - self.reach(window)
        place = table.data_ptr(), width, first // width
        if place not in self.blocks:
            rows = torch.tensor(self.requests, device=table.device)
            self.blocks[place] = table[rows, first // width : -(-self.columns // width)].long()
        return self.blocks[place], slice(first % width, first % width + self.columns - first)

    def cleared(self, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> KeysValues:
        """Keys and values [B, H, K, D] with zeros where nothing is seen: there may lie what is another's."""
        gone = self.session.start - (window or self.columns) + 1
        if isinstance(self.session, BatchSession):
            self.session.clear(keys, values)
        elif window and not self.decodes and gone > 0:  # pages that no row needs any more were given away
            keys, values = keys.clone(), values.clone()
            keys[:, :, :gone], values[:, :, :gone] = 0, 0
        return keys, values

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

    def mask(self, looks: Looks, device: torch.device) -> torch.Tensor | None:
        """[B, 1, q, K] True where its rows may look; None if they may look everywhere. Made once a step."""
        place = looks, device
        if place not in self.masks:
            session = self.session
            if isinstance(session, BatchSession):  # none of whose columns are out of a window
                made = session.seen(self.columns, device)
            elif session.length == 1 and (self.decodes or looks.window is None):
                made = None
            else:
                made = looks.mask(session.start, session.length, self.columns, device)[None, None]
            self.masks[place] = made
        return self.masks[place]

    def plan(self, layer: int, query: torch.Tensor, looks: Looks) -> tuple[Plan | None, AttentionInputs]:
        """What is to be done in a layer, and its inputs, of which the keys are still to be found; query [tokens, H, D].

        The engine must be acting.
        """
        handle = LayerHandle(self.engine, layer, self.engine.attention.stacks[layer], AttentionPath.AUTO)
        q = self.pick(query).transpose(1, 2)
        width = self.reach(looks.window)
        blank = self.blanks.get(width)
        if blank is None:
            blank = self.blanks[width] = q.new_empty(1).expand(1, 1, width, 1)
        kwargs = {"softcap": looks.softcap} if looks.softcap else {}
        hidden = looks.window is not None and not self.decodes
        inputs = ServedInputs(None, q, blank, blank, None, looks.scaling, 0.0, kwargs, hidden)  # type: ignore[arg-type]
        return plan_of(handle, self.session, inputs, recorded=False), inputs

    def edit(
        self,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        gather: Callable[[Group], KeysValues],
        looks: Looks,
    ) -> None:
        """Write the edited rows over `output` [tokens, H, D], as one layer made them; query [tokens, H, D].

        gather: keys and values [B, Hkv, K, D] of a group, asked for where scores are needed; K: as `reach` says.
        """
        with self.engine.acting(self.session):
            plan, inputs = self.plan(layer, query, looks)
            if plan is None:
                return
            if plan.stages.need_weights:
                inputs.key, inputs.value = gather(self)
                inputs.mask = self.mask(looks, query.device)
                inputs.module = _module(inputs.query.shape[1] // inputs.key.shape[1])
            self._write(plan, layer, inputs, output)

    def replaces(self, layer: int, query: torch.Tensor, looks: Looks) -> bool:
        """True if `edit` writes all of its rows in a layer without asking what they were. Found once a step for a stack."""
        stack = self.engine.attention.stacks[layer]
        if id(stack) not in self.replaced:
            found = False
            if stack:
                with self.engine.acting(self.session):
                    plan, _ = self.plan(layer, query, looks)
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
