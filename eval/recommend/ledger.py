"""What a search has done, step by step, on disk: an interrupted search repeats nothing and decides as it would have.

The file has a line of JSON for the settings, then one for each step: its key, the seconds since the step before it, and what came
of it. A resumed search is run again from the start, and each step that is in the file is taken from there together with its
time. As nothing but steps moves the clock, all decisions are repeated, and the first new step goes on where the last one ended.
A line that was cut off is dropped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic


class Ledger:
    """Steps and the time they took. Without a path they are kept in memory alone."""

    def __init__(self, path: Path | None, settings: dict[str, Any], resume: bool = False) -> None:
        """Raises VlmFixError for a file that is there already, unless `resume`, or that has other settings."""
        self.path, self.elapsed, self.repeated = path, 0.0, 0
        self._mark = time.monotonic()
        self._steps: list[dict[str, Any]] = []
        settings = json.loads(json.dumps(settings))
        if path is None:
            return
        if not path.exists() or not (resume or _read(path)[1]):  # a search that was stopped before its first step
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(settings) + "\n")
            return
        if not resume:
            raise VlmFixError(f"{path} is of an earlier search: add --resume to continue it, or give another --out.")
        old, self._steps = _read(path)
        for name in sorted({*settings, *old}):
            if old.get(name) != settings.get(name):
                raise VlmFixError(
                    f"{path} was made with {name} = {json.dumps(old.get(name))}, not {json.dumps(settings.get(name))}: resume "
                    "with the same settings, or give another --out."
                )
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in (old, *self._steps)))

    def since(self, started: float | None) -> None:
        """Count the time from `started`, by `time.monotonic`, instead of from when this was made."""
        self._mark = self._mark if started is None else started

    @property
    def now(self) -> float:
        """Seconds up to the last step, those before an interruption included."""
        return self.elapsed

    @property
    def seconds(self) -> float:
        """Seconds up to this moment, inside a step."""
        return self.elapsed + time.monotonic() - self._mark

    def step(self, key: list[Any], work: Callable[[], Any]) -> Any:
        """Return what `work` returns, as JSON, or returned in the interrupted search."""
        if self.repeated < len(self._steps):
            known = self._steps[self.repeated]
            if known["key"] != json.loads(json.dumps(key)):
                raise VlmFixError(
                    f"{self.path} has the step {known['key']} where this search does {key}: it was made by another version of "
                    "vlm-fix. Start again with another --out."
                )
            self.repeated += 1
            self.elapsed += known["seconds"]
            self._mark = time.monotonic()
            return known["value"]
        value = json.loads(json.dumps(work()))
        now = time.monotonic()
        seconds, self._mark = round(now - self._mark, 4), now
        self.elapsed += seconds
        if self.path is not None:
            with self.path.open("a") as handle:
                handle.write(json.dumps({"key": key, "seconds": seconds, "value": value}) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        return value


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the complete steps."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    if not found or not isinstance(found[0], dict):
        raise VlmFixError(f"{path} has no settings in its first line: remove it to start again.")
    return found[0], [s for s in found[1:] if isinstance(s, dict) and {"key", "seconds", "value"} <= s.keys()]
