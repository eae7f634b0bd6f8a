"""The rows of one step that go together: a chunk of one prompt, or the decode rows of several requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vlm_fix.attention.function import with_edited_rows
from vlm_fix.attention.inputs import AttentionInputs
from vlm_fix.attention.plan import Plan, plan_of
from vlm_fix.attention.strategies import AttentionPath, LayerWork
from vlm_fix.attention.wing import LayerHandle

from .engine import ServedEngine
from .sessions import BatchSession, RequestSession

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Group:
    """B requests of one engine with q rows each; `tokens` are their places among the step's, request by request."""

    engine: ServedEngine
    session: RequestSession | BatchSession
    tokens: list[int]
    requests: list[int]  # their rows in the batch
    columns: int  # K, of the longest

    @property
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

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """[B, 1, q, K] True where its rows may look; None if they may look everywhere."""
        session = self.session
        if isinstance(session, BatchSession):
            return session.seen(self.columns, device)
        if session.length == 1:
            return None
        rows = torch.arange(session.start, session.start + session.length, device=device)
        return (torch.arange(self.columns, device=device) <= rows[:, None])[None, None]

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
        handle = LayerHandle(self.engine, layer, self.engine.attention.stacks[layer], AttentionPath.AUTO)
        q = self.pick(query).transpose(1, 2)
        kwargs = {"softcap": softcap} if softcap else {}
        blank = q.new_empty(1).expand(1, 1, self.columns, 1)
        inputs = AttentionInputs(None, q, blank, blank, None, scaling, 0.0, kwargs)  # type: ignore[arg-type]
        with self.engine.acting(self.session):
            plan = plan_of(handle, self.session, inputs, recorded=False)
            if plan is None:
                return
            if plan.stages.need_weights:
                inputs.key, inputs.value = gather(self)
                inputs.mask = self.mask(q.device)
                inputs.module = _module(q.shape[1] // inputs.key.shape[1])
            self._write(plan, layer, inputs, output)

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
