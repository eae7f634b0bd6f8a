"""Measure seconds, tokens/s and memory of one call of generate."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

from vlm_fix.errors import VlmFixError


class Timing(NamedTuple):
    """One call of generate."""

    first: float  # seconds to the first token
    speed: float  # tokens/s after it
    steps: list[float]  # seconds of each token after it


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


def enough(new_tokens: int, rounds: int, least: int = 1) -> None:
    """Raise VlmFixError for fewer than two tokens, of which one comes after the first, or fewer than `least` rounds."""
    if new_tokens < 2 or rounds < least:
        alone = "" if least else " (0: memory alone)"
        raise VlmFixError(f"--new-tokens must be at least 2 and --rounds at least {least}{alone}.")


def timed(model: Any, inputs: dict[str, Any], tokens: int, **kwargs: Any) -> Timing:
    """Time one greedy generate; a loop that is not token by token has equal steps."""
    clock = _Clock(inputs["input_ids"].device)

    def run(new: int) -> float:
        model.generate(**inputs, max_new_tokens=new, do_sample=False, stopping_criteria=[clock], **kwargs)
        return clock.now()

    end = run(tokens)
    if len(clock.times) >= tokens:
        times = clock.times[:tokens]
        steps = [after - before for before, after in itertools.pairwise(times)]
        return Timing(times[0] - clock.start, (tokens - 1) / (times[-1] - times[0]), steps)
    whole = end - clock.start  # a loop that is not token by token: subtract a run of one token
    first = run(1) - end
    rest = max(whole - first, 1e-9)
    return Timing(first, (tokens - 1) / rest, [rest / (tokens - 1)] * (tokens - 1))


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
