"""What a `Searcher` works with: prompts with their cache, which its own search extends, copies and rolls back.

generate runs the search as its `custom_generate`, so that inputs, logits processors and stopping criteria are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of
from vlm_fix.options import GenerateOptions
from vlm_fix.wing import Host

from .kinds import Searcher
from .search import Search

REFUSED = {
    "assistant_model": "leave it out",
    "prompt_lookup_num_tokens": "leave it out",
    "assistant_early_exit": "leave it out",
    "custom_generate": "leave it out",
    "cache_implementation": "leave it out",
    "prefill_chunk_size": "leave it out",
    "guidance_scale": "leave it out",
    "num_return_sequences": "call generate once for each",
}


def refuse(method: Searcher, options: GenerateOptions) -> None:
    """VlmFixError, before anything is computed, if generate was asked for something the search does not do."""
    without = f"{method.name} decodes with a loop of its own, which does not support"
    for name, advice in {**REFUSED, **method.refuses}.items():
        value = options.setting(name)
        if value is True or (value and value != 1):
            raise VlmFixError(f"{without} {name}: {advice}.")
    if options.kept is not None:
        raise VlmFixError(f"{without} a cache of an earlier turn: pass the whole conversation as one prompt.")
    if cache_of(options.kwargs) is not None and options.cache_kind != "dynamic":
        raise VlmFixError(f"{without} a cache of kind {options.cache_kind}: leave it out, or pass a DynamicCache.")
    if options.setting("use_cache") is False:
        raise VlmFixError(f"{method.name} needs the cache; drop use_cache=False.")


def run(host: Host, method: Searcher, call: Call, streamer: Any) -> Callable[..., Any]:
    """The `custom_generate` of generate that runs `method`."""

    def loop(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Any:
        inputs.pop("synced_gpus", None)
        found = method.search(
            Search(host, call, input_ids, logits_processor, stopping_criteria, generation_config, streamer, inputs)
        )
        if streamer is not None:
            streamer.end()
        return found

    return loop
