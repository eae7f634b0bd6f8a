"""The arguments of one `generate` call, read once."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CompileConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of, kind_of
from vlm_fix.processors import StreamerApart, kept_apart


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `function`, a `generate`, by name, its first one as "inputs". TypeError as Python raises it."""
    signature = inspect.signature(function)
    kinds = {p.kind for p in signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # the caller's own, which hands everything on
        signature = inspect.signature(functools.partial(GenerationMixin.generate, None))
    first, given = next(iter(signature.parameters)), dict[str, Any]()
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given["inputs" if name == first else name] = value
    return given


@dataclass
class GenerateOptions:
    """What `generate` was asked for. Wings change `kwargs`, and add what happens to the output."""

    model: Any
    ids: torch.Tensor  # [B, L] the caller's prompt
    kwargs: dict[str, Any]  # by keyword, without the prompt
    finish: list[Callable[[Any], Any]] = field(default_factory=list)  # applied to the output

    @classmethod
    def read(cls, model: Any, kwargs: dict[str, Any]) -> GenerateOptions:
        """From arguments by name. Raises VlmFixError where the prompt's token ids are missing."""
        inputs = kwargs.pop("inputs", None)
        given = kwargs.pop("input_ids", None)
        if inputs is not None and given is not None:
            raise VlmFixError("the prompt is given twice, by position and as input_ids: leave one of them out.")
        ids = inputs if given is None else given
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            raise VlmFixError(_no_prompt(ids, kwargs))
        options = cls(model, ids, kwargs)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = options.inferred_mask()
        return options

    def setting(self, name: str) -> Any:
        """An option as `generate` will use it: an argument, else the generation config's."""
        if name in self.kwargs:
            return self.kwargs[name]
        value = getattr(self.kwargs.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def inferred_mask(self) -> torch.Tensor:
        """[B, L] the mask that transformers infers where none is given: padding is masked unless it may end an answer."""
        pad, eos = self.setting("pad_token_id"), self.setting("eos_token_id")
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        if pad is None or int(pad) in ends:
            return torch.ones_like(self.ids)
        return (self.ids != int(pad)).to(self.ids.dtype)

    @property
    def kept(self) -> Any:
        """The cache of an earlier turn; None without one, and for an empty one, such as `generate` makes itself."""
        cache = cache_of(self.kwargs)
        return cache if cache is not None and cache.get_seq_length() else None

    @property
    def cache_kind(self) -> str:
        """What the cache is or will be: "dynamic", or another `cache_implementation`."""
        cache = cache_of(self.kwargs)
        if cache is None:
            return self.setting("cache_implementation") or "dynamic"
        return kind_of(cache)

    @property
    def assisted(self) -> bool:
        """True if tokens are drafted and then checked."""
        return self.kwargs.get("assistant_model") is not None or bool(self.setting("prompt_lookup_num_tokens"))

    @property
    def beams(self) -> int:
        """Beams of a beam search, 1 without one."""
        return self.setting("num_beams") or 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The prompt's model inputs."""
        return {**{k: v for k, v in self.kwargs.items() if isinstance(v, torch.Tensor)}, "input_ids": self.ids}

    def keep_apart(self, outside: Callable[[], AbstractContextManager[None]]) -> None:
        """Let the caller's own code, which may run the model, run in `outside()`; transformers' is told by its type."""
        kwargs = self.kwargs
        for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
            if given := kwargs.get(name):
                kwargs[name] = kind(f if _transformers_own(f) else kept_apart(f, outside) for f in given)
        if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
            kwargs["prefix_allowed_tokens_fn"] = kept_apart(allowed, outside)
        if (streamer := kwargs.get("streamer")) is not None and not _transformers_own(streamer):
            kwargs["streamer"] = StreamerApart(streamer, outside)

    def final_kwargs(self, one_graph: bool = False) -> dict[str, Any]:
        """The keyword arguments for the model's own `generate`; one_graph: its decode steps can be one compiled graph.

        A static cache compiles by itself on an accelerator, into CUDA graphs, which replay no Python. What is one graph is
        compiled without them, the rest not at all.
        """
        kwargs = dict(self.kwargs)
        if self.setting("compile_config") is not None:
            return kwargs
        compiles = one_graph and self.cache_kind == "static" and compiles_by_itself(self.model)
        name, value = ("compile_config", CompileConfig(mode="default")) if compiles else ("disable_compile", True)
        if (config := kwargs.get("generation_config")) is None:
            kwargs.setdefault(name, value)
        else:
            kwargs["generation_config"] = config = copy.deepcopy(config)
            setattr(config, name, value)
        return kwargs


def compiles_by_itself(model: Any) -> bool:
    """True where transformers compiles the decode steps of a static cache unasked."""
    return model.device.type in ("cuda", "xpu", "neuron", "tpu")


def _transformers_own(function: Any) -> bool:
    return type(function).__module__.startswith("transformers.")


def _no_prompt(ids: Any, kwargs: dict[str, Any]) -> str:
    """What to write, where `ids` are no prompt [B, L]."""
    if isinstance(ids, Mapping):
        return "the processor's output is handed over by name: write generate(**inputs), with two stars."
    if isinstance(ids, torch.Tensor):
        return (
            f"input_ids must be a tensor [rows, length], not of shape {list(ids.shape)}; one prompt is input_ids[None]."
        )
    if ids is not None:
        return f'input_ids must be a tensor, not {type(ids).__name__}: give the processor return_tensors="pt".'
    if kwargs.get("inputs_embeds") is None:
        return "generate needs a prompt: write generate(**inputs) with the processor's output."
    return "pass the prompt as input_ids (the processor's output); inputs_embeds alone hide where the images are."
