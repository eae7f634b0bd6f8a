"""Hooks on the decoder layers of vLLM's language model, for methods that look at or change what flows between them."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.hidden.wing import STAGES, writers

if TYPE_CHECKING:
    from .worker import Served

NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.")


def decoder_layers(runner: Any) -> Any:
    """The layers of the language model."""
    language = runner.model.get_language_model()
    return getattr(language, "model", language).layers


def attention_layers(runner: Any) -> dict[str, Any]:
    """Name -> attention layer of the language model, in order; towers have attention of another kind."""
    language = runner.model.get_language_model()
    own = {id(module) for module in language.modules()}
    context = runner.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if id(layer) in own and hasattr(layer, "impl")}


def install(served: Served) -> None:
    """Number the attention layers and put the hooks that the server's engine needs on the others."""
    for name in attention_layers(served.runner):
        found = NUMBER.search(name)
        if found is None:
            raise VlmFixError(f"the attention layer {name} has no number, so that methods cannot be served here.")
        served.numbers[name] = int(found[1])
    for handle in served.handles:
        handle.remove()
    served.handles = []
    if not served.engine.needs["hooks on layers"]:
        return
    exits = {i for edit in served.engine.logit_edits for i in edit.exits}
    for i, layer in enumerate(decoder_layers(served.runner)):
        if served.engine.attention.readers[i] or i in exits:
            look = functools.partial(_look, served, i, i in exits)
            served.handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
        if served.engine.hidden is None:
            continue
        for what, module in writers(layer).items():
            if any(i in e.sees and isinstance(e, STAGES[what]) and e.acts_at(what) for e in served.engine.hidden.edits):
                served.handles.append(module.register_forward_hook(functools.partial(_write, served, what, i)))


def _look(served: Served, number: int, exits: bool, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Show a layer's input, hidden states and residual added, to the methods that read it."""
    if not served.groups and not (exits and served.current):
        return
    given = dict(zip(("positions", "hidden_states", "residual"), args, strict=False)) | kwargs
    hidden, residual = given["hidden_states"], given["residual"]
    x = hidden if residual is None else hidden + residual
    if exits and served.current is not None:
        served.next_tokens.inputs[number] = x
    for group in served.groups:
        for reader in group.engine.attention.readers[number]:
            if reader.acts_in(group.session.branch):
                with group.engine.acting(group.session):
                    reader.read_layer_input(group.pick(x), number, group.session)


def _write(served: Served, what: str, number: int, module: Any, args: Any, output: Any) -> Any:
    """A module's output [tokens, C] with the edited rows in it."""
    if not served.groups:
        return None
    if not isinstance(output, torch.Tensor):
        raise VlmFixError(
            f"{type(module).__name__} of vLLM writes more than one tensor, and hidden states cannot be edited there."
        )
    changed = None
    for group in served.groups:
        wing = group.engine.hidden
        if wing is None:
            continue
        edits = [
            (e, getattr(e, what))
            for e in wing.edits
            if number in e.sees and isinstance(e, STAGES[what]) and e.acts_at(what)
        ]
        with group.engine.acting(group.session):
            new = wing.edit(edits, number, group.pick(output)) if edits else None
        if new is not None:
            changed = output.clone() if changed is None else changed
            group.put(changed, new)
    return changed
