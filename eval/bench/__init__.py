"""Benchmark speed and memory of methods, as ratios to the unwrapped model, in one run on one machine.

`vlm-fix bench attention|decode|prune` builds a model of a known shape with random weights (speed does not depend on the
values) and times every method of a kind in interleaved rounds: in each round the unwrapped model runs right before the
method, and the ratio is taken between these two. The table shows the median, lowest and highest ratio. Columns:

  first token     seconds from the call of generate to its first token: vision tower, pruning scores and prefill
  tokens/s        after the first token, greedy, without an end token
  peak memory     of the allocator in a run of two new tokens: CUDA's own; on a CPU, torch.profiler's memory events
  kept, KV MB     pruning: visual columns left in the cache, mean over layers, and the size of the cache after prefill
  scoring         time to the first token minus that of random_tokens with the same budget, or, for cache methods, minus
                  the unwrapped model's. Blank for pruning inside the language model, where it cannot be separated

`attention` also times every attention edit with Hugging Face's eager attention in all layers, as in the papers' own code
("pai @ eager"); `decode` also times Hugging Face's classifier-free-guidance processor ("hf-cfg").
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import vlm_fix
from vlm_fix import registry
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run.loading import check_device

from .clock import enough, peak_mb
from .measuring import add_scoring, measure
from .models import IMAGE, SHAPES, Shape, build
from .output import table, write
from .specs import KINDS, chosen, methods_of, spec_of

__all__ = ["KINDS", "SHAPES", "Shape", "build", "methods_of", "peak_mb", "run", "spec_of", "table", "write"]


def run(
    kind: str,
    shape: str = "small",
    methods: list[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    new_tokens: int = 32,
    rounds: int = 3,
    keep: tuple[float, ...] = (192, 64),
    seed: int = 0,
    tick: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure one kind of methods and return settings, hardware and rows. `tick(total)` is called after each method."""
    if shape not in SHAPES:
        raise VlmFixError(f"--shape {shape!r} is not one of {', '.join(SHAPES)}.")
    enough(new_tokens, rounds)
    check_device(device)
    for spec in methods or []:
        if spec != "hf-cfg":
            registry.parse(spec.partition(" @ ")[0].split("+"))
    where = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    )
    kinds = {"auto": torch.bfloat16 if where.type == "cuda" else torch.float32}
    weights = kinds.get(dtype) or getattr(torch, dtype)
    net, inputs = build(SHAPES[shape], where, weights, seed)
    depth = net.config.get_text_config().num_hidden_layers
    specs = chosen(kind, methods or [], depth, keep)
    rows = measure(net, inputs, specs, new_tokens, rounds, functools.partial(tick, len(specs)) if tick else None)
    if kind == "prune":
        add_scoring(rows)
    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU"
    )
    return {
        "bench": kind,
        "shape": shape,
        "dtype": str(weights).removeprefix("torch."),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "visual_tokens": int((inputs["input_ids"] == IMAGE).sum()),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seed": seed,
        "hardware": name,
        "threads": torch.get_num_threads(),
        "versions": {
            "vlm-fix": vlm_fix.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
