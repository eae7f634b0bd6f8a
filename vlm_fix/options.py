"""The arguments of one `generate` call, read once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from vlm_fix.errors import VlmFixError
from vlm_fix.processors import kept_apart

_PARAMETERS = [*inspect.signature(GenerationMixin.generate).parameters][1:]  # without self


@dataclass
class GenerateOptions:
    """What `generate` was asked for. Wings change `kwargs`, and add what happens to the output."""

    model: Any
    ids: torch.Tensor  # [B, L] the caller's prompt
    kwargs: dict[str, Any]  # by keyword, without the prompt
    finish: list[Callable[[Any], Any]] = field(default_factory=list)  # applied to the output

    @classmethod
    def read(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateOptions:
        """Raises VlmFixError where the prompt's token ids are missing."""
        kwargs = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        inputs = kwargs.pop("inputs", None)
        given = kwargs.pop("input_ids", None)
        ids = inputs if given is None else given
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            raise VlmFixError(
                "pass the prompt as input_ids (the processor's output); inputs_embeds alone hide where the images are."
            )
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

    def final_kwargs(self, outside: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
        """The keyword arguments for the model's own `generate`; the caller's processors and criteria run in `outside()`."""
        kwargs = dict(self.kwargs)
        if processors := kwargs.get("logits_processor"):
            kwargs["logits_processor"] = LogitsProcessorList(_callers(p, outside) for p in processors)
        if criteria := kwargs.get("stopping_criteria"):
            kwargs["stopping_criteria"] = StoppingCriteriaList(_callers(c, outside) for c in criteria)
        if self.setting("compile_config") is None:
            # CUDA graphs, which a static cache starts by itself, replay no Python
            if (config := kwargs.get("generation_config")) is None:
                kwargs.setdefault("disable_compile", True)
            else:
                kwargs["generation_config"] = config = copy.deepcopy(config)
                config.disable_compile = True
        return kwargs


def _callers(function: Any, outside: Callable[[], AbstractContextManager[None]]) -> Any:
    """A processor or criterion of the caller's own, which may run the model; transformers tells its own by their type."""
    if type(function).__module__.startswith(("transformers.", "vlm_fix.")):
        return function
    return kept_apart(function, outside)
