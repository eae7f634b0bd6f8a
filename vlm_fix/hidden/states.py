"""What the layers make of a prompt in a pass without edits, for methods that must know it in advance."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.hooks import hooked, mine
from vlm_fix.recorder import Recorder
from vlm_fix.tensors import one_stream

from .wing import places


def last_rows(engine: Any, inputs: dict[str, torch.Tensor], place: str = "layer_output") -> dict[int, torch.Tensor]:
    """Layer -> what it puts out at `place` in the last row of a prompt, float32 [B, C]. One forward of the prompt."""
    if hasattr(engine, "last_rows"):  # its layers are not transformers'
        return engine.last_rows(inputs, place)
    kept: dict[int, torch.Tensor] = {}

    def keep(i: int, module: Any, args: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        kept[i] = one_stream(x, "a method that compares passes")[:, -1].float()

    layers = range(len(engine.language.layers))
    watched = [(places(engine.language, i)[place], mine(functools.partial(keep, i))) for i in layers]
    with hooked([module.register_forward_hook(hook) for module, hook in watched]):
        engine.run_prompt(inputs, Recorder())
    for i in layers:  # Mllama leaves layers out of a prompt without an image: they add nothing
        if i not in kept:
            kept[i] = kept[i - 1] if place == "layer_output" else torch.zeros_like(kept[i - 1])
    return kept


def unit_between(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(a - b) / ||a - b|| of states [B, C] of two passes in `dtype`; 0 where they differ by no more than rounding does.

    A layer may show a row nothing of the image (linear attention forgets). What is left is noise, whose direction would be
    another one beside other prompts. Linear attention adds up in float32, whatever the model's type.
    """
    floor = max(1024 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2)
    d = a - b
    real = d.norm(dim=-1, keepdim=True) > floor * torch.maximum(a.norm(dim=-1), b.norm(dim=-1))[:, None]
    return torch.nn.functional.normalize(d, dim=-1) * real


def whole_prompt(call: Call, name: str) -> dict[str, Any]:
    """The prompt with its images, for one more pass; VlmFixError where an earlier turn's images are not in the call."""
    if call.cache is not None:
        raise VlmFixError(
            f"{name} runs the whole conversation once more with all its images, which a kept cache does not hold: start "
            "this turn without the cache of the last."
        )
    return call.inputs
