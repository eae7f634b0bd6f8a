"""Set up the model for a spec: with methods, on Hugging Face's eager attention, or with its classifier-free guidance."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

import vlm_fix


@contextlib.contextmanager
def running(model: Any, spec: str) -> Iterator[dict[str, Any]]:
    """Set up the model for `spec`, and yield the extra arguments of generate."""
    if spec == "hf-cfg":
        words = list(range(10, 20))
        yield {"guidance_scale": 1.1, "negative_prompt_ids": torch.tensor([words], device=model.device)}
        return
    name, _, edited = spec.partition(" @ ")
    with eager() if edited == "eager" else contextlib.nullcontext(), vlm_fix.wrapped(model, name.split("+")):
        yield {}


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Make wrapped models compute every layer's attention with Hugging Face's eager code, which forms all weights."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    from vlm_fix import launches
    from vlm_fix.attention import function, inputs

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        count, width = query.shape[2], key.shape[2]
        if mask is None and count > 1:
            mask = torch.ones(count, width, dtype=torch.bool, device=key.device).tril(width - count)[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill(~mask, -torch.inf)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return eager_attention_forward(module, query, key, value, mask, scaling=scaling)

    with contextlib.ExitStack() as patches:
        patches.callback(launches.use, launches.use(False))
        for module in (function, inputs):
            patches.enter_context(unittest.mock.patch.object(module, "sdpa_attention_forward", attention))
        yield
