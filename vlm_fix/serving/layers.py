"""Hooks on the decoder layers of vLLM's language model, for methods that look at or change what flows between them."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.families import final_norm
from vlm_fix.hidden.wing import STAGES, mlp_of, writers

if TYPE_CHECKING:
    from .engine import ServedEngine
    from .worker import Served

NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.")


def decoder_layers(runner: Any) -> Any:
    """The layers of the language model."""
    return language_of(runner).layers


def attention_layers(runner: Any) -> dict[str, Any]:
    """Name -> attention layer of the language model, in order; towers have attention of another kind."""
    language = runner.model.get_language_model()
    own = {id(module) for module in language.modules()}
    context = runner.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if id(layer) in own and hasattr(layer, "impl")}


def window(layer: Any) -> int | None:
    """How many columns a row of an attention layer sees at most, its own among them; None: all."""
    size = getattr(layer, "sliding_window", None)
    return size if size and size > 0 else None


def install(served: Served) -> None:
    """Number the attention layers and put the hooks that the server's engine needs on the others."""
    served.window = min(filter(None, map(window, attention_layers(served.runner).values())), default=None)
    for name in attention_layers(served.runner):
        found = NUMBER.search(name)
        if found is None:
            raise VlmFixError(f"the attention layer {name} has no number, so that methods cannot be served here.")
        served.numbers[name] = int(found[1])
    for handle in served.handles:
        handle.remove()
    served.handles = []
    engine = served.engine
    if not engine.needs["hooks on layers"]:
        return
    exits = {i for edit in engine.logit_edits for i in edit.exits}
    for i, layer in enumerate(decoder_layers(served.runner)):
        for what, module in places(served.runner, i).items() if engine.hidden is not None else ():
            if not _edits(engine, what, i):
                continue
            if what.endswith("_input"):
                hook = functools.partial(_write_input, served, what, i)
                served.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                served.handles.append(module.register_forward_hook(functools.partial(_write, served, what, i)))
        if engine.attention.readers[i] or i in exits:
            look = functools.partial(_look, served, i, i in exits)
            served.handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))


def places(runner: Any, i: int) -> dict[str, Any]:
    """Layer i's modules by place, as `vlm_fix.hidden.wing.places` has those of transformers."""
    layers = decoder_layers(runner)
    made = {
        "layer_input": layers[i],
        "mlp_input": mlp_of(layers[i]),
        "mlp_raw": mlp_of(layers[i]),
        **writers(layers[i]),
    }
    return made | ({"final_output": final_norm(language_of(runner))} if i == len(layers) - 1 else {})


def language_of(runner: Any) -> Any:
    """The language model without its head."""
    language = runner.model.get_language_model()
    return getattr(language, "model", language)


def _edits(engine: ServedEngine, what: str, number: int) -> list[Any]:
    """The edits of a layer at a place, each with what it does there."""
    edits = engine.hidden.edits if engine.hidden is not None else ()
    return [
        (e, getattr(e, what)) for e in edits if number in e.sees and isinstance(e, STAGES[what]) and e.acts_at(what)
    ]


def _stream(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """A decoder layer's arguments by name, and the residual stream [tokens, C] that comes to it."""
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    hidden, residual = given["hidden_states"], given.get("residual")
    return given, hidden if residual is None else hidden + residual


def _look(served: Served, number: int, exits: bool, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Show a layer's input, hidden states and residual added, to the methods that read it."""
    if not served.groups and not (exits and served.current):
        return
    _, x = _stream(module, args, kwargs)
    if exits and served.current is not None:
        served.next_tokens.inputs[number] = x
    for group in served.groups:
        for reader in group.engine.attention.readers[number]:
            if reader.acts_in(group.session.branch):
                with group.engine.acting(group.session):
                    reader.read_layer_input(group.pick(x), number, group.session)


def _edited(served: Served, what: str, number: int, x: torch.Tensor) -> torch.Tensor | None:
    """x [tokens, C] with the edited rows written over a copy; None if no row is edited."""
    changed = None
    for group in served.groups:
        edits = _edits(group.engine, what, number)
        if not edits or group.engine.hidden is None:
            continue
        with group.engine.acting(group.session):
            new = group.engine.hidden.edit(edits, number, group.pick(x))
        if new is not None:
            changed = x.clone() if changed is None else changed
            group.put(changed, new)
    return changed


def _write_input(served: Served, what: str, number: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The arguments of a decoder layer, or of its MLP, with the edited rows in the first."""
    if not served.groups:
        return None
    if what == "layer_input":
        given, x = _stream(module, args, kwargs)
        new = _edited(served, what, number, x)
        return None if new is None else ((), {**given, "hidden_states": new, "residual": None})
    new = _edited(served, what, number, args[0] if args else next(iter(kwargs.values())))
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): new})


def _write(served: Served, what: str, number: int, module: Any, args: Any, output: Any) -> Any:
    """A module's output [tokens, C] with the edited rows in it.

    A decoder layer's is (hidden, residual), which the next norm adds; the final norm's has the sum behind it.
    """
    if not served.groups:
        return None
    if isinstance(output, torch.Tensor):
        return _edited(served, what, number, output)
    if what == "layer_output":
        new = _edited(served, what, number, output[0] + output[1])
        return None if new is None else (new, torch.zeros_like(output[1]), *output[2:])
    if what == "final_output":
        new = _edited(served, what, number, output[0])
        return None if new is None else (new, *output[1:])
    raise VlmFixError(
        f"{type(module).__name__} of vLLM writes more than one tensor, and hidden states cannot be edited there."
    )


def last_row(output: Any) -> torch.Tensor:
    """The residual stream after a layer, or what a module of it makes, in the last row: float32 [1, C]."""
    x = output if isinstance(output, torch.Tensor) else output[0] + output[1]
    return x[-1:].float()
