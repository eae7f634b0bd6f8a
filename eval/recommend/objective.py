"""What is made better, under which constraints, from counts of each image.

    captions    CHAIR_i: hallucinated mentions / mentions of CHAIR's objects
    questions   balanced accuracy: (right of the yes questions + right of the no questions) / 2

The gain of each is what it improves by against the unmodified model, and it counts only as far as a control does not have it:

    captions    min(gain, gain with each pair of captions cut to the words of the shorter one)
    questions   min(gain, gain over the baseline made as cautious as the candidate, see `stats.same_caution`)

So saying less, or "no" more often, gains nothing by itself. The objective `hallucination` is the mean of both (of the one that
the data have), `captions` and `questions` are each alone; all in points. The score by which candidates are ranked is the gain
that counts minus the points by which it misses the constraints. Source: this project.

Worked example: CHAIR_i falls from 10 to 6 %, but by 1 point in captions of equal length, and answers stay: the captions' gain
is 1, and the objective 0.5 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.stats import Sums, ratio, same_caution

COLUMNS = (
    *("positive", "negative", "tp", "fp", "tn"),  # questions by their right answer; right and wrong yes, right no
    *("captions", "mentions", "invented", "found", "truth", "words"),
    *(
        "cut_mentions",
        "cut_invented",
        "base_cut_mentions",
        "base_cut_invented",
    ),  # at equal length, beside the baseline's
    *("seconds", "tokens", "changed"),  # of all answers of the image; answers that differ from the baseline's
)
"""The counts of one image, in a row of a table."""
OBJECTIVES = {"hallucination": ("captions", "questions"), "captions": ("captions",), "questions": ("questions",)}


def chair_i(s: Sums) -> Any:
    return ratio(s["invented"], s["mentions"])


def recall(s: Sums) -> Any:
    return ratio(s["found"], s["truth"])


def accuracy(s: Sums) -> Any:
    """Balanced accuracy."""
    return (ratio(s["tp"], s["positive"]) + ratio(s["tn"], s["negative"])) / 2


def yes_ratio(s: Sums) -> Any:
    """Share of yes, as if half of the questions had that answer."""
    return (ratio(s["tp"], s["positive"]) + ratio(s["fp"], s["negative"])) / 2


def length(s: Sums) -> Any:
    return ratio(s["words"], s["captions"])


def fewer_invented(base: Sums, method: Sums) -> Any:
    return chair_i(base) - chair_i(method)


def fewer_at_equal_length(base: Sums, method: Sums) -> Any:
    before = ratio(method["base_cut_invented"], method["base_cut_mentions"])
    return before - ratio(method["cut_invented"], method["cut_mentions"])


def more_right(base: Sums, method: Sums) -> Any:
    return accuracy(method) - accuracy(base)


def more_right_at_equal_caution(base: Sums, method: Sums) -> Any:
    """The same over the baseline at the method's yes-ratio, rates with 1/2 added to counts and 1 to totals, so that all exist."""
    (hit, false), (mine, wrong) = _rates(base), _rates(method)
    matched, told = same_caution(hit, false, (mine + wrong) / 2)
    return (mine - wrong - (matched - told)) / 2


def _rates(s: Sums) -> tuple[Any, Any]:
    return (s["tp"] + 0.5) / (s["positive"] + 1), (s["fp"] + 0.5) / (s["negative"] + 1)


def slowdown(base: Sums, method: Sums) -> Any:
    return ratio(method["seconds"], base["seconds"])


GAINS: dict[str, tuple[Callable[[Sums, Sums], Any], Callable[[Sums, Sums], Any]]] = {
    "captions": (fewer_invented, fewer_at_equal_length),
    "questions": (more_right, more_right_at_equal_caution),
}
"""Part -> its gain, and its gain over the matched control; shares of 1, more is better."""


@dataclass(frozen=True)
class Limits:
    """What a recommendation may cost, against the model itself; None: anything.

    In points: `min_recall`, the least change of caption recall; `max_yes`, the largest change of the yes-ratio. `max_length`
    is the largest change of caption length in percent, `max_slowdown` the largest ratio of times.
    """

    min_recall: float | None = -1.0
    max_length: float | None = 25.0
    max_yes: float | None = 10.0
    max_slowdown: float | None = 2.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise VlmFixError(
                    f"--{field.name.replace('_', '-')} is {value}: give a number, or none to switch the limit off."
                )
        if self.max_slowdown is not None and self.max_slowdown < 1:
            raise VlmFixError(
                f"--max-slowdown {self.max_slowdown:g} asks for more speed than the model has: give 1 or more, such as 1.3."
            )

    def missed(self, base: Sums, method: Sums) -> dict[str, Any]:
        """Constraint -> points by which it is missed, 0 where it holds; floats or arrays."""
        longer = ratio(length(method), length(base)) - 1
        over = {
            "recall": (self.min_recall, lambda limit: limit - 100 * (recall(method) - recall(base))),
            "length": (self.max_length, lambda limit: 100 * abs(longer) - limit),
            "yes-ratio": (self.max_yes, lambda limit: 100 * abs(yes_ratio(method) - yes_ratio(base)) - limit),
            "speed": (self.max_slowdown, lambda limit: 100 * (slowdown(base, method) - limit)),
        }
        return {name: _positive(by(limit)) for name, (limit, by) in over.items() if limit is not None}


def _positive(value: Any) -> Any:
    return value * (value > 0)


@dataclass(frozen=True)
class Judge:
    """An objective over `parts`, and the limits, over all that is `asked`."""

    name: str
    parts: Sequence[str]
    limits: Limits = Limits()
    asked: Sequence[str] = tuple(GAINS)

    @classmethod
    def of(cls, name: str, available: Sequence[str], limits: Limits = Limits()) -> Judge:
        """Raises VlmFixError for an unknown objective, or one that the data cannot tell."""
        if name not in OBJECTIVES:
            raise VlmFixError(f"--objective {name} is unknown: choose from {', '.join(OBJECTIVES)}.")
        parts = [part for part in OBJECTIVES[name] if part in available]
        if not parts:
            raise VlmFixError(f"--objective {name} needs {name} with known answers, and the data have none of them.")
        return cls(name, tuple(parts), limits, tuple(available))

    def told(self) -> str:
        """The objective and its limits in a sentence."""
        what = {"captions": "CHAIR_i", "questions": "balanced accuracy"}
        name = " and ".join(what[part] for part in self.parts)
        text = f"objective {self.name}: points gained in {name}" + (", their mean" if len(self.parts) > 1 else "")
        text += ", over the model itself and over it at equal length and caution"
        limits = [
            ("recall not below {:+g} points", self.limits.min_recall),
            ("length within {:g} %", self.limits.max_length),
            ("yes-ratio within {:g} points", self.limits.max_yes),
            ("at most {:g} times as slow", self.limits.max_slowdown),
        ]
        if "captions" not in self.asked:
            limits = limits[2:]
        return "; ".join([text, *(form.format(value) for form, value in limits if value is not None)])

    def gain(self, base: Sums, method: Sums) -> Any:
        """The gain that counts, in points; floats or arrays."""
        import numpy as np

        return 100 * sum(np.minimum(*(g(base, method) for g in GAINS[part])) for part in self.parts) / len(self.parts)

    def score(self, base: Sums, method: Sums) -> Any:
        """The gain that counts minus the points by which limits are missed."""
        return self.gain(base, method) - sum(self._limits(base, method).values())

    def missed(self, base: Sums, method: Sums) -> dict[str, float]:
        """Constraint -> points by which its estimate misses it; only those that are missed."""
        return {name: float(by) for name, by in self._limits(base, method).items() if by > 0}

    def _limits(self, base: Sums, method: Sums) -> dict[str, Any]:
        """`Limits.missed` of what is asked."""
        of_captions = ("recall", "length") if "captions" not in self.asked else ()
        return {name: by for name, by in self.limits.missed(base, method).items() if name not in of_captions}


def sums_of(table: Any) -> Mapping[str, Any]:
    """Sum a table [images, columns]."""
    return dict(zip(COLUMNS, table.sum(axis=0), strict=True))
