"""What attention edits need on a model: a handle for the attention function and hooks that read layer inputs."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch

from vlm_fix import compiled
from vlm_fix.errors import VlmFixError
from vlm_fix.families import attention_modules
from vlm_fix.families.compat import all_rows, cache_of
from vlm_fix.method import Method
from vlm_fix.scope import check_scopes
from vlm_fix.session import Session
from vlm_fix.tensors import one_stream
from vlm_fix.wing import Host, Wing, idle_reason

from .edits import (
    AttentionEdit,
    ColumnMasker,
    HeadEdit,
    LayerInputReader,
    LogWeightEdit,
    PromptStart,
    QueryKeyReader,
    ScoreEdit,
    WeightEdit,
    WeightReader,
)
from .function import edited_attention
from .strategies import AttentionPath

STAGES = ScoreEdit | LogWeightEdit | WeightEdit | HeadEdit | WeightReader | ColumnMasker  # of the attention function

E = TypeVar("E", bound=AttentionEdit)


@dataclass(frozen=True)
class LayerHandle:
    """What the attention function finds on an attention module."""

    engine: Host
    layer: int
    stack: list[AttentionEdit]  # equal stacks of several layers are one list
    path: AttentionPath


class AttentionWing(Wing):
    """The active attention edits, layer by layer. It is always there: the attention function finds the engine by it."""

    order = 20
    runs = (*typing.get_args(STAGES), LayerInputReader, QueryKeyReader, PromptStart)
    path = AttentionPath.AUTO

    def __init__(self, host: Host):
        super().__init__(host)
        self.edits = [m for m in host.active if isinstance(m, AttentionEdit)]
        staged: list[AttentionEdit] = [edit for edit in self.edits if isinstance(edit, STAGES)]
        stacks = self._by_layer(staged)
        self.stacks = [next(s for s in stacks if s == stack) for stack in stacks]
        self.readers = self._by_layer([edit for edit in self.edits if isinstance(edit, LayerInputReader)])

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        return cls(host)

    def _by_layer(self, edits: list[E]) -> list[list[E]]:
        """Those of `edits` that act in each layer."""
        return [[edit for edit in edits if i in (edit.layers or ())] for i in range(self.host.arch.depth)]

    def check(self) -> None:
        self.host.need_all_heads([edit.name for edit in self.edits])
        self.host.need_image_columns([edit.name for edit in self.edits if edit.needs_image])
        check_scopes(self.edits)
        kinds = {m.name for m in self.host.active if getattr(m, "contrasts", False)}
        alone = [edit.name for edit in self.edits if edit.branch == "negative"]
        if alone and not kinds:
            raise VlmFixError(f"{alone[0]}: branch=negative needs a contrast method beside it, as in vcd.")

    def one_graph(self, rows: int) -> bool:
        return True

    def install(self) -> Iterable[Any]:
        yield from all_rows(self.host.language)
        if any(isinstance(edit, PromptStart) for edit in self.edits):
            yield self.host.language.register_forward_pre_hook(self._widen, with_kwargs=True)
            yield self.host.language.register_forward_hook(self._narrow, with_kwargs=True)
        for i, attn in attention_modules(self.host.language).items():
            attn._vlm_fix = LayerHandle(self.host, i, self.stacks[i], self.path)
            yield _Attribute(attn, "_vlm_fix")
            self.host.attention_functions[i] = functools.partial(edited_attention, attn)
        for i, layer in enumerate(self.host.language.layers):
            if self.readers[i]:
                self.host.callbacks["watch", i] = functools.partial(self._show, i)
                hook = functools.partial(self._watch, i)
                yield layer.register_forward_pre_hook(hook, with_kwargs=True)

    def on_prompt(self, session: Session) -> None:
        for edit in self.edits:
            if isinstance(edit, PromptStart) and edit.acts_in(session.branch):
                edit.on_prompt(session, session.call)

    def _widen(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        x = kwargs.get("inputs_embeds")
        if x is None or compiled.tracing(self.host, x.shape[1]):
            return None
        return self._with_rows_along(args, kwargs)

    @compiled.uncompiled
    def _with_rows_along(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        along = self.host.along
        return None if along is None or self.host.editing is None else (args, along.widen(kwargs))

    def _narrow(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = kwargs.get("inputs_embeds")
        if x is not None and not compiled.tracing(self.host, x.shape[1]):
            self._without_rows_along(kwargs, output)

    @compiled.uncompiled
    def _without_rows_along(self, kwargs: dict[str, Any], output: Any) -> None:
        if self.host.along is not None and self.host.editing is not None:
            self.host.along.narrow(output, cache_of(kwargs))

    def _watch(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        x = args[0] if args else kwargs["hidden_states"]
        new = compiled.through(self.host, "watch", layer, x, x.shape[1])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})

    def _show(self, layer: int, x: torch.Tensor) -> None:
        """Show a layer's input [B, q, C] to the edits that ask for it."""
        if self.host.editing is None:
            return
        sessions = self.host.joint.sessions if self.host.joint else [self.host.editing]
        for session, rows in zip(sessions, x.chunk(len(sessions)), strict=True):
            for edit in (e for e in self.readers[layer] if e.acts_in(session.branch)):
                edit.read_layer_input(one_stream(rows, edit.name), layer, session.at(layer))

    def unused(self, session: Session) -> Iterator[tuple[Method, str]]:
        for edit in dict.fromkeys(edit for stack in self.stacks for edit in stack):
            if not (edit in self.host.touched and edit.changed_something(session)):
                yield edit, idle_reason(edit, session)


@dataclass
class _Attribute:
    """An attribute put on a module, to be taken off like a hook."""

    module: Any
    name: str

    def remove(self) -> None:
        vars(self.module).pop(self.name, None)
