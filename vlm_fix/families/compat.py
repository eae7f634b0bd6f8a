"""What differs between the supported versions of transformers. No other file spells the KV cache's name.

transformers calls the cache `past_key_values` up to 5.23 and `cache` from 5.24 on (the old name is accepted until 5.40),
in the arguments of every forward and of `generate`, and in their outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import InvalidVersion, Version
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from vlm_fix.errors import VlmFixError

OLDEST, NEWEST = "5.17", "5.24"  # of transformers: what the tests ran on, both ends included
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)})
"""The name that this transformers uses itself."""


def cache_of(arguments: Any) -> Any:
    """The KV cache among the keyword arguments of a forward or of `generate`, or in an output; None without one."""
    if isinstance(arguments, Mapping) and not dataclasses.is_dataclass(arguments):
        return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    return getattr(arguments, CACHE, None)


def kind_of(cache: Any) -> str:
    """The `cache_implementation` that makes such a cache: "dynamic", "offloaded", "quantized", "static"; else its class."""
    kinds = {QuantizedCache: "quantized", StaticCache: "static", DynamicCache: "dynamic"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(cache, cls)), type(cache).__name__)
    return "offloaded" if kind == "dynamic" and cache.offloading else kind


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The keyword arguments of a forward with `cache` as the KV cache."""
    return {**{k: v for k, v in arguments.items() if k not in CACHE_NAMES}, CACHE: cache}


def set_cache(output: Any, cache: Any) -> None:
    """Put `cache` into the output of a forward."""
    setattr(output, CACHE, cache)


def carried(inputs: Mapping[str, torch.Tensor], new: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a step of the rows `new` [B', t] takes along of its prompt's inputs: Mllama's mask of the image's tiles."""
    mask = inputs.get("cross_attention_mask")
    if mask is None:
        return {}
    last = mask[:, -1:].repeat_interleave(len(new) // len(mask), dim=0)
    return {"cross_attention_mask": last.expand(-1, new.shape[1], -1, -1)}


def all_rows(language: Any) -> list[Any]:
    """A hook that has every layer of the language model compute every row, as methods count them.

    Gemma 4 computes in the layers that share their keys only those rows whose logits are wanted.
    """
    if "logits_to_keep" not in inspect.signature(language.forward).parameters:
        return []

    def ask_for_all(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "logits_to_keep": 0}

    return [language.register_forward_pre_hook(ask_for_all, with_kwargs=True)]


def generate_of(model: Any) -> Any:
    """The model's `generate`, as a function of the model; Janus' own drops logits_processor without a word."""
    if model.config.model_type != "janus":
        return type(model).generate

    @functools.wraps(type(model).generate)
    def generate(model: Any, inputs: Any, generation_mode: str = "text", **kwargs: Any) -> Any:
        if generation_mode != "text":
            raise VlmFixError("methods act on answers in words; unwrap the model to generate images.")
        return GenerationMixin.generate(model, inputs, **{**kwargs, "guidance_scale": None})

    return generate


def cannot_run(model: Any) -> str:
    """Why this transformers cannot run the model at all, wrapped or not; empty if it can."""
    if model.config.model_type != "llama4" or hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        return ""
    if "image_outputs" in inspect.unwrap(type(model).forward).__code__.co_names:  # 5.24.0, the first that reads it
        return "its forward reads image_outputs, which its language model's output does not have; 5.23 and older run it"
    return ""


def is_latent(model: Any) -> bool:
    """True if the cache holds what keys and values are made of, not these themselves (multi-head latent attention)."""
    return getattr(model.config.get_text_config(), "kv_lora_rank", None) is not None


def keeps_columns(cache: Any) -> bool:
    """True if every layer of the cache holds the keys of all columns: no window, no running state, no codes in their place."""
    return all(
        hasattr(layer, "keys") and not getattr(layer, "is_sliding", False) and not hasattr(layer, "_quantized_keys")
        for layer in cache.layers
    )


def detach(cache: Any) -> None:
    """Cut a cache off from what computed it: keys, values, and the running states of linear attention."""
    for layer in cache.layers:
        for name, x in vars(layer).items():
            if isinstance(x, torch.Tensor):
                setattr(layer, name, x.detach())
            elif isinstance(x, dict):
                x.update({k: y.detach() for k, y in x.items() if isinstance(y, torch.Tensor)})


def versions() -> str:
    """ "transformers 5.24.0 (tested: 5.17 to 5.24)", for messages."""
    return f"transformers {transformers.__version__} (tested: {OLDEST} to {NEWEST})"


def is_tested() -> bool:
    """True if this transformers lies in the range that was tested."""
    try:
        release = Version(transformers.__version__).release[:2]
    except InvalidVersion:
        return False
    return Version(OLDEST).release <= release <= Version(NEWEST).release


def warn_if_untested() -> None:
    """Warn, once per process, on a transformers older or newer than any that was tested."""
    global _warned
    if not _warned and not is_tested():
        _warned = True
        warnings.warn(
            f"{versions()} is not a version that vlm-fix was tested on; run `vlm-fix doctor` to see whether every kind of "
            "method still acts, or install a tested version.",
            stacklevel=3,
        )


_warned = False
