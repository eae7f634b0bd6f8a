"""What a search found, as figures: the content of the JSON file, from which the page is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_fix.eval.stats import Sums, expanded, jackknife, table_intervals

from . import objective
from .objective import COLUMNS, Judge, sums_of
from .search import FINALISTS, Outcome, Proof

FIGURES: dict[str, tuple[str, Callable[[Sums], Any], float, str]] = {
    "chair_i": ("captions", objective.chair_i, 100, "CHAIR_i, %"),
    "recall": ("captions", objective.recall, 100, "caption recall, %"),
    "length": ("captions", objective.length, 1, "words"),
    "accuracy": ("questions", objective.accuracy, 100, "balanced accuracy, %"),
    "yes_ratio": ("questions", objective.yes_ratio, 100, "yes-ratio, %"),
}
"""Name -> (part, metric, scale, heading)."""


def summary(
    outcome: Outcome, judge: Judge, refused: Mapping[str, str], warned: Mapping[str, Mapping[str, None]]
) -> dict[str, Any]:
    """The verdict, the baseline, every candidate as far as it was measured, and the proofs."""
    rows = []
    for standing in sorted(outcome.standings, key=lambda s: (bool(s.out), -s.images, -s.score)):
        row: dict[str, Any] = {
            "candidate": standing.candidate.key,
            "kinds": list(standing.candidate.kinds),
            "control": standing.candidate.control,
            "images": standing.images,
            "out": standing.out,
        }
        if standing.images:
            mine, base = sums_of(standing.table), sums_of(outcome.base.table[: standing.images])
            row |= {"gain": _r(standing.gain), "score": _r(standing.score), "error": _r(standing.error)}
            row |= {"missed": {name: _r(by) for name, by in standing.missed.items()}}
            row |= {"changes": {name: _r(value - _of(base, judge)[name]) for name, value in _of(mine, judge).items()}}
            row["errors"] = _errors(outcome.base.table[: standing.images], standing.table, judge)
            row["slowdown"] = _r(objective.slowdown(base, mine))
            row["warnings"] = [*warned.get(standing.candidate.key, ())]
        rows.append(row)
    plain = sums_of(outcome.base.table) if outcome.base.images else None
    return {
        "verdict": verdict(outcome),
        "better": outcome.winner is not None,
        "winner": outcome.winner.candidate.key if outcome.winner else None,
        "objective": judge.told(),
        "parts": list(judge.parts),
        "baseline": {"images": outcome.base.images, **(_of(plain, judge) if plain else {})},
        "proofs": [proof_of(proof, judge) for proof in outcome.proofs],
        "candidates": rows,
        "refused": dict(refused),
    }


def proof_of(proof: Proof, judge: Judge) -> dict[str, Any]:
    """The proof with the intervals of every figure at its level."""
    base, mine = sums_of(proof.base), sums_of(proof.table)
    names = [name for name, (part, *_) in FIGURES.items() if part in judge.asked]

    wanted = {name: _change(name) for name in names}
    wanted |= {f"{part}_matched": _scaled(objective.GAINS[part][1]) for part in judge.parts}
    ends = table_intervals(wanted, COLUMNS, proof.base, proof.table, level=expanded(proof.level, proof.images))
    changes: dict[str, dict[str, float]] = {}
    for name, delta in wanted.items():
        low, high = ends[name]
        changes[name] = {"change": _r(delta(base, mine)), "low": _r(low), "high": _r(high)}
        if name in FIGURES:
            _, metric, scale, _ = FIGURES[name]
            changes[name] |= {"base": _r(scale * metric(base)), "method": _r(scale * metric(mine))}
    return {
        "candidate": proof.candidate.key,
        "images": proof.images,
        "level": proof.level,
        "gain": _r(proof.gain),
        "low": _r(proof.low),
        "high": _r(proof.high),
        "better": proof.better,
        "missed": {name: _r(by) for name, by in proof.missed.items()},
        "slowdown": _r(objective.slowdown(base, mine)),
        "changes": changes,
    }


def _errors(base: Any, mine: Any, judge: Judge) -> dict[str, float]:
    """Standard errors of the changes that the figures show; none of a single image."""
    if len(base) < 2:
        return {}
    wanted = {name: _change(name) for name, (part, *_) in FIGURES.items() if part in judge.asked}
    wanted |= {"gain": judge.gain, "slowdown": objective.slowdown}
    return {name: _r(jackknife(delta, COLUMNS, base, mine)[1]) for name, delta in wanted.items()}


def _change(name: str) -> Callable[[Sums, Sums], Any]:
    _, metric, scale, _ = FIGURES[name]
    return lambda base, method: scale * (metric(method) - metric(base))


def verdict(outcome: Outcome) -> str:
    """The answer in a sentence."""
    won = outcome.winner
    if won is None:
        return f"nothing here beats your model: keep it as it is ({outcome.reason})"
    return (
        f"{won.candidate.key} is better by {won.gain:.1f} [{won.low:.1f}, {won.high:.1f}] points on {won.images} images it had "
        f"not seen ({100 * won.level:g} % interval, for {len(outcome.proofs)} of at most {FINALISTS} candidates proven)"
    )


def _of(sums: Sums, judge: Judge) -> dict[str, float]:
    return {n: _r(scale * metric(sums)) for n, (part, metric, scale, _) in FIGURES.items() if part in judge.asked}


def _scaled(gain: Callable[[Sums, Sums], Any]) -> Callable[[Sums, Sums], Any]:
    return lambda base, method: 100 * gain(base, method)


def _r(value: Any) -> float:
    return round(float(value), 4)


def columns(asked: Sequence[str]) -> dict[str, str]:
    """Figure -> heading, of what was asked."""
    return {name: heading for name, (part, *_, heading) in FIGURES.items() if part in asked}
