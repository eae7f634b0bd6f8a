"""`recommend` in Python: search, proof, and what is written of them."""

from __future__ import annotations

import hashlib
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import vlm_fix
from vlm_fix import calibrated
from vlm_fix.calibrated import weights_id
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run.loading import hardware
from vlm_fix.eval.settings import Settings
from vlm_fix.families import arch_of
from vlm_fix.presets import Preset, model_of
from vlm_fix.tensors import Tensors

from . import data as asked
from .candidates import Candidates
from .figures import summary
from .ledger import Ledger
from .measure import Measurer
from .objective import Judge, Limits
from .search import Search

SEARCHED, CALIBRATED, CLOSING = (
    0.65,
    0.15,
    0.01,
)  # shares of the budget: end of the search, of calibrating, and what is left
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass
class Recommendation:
    """What came of a search: a preset (an empty stack: keep the model as it is), and all figures.

    `report` is what the JSON file holds and the page shows; `examples` are answers that changed, for the page.
    """

    model: Any = field(repr=False)
    preset: Preset
    report: dict[str, Any] = field(repr=False)
    examples: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def better(self) -> bool:
        """Whether anything was proven to be better than the model itself."""
        return bool(self.preset.methods)

    @property
    def spec(self) -> str:
        """The recommended stack as `wrap` takes it; "baseline" for none."""
        return self.preset.spec

    @property
    def verdict(self) -> str:
        """The answer in a sentence."""
        return str(self.report["verdict"])

    def apply(self, model: Any = None) -> Any:
        """Wrap the model (that of the search, or another with the same weights) with what is recommended, and return it."""
        target = self.model if model is None else model
        if not self.better:
            warnings.warn(self.verdict, stacklevel=2)
            return target
        self.preset.check(target, "this recommendation")
        return vlm_fix.wrap(target, list(self.preset.methods))

    def write(self, out: str | Path) -> list[Path]:
        """Write OUT (YAML), and beside it the page and the figures, .html and .json; return the paths."""
        from .page import write

        self.preset.write(out)
        return [Path(out), *write(self.report, self.examples, Path(out))]


def seconds_of(budget: str | float) -> float:
    """Seconds of a budget such as 30m, 1.5h, 90s or 1800. Raises VlmFixError for anything else.

    >>> seconds_of("30m"), seconds_of("1h30m"), seconds_of(90)
    (1800.0, 5400.0, 90.0)
    """
    text = str(budget).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        total = float(text)
    elif re.fullmatch(r"(\d+(\.\d+)?[smh])+", text):
        total = sum(float(number) * UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smh])", text))
    else:
        raise VlmFixError(f"--budget {budget} is no time: write 30m, 1.5h or 900s.")
    if total < 10:
        raise VlmFixError(f"--budget {budget} is too little to measure anything: give some minutes.")
    return total


def _told(value: Any) -> Any:
    """A value of a calibration; of tensors, and of a file of them, the hash of what they hold."""
    if isinstance(value, Tensors):
        with tempfile.TemporaryDirectory() as folder:
            value.write(Path(folder) / "tensors")
            return _told(str(Path(folder) / "tensors"))
    if isinstance(value, str) and Path(value).is_file():
        return f"sha256:{hashlib.sha256(Path(value).read_bytes()).hexdigest()}"
    return value


def recommend(
    model: Any,
    processor: Any,
    samples: Any = "picto:shift",
    budget: str | float = "30m",
    objective: str = "hallucination",
    limits: Limits | None = None,
    only: str = "",
    calibration: calibrated.Files = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    command: str = "",
    started: float | None = None,
    watch: Callable[[Search, Candidates, str], None] = lambda search, candidates, what: None,
) -> Recommendation:
    """Search the methods that this model can be wrapped with for the best one on these samples, and prove it on others.

    samples: "picto:SPLIT", "coco:DIR", files, or rows as the files have them (`data`), with PIL images or paths. budget: seconds,
    or text such as "30m"; all is done within it, but for one measurement. objective and limits: see `objective`. only: candidates
    as `--method` takes them, instead of all; calibration: files that fill them. limit: number of images; max_new_tokens: of
    captions. out: the YAML file to write; beside it OUT.steps.jsonl keeps every step, with which `resume` continues. identity:
    what is known of the model; started: `time.monotonic()` from which the budget counts.
    Raises VlmFixError for bad input, and for a model that is wrapped.
    """
    total = seconds_of(budget)
    if vlm_fix.wing.installed(model):
        raise VlmFixError("the model is wrapped: call vlm_fix.unwrap(model) first, since the search wraps it itself.")
    found = asked.load(samples, limit, seed, max_new_tokens)
    judge = Judge.of(objective, found.parts, limits or Limits())
    about = {
        "name": str(getattr(model, "name_or_path", "")),
        "type": model.config.model_type,
        "weights": weights_id(model),
    }
    about = {**about, "dtype": str(model.dtype).removeprefix("torch."), **(identity or {})}
    place = Path(out) if out is not None else None
    settings = {
        "version": vlm_fix.__version__,
        "model": about,
        "data": found.about(),
        "budget": total,
        "objective": judge.told(),
        "only": only,
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    candidates = Candidates.of(model, only, calibration)  # a bad one is told before anything is written
    if candidates.files:
        settings["calibration"] = {c.method: {n: _told(v) for n, v in c.found.items()} for c in candidates.files}
    ledger = Ledger(place.with_suffix(".steps.jsonl") if place else None, settings, resume)
    ledger.since(started)
    folder = place.with_suffix(".calibration") if place else None
    candidates.calibrate(model, processor, about, found, folder, ledger, seed, CALIBRATED * total)
    how = Settings(batch_size=batch_size, seed=seed, max_new_tokens=max_new_tokens)
    measurer = Measurer(model, processor, found, candidates.stacks, ledger, how, judge.limits.max_slowdown)
    search = Search(
        judge,
        measurer,
        lambda: ledger.now,
        SEARCHED * total,
        (1 - CLOSING) * total,
        lambda search, what: watch(search, candidates, what),
        candidates.stacked,
    )
    outcome = search.run(candidates.listed(), found.search, found.proof)
    report = summary(outcome, judge, candidates.refused, measurer.warned)
    bare = getattr(model, "bare", model)
    report |= {
        "model": model_of(about, arch_of(bare)),
        "data": found.about(),
        "budget": total,
        "seconds": round(ledger.now, 1),
        "seed": seed,
        "versions": {
            "vlm_fix": vlm_fix.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "hardware": hardware(model.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "failed": {key: count for key, count in measurer.failed.items() if count},
    }
    stack = candidates.stacks[outcome.winner.candidate.key] if outcome.winner else []
    names = ("verdict", "objective", "data", "budget", "seconds", "seed", "versions", "hardware", "date", "command")
    kept = {name: report[name] for name in names} | {"figures": report["proofs"]}
    made = Recommendation(model, Preset(tuple(stack), report["model"], kept), report, measurer.examples(outcome))
    if out is not None:
        made.write(out)
    return made
