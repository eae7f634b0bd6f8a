"""Log the results of an evaluation to trackio or Weights & Biases, through their own packages and settings.

Each run of the evaluation (the baseline and every method) becomes one run there, with the settings as its configuration and
figures named task/part/metric; changes against the baseline are task/part/metric/delta.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from vlm_fix.errors import VlmFixError

PROJECT = "vlm-fix"


def load(name: str) -> Any:
    """Import a tracker. Raises VlmFixError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise VlmFixError(f"--log {name} needs its package: pip install {name}, or leave --log out.") from None


def log(tracker: Any, results: Mapping[str, Any], name: str) -> None:
    """Log every run; `name` is the evaluation's, and the group of its runs."""
    for run in results["runs"]:
        tracker.init(project=PROJECT, name=f"{name}/{run}", config={**results["settings"], "run": run})
        tracker.log(figures(results, run))
        tracker.finish()


def figures(results: Mapping[str, Any], run: str) -> dict[str, float]:
    """Return task/part/metric -> value, and the speed of each task."""
    found: dict[str, float] = {}
    for task, parts in results["runs"][run].items():
        for part, scores in parts.items():
            found |= {f"{task}/{part}/{k}": v for k, v in scores.items() if isinstance(v, int | float)}
            found |= {f"{task}/{part}/{k}/delta": v["delta"] for k, v in scores["delta"].items()}
        speeds = results["speed"][run].get(task, {})
        found |= {f"{task}/{k}": v for k, v in speeds.items() if v is not None}
    return found
