"""The list of benchmarks. Tables, pages and the command line go through it; a new benchmark is added here.

What `vlm-fix eval` asks for a benchmark is in `tasks/`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from . import amber, beaf, chair, dash_b, hallusion, listed, mme, opope, pope, pope_prob, reefknot
from .benchmark import Benchmark, Layout

MODULES = (pope, chair, amber, mme, hallusion, dash_b, beaf, reefknot, opope, pope_prob)
BENCHMARKS: dict[str, Benchmark] = {
    made.name: made for made in (*(module.BENCHMARK for module in MODULES), listed.FOHE, listed.R_BENCHMARK)
}
LAYOUTS: dict[str, Layout] = {task: each for made in BENCHMARKS.values() for task, each in made.layouts.items()}
PLAIN = {"unparsed", "misread", "length", "n", "failed"}
"""Figures that are numbers; all others are fractions."""
LOWER = {"chair_s", "chair_i", "chair", "hal", "cog", "ig", "sb_yes", "sb_no", "id"}
"""Figures of which less is better."""
NEITHER = {"yes_ratio"}
"""Figures of which neither more nor less is better."""


def better(name: str, change: float) -> bool | None:
    """Return whether a change of the figure `name` is for the better; None if it is neither."""
    return None if name in NEITHER or not change else (change < 0) == (name in LOWER)


def groups(task: str) -> Collection[str]:
    """Return the parts of a task that no mean counts, as their answers are in other parts."""
    return getattr(LAYOUTS[task].answers, "groups", ()) if task in LAYOUTS else ()


def once(task: str, parts: Iterable[str]) -> list[str]:
    """Return the parts that share no answer: without those of `groups`, and without the total where there are others."""
    apart = [part for part in parts if part not in groups(task)]
    total = getattr(LAYOUTS[task].answers, "total", "")
    return [part for part in apart if part != total] or apart


def scorer_of(settings: Mapping[str, Any], task: str) -> str:
    """Return the scorer or variant that judged a task, as its data or else the settings name it."""
    return settings["data"][task].get("variant", settings["scorer"])


def scorer_and_commit(settings: Mapping[str, Any], task: str) -> str:
    """Return the scorer of a task with the commit that it follows, such as "official, RUCAIBox/POPE@3df3ba1"."""
    name = scorer_of(settings, task)
    made = next(benchmark for benchmark in BENCHMARKS.values() if task in benchmark.layouts)
    return f"{name}, {made.commits[name]}" if name in made.commits else name
