"""The largest batch that fits in the memory of the device, for --batch-size auto."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks import Sample, Task

from .generation import batches, generate, readable
from .plan import Run

LARGEST, ON_CPU = 64, 8


def largest(fits: Callable[[int], bool], most: int = LARGEST) -> int:
    """Return the largest power of two up to `most` that fits, at least 1, trying from 1 upwards."""
    size = 1
    while size < most and fits(2 * size):
        size *= 2
    return size


def choose(
    model: Any,
    processor: Any,
    settings: Settings,
    tasks: Sequence[Task],
    plan: Sequence[Run],
    calibration: Sequence[Any],
) -> int:
    """Try the longest prompts with answers of full length in every run; on a CPU, where memory is not what ends a batch, 8."""
    if model.device.type != "cuda":
        return ON_CPU

    def fits(size: int) -> bool:
        for run in plan:
            if run.imitates:
                continue  # noise in place of a contrast needs no more than the contrast
            with run.applied(model, calibration):
                for task in tasks:
                    if not _fits(model, processor, batches(task.samples, size)[-1], settings, task, run, size):
                        return False
        return True

    return largest(fits, min(LARGEST, max(len(task.samples) for task in tasks)))


def _fits(
    model: Any, processor: Any, longest: Sequence[Sample], settings: Settings, task: Task, run: Run, size: int
) -> bool:
    import dataclasses

    how = dataclasses.replace(settings, **dict(run.decoding)).generate_kwargs(task.max_new_tokens)
    images, prompts = readable(longest)
    if not images:
        return True
    again = -(-size // len(images))  # the last batch may be a short one
    try:
        with warnings.catch_warnings(action="ignore"):
            full = {**how, "min_new_tokens": how["max_new_tokens"]}
            generate(model, processor, (images * again)[:size], (prompts * again)[:size], settings.seed, **full)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
