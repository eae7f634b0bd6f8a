"""Measure seconds, tokens/s and memory of one call of generate."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers


class _Clock(transformers.StoppingCriteria):
    """Stopping criterion that never stops; it records the time of every token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.start = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(model: Any, inputs: dict[str, Any], tokens: int, **kwargs: Any) -> tuple[float, float]:
    """Return the seconds to the first token and the tokens/s after it, of one greedy generate."""
    clock = _Clock(inputs["input_ids"].device)

    def run(new: int) -> float:
        model.generate(**inputs, max_new_tokens=new, do_sample=False, stopping_criteria=[clock], **kwargs)
        return clock.now()

    end = run(tokens)
    if len(clock.times) >= tokens:
        first, last = clock.times[0], clock.times[tokens - 1]
        return first - clock.start, (tokens - 1) / (last - first)
    whole = end - clock.start  # a loop that is not token by token: subtract a run of one token
    first = run(1) - end
    return first, (tokens - 1) / max(whole - first, 1e-9)


def peak_mb(run: Callable[[], Any], device: torch.device) -> float:
    """Return the peak memory of `run` above what was allocated before, in MB (10^6 bytes)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e6
