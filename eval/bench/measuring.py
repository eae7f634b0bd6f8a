"""Time methods against the unwrapped model, in ratios of the same round, and measure the cache."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from vlm_fix import registry
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of
from vlm_fix.pruning.kinds import CachePruner, ImageShrinker, TokenPruner
from vlm_fix.session import VISUAL
from vlm_fix.wing import installed

from .clock import Timing, peak_mb, timed
from .models import IMAGE
from .paths import running
from .specs import keep_of


@dataclasses.dataclass
class Row:
    """The measurements of a method; ratios are method / unwrapped in the same round: median, lowest, highest.

    fastest: the same ratios of the fastest first token and of the fastest tenth of the tokens after it, over all rounds:
    what other work on the machine slows least.
    """

    spec: str
    first_token: tuple[float, float, float] = (1.0, 1.0, 1.0)
    tokens_per_second: tuple[float, float, float] = (1.0, 1.0, 1.0)
    fastest: tuple[float, float] = (1.0, 1.0)
    memory: float = 1.0
    seconds: float = 0.0  # to the first token, median
    speed: float = 0.0  # tokens/s, median
    peak_mb: float = 0.0
    kept: float | None = None
    kv_mb: float | None = None
    scoring: float | None = None  # seconds
    note: str = ""


def measure(
    model: Any, inputs: dict[str, Any], specs: list[str], tokens: int, rounds: int, tick: Any = None
) -> list[Row]:
    """Time `specs` against the unwrapped model, which is row 0. A spec that cannot run gets a note instead of figures."""
    device = inputs["input_ids"].device

    def warm(extra: dict[str, Any]) -> float:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **extra)
        return peak_mb(lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False, **extra), device)

    rows = [Row("baseline", peak_mb=warm({}))]
    base: list[Timing] = []
    for spec in specs:
        row = Row(spec)
        rows.append(row)
        try:
            with warnings.catch_warnings(record=True) as said, running(model, spec) as extra:
                warnings.simplefilter("always")
                row.peak_mb = warm(extra)
                row.note = "edited nothing" if any("changed nothing" in str(w.message) for w in said) else ""
                row.kept, row.kv_mb = _cache(model, inputs, extra)
            row.memory = row.peak_mb / rows[0].peak_mb
            pairs = []
            for _ in range(rounds):
                plain = timed(model, inputs, tokens)
                with warnings.catch_warnings(), running(model, spec) as extra:
                    warnings.simplefilter("ignore")
                    pairs.append((plain, timed(model, inputs, tokens, **extra)))
                base.append(plain)
        except (VlmFixError, NotImplementedError) as error:
            row.note = str(error)
            continue
        finally:
            if tick:
                tick()
        row.first_token = _spread([ours.first / plain.first for plain, ours in pairs])
        row.tokens_per_second = _spread([ours.speed / plain.speed for plain, ours in pairs])
        (first, step), (own_first, own_step) = (_fastest(timings) for timings in zip(*pairs, strict=True))
        row.fastest = own_first / first, step / own_step
        row.seconds = statistics.median(ours.first for _, ours in pairs)
        row.speed = statistics.median(ours.speed for _, ours in pairs)
    rows[0].kept, rows[0].kv_mb = _cache(model, inputs, {})
    if base:
        rows[0].seconds = statistics.median(timing.first for timing in base)
        rows[0].speed = statistics.median(timing.speed for timing in base)
    return rows


def _fastest(timings: Iterable[Timing]) -> tuple[float, float]:
    """Seconds of the fastest first token, and of a token that a tenth of the others beats."""
    timings = list(timings)
    steps = sorted(seconds for timing in timings for seconds in timing.steps)
    return min(timing.first for timing in timings), steps[len(steps) // 10]


def add_scoring(rows: list[Row]) -> None:
    """Fill in `scoring`: pruners against random_tokens with the same budget, cache methods against the baseline."""
    controls = {keep_of(row.spec): row.seconds for row in rows if row.spec.startswith("random_tokens")}
    for row in rows[1:]:
        if row.note or "+" in row.spec:
            continue
        method = registry.get_method(row.spec.partition(":")[0])
        if issubclass(method, TokenPruner) and not issubclass(method, ImageShrinker) and keep_of(row.spec) in controls:
            row.scoring = row.seconds - controls[keep_of(row.spec)]
        elif issubclass(method, CachePruner):
            row.scoring = row.seconds - rows[0].seconds


def _cache(model: Any, inputs: dict[str, Any], extra: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return the visual columns stored after prefill, mean over layers, and the cache size in MB, parked columns included."""
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **extra)
    layers = getattr(cache_of(out), "layers", None)
    if not layers or not all(isinstance(layer.keys, torch.Tensor) for layer in layers):
        return None, None
    engine, aside = installed(model), [getattr(layer, "aside", None) or () for layer in layers]
    session = engine and engine.sessions.get(cache_of(out))
    if session:
        visual = [int((session.at(i).types == VISUAL).sum()) for i in range(len(layers))]
    else:
        visual = [layer.keys.shape[-2] - int((inputs["input_ids"] != IMAGE).sum()) for layer in layers]
    kept = statistics.mean(n + (parts[0].shape[-2] if parts else 0) for n, parts in zip(visual, aside, strict=True))
    tensors = [x for layer, parts in zip(layers, aside, strict=True) for x in (layer.keys, layer.values, *parts)]
    return kept, sum(x.numel() * x.element_size() for x in tensors) / 1e6


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
