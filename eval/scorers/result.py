"""The result of a scorer: its figures, and the counts that they come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.stats import Metric, column_sums


@dataclass(frozen=True)
class Result:
    """Figures, as fractions of 1, over `n` answers; `rows` are counts with their image, for `stats.paired_bootstrap`.

    `at_share` returns the rows with each caption cut to a share of its words; None for answers that are no captions.
    """

    scorer: str
    n: int
    figures: dict[str, float]
    unparsed: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    at_share: Callable[[float], list[dict[str, Any]]] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds: everything but the rows."""
        return {"scorer": self.scorer, "n": self.n, **self.figures, "unparsed": self.unparsed}

    def sums(self) -> dict[str, float]:
        """Sum each count over the rows."""
        return column_sums(self.rows, [name for name in self.rows[0] if name != "image"])


def tally(scorer: str, rows: list[dict[str, Any]], metrics: Mapping[str, Metric]) -> Result:
    """Compute the metrics of the summed rows and count the `unparsed` ones. Raises VlmFixError if there are no rows."""
    if not rows:
        raise VlmFixError("There are no answers to score.")
    sums = column_sums(rows, [name for name in rows[0] if name != "image"])
    figures = {name: float(metric(sums)) for name, metric in metrics.items()}
    return Result(scorer, len(rows), figures, int(sums.get("unparsed", 0)), rows)


def paired(questions: Sequence[Any], answers: Mapping[Any, str | None], what: str) -> list[str | None]:
    """Return the answer to each question, by `id`. Raises VlmFixError for unanswered questions and unknown ids."""
    lost = [question.id for question in questions if question.id not in answers]
    extra = answers.keys() - {question.id for question in questions}
    if lost or extra:
        which = f"no answer to {lost[0]!r}" if lost else f"an answer to {next(iter(extra))!r}, which is no question"
        raise VlmFixError(
            f"{len(questions)} {what} questions and {len(answers)} answers do not line up ({which}): give one answer "
            "for each question that is to be scored, under its id."
        )
    return [answers[question.id] for question in questions]


def all_right(name: str, keys: Sequence[Any], right: Sequence[bool]) -> list[dict[str, int]]:
    """Count groups: {name: 1, name_right: all rows of the key are right} at the first row of each key, else zeros.

    >>> all_right("pairs", ["a", "a", None], [True, False, True])  # None is in no group
    [{'pairs': 1, 'pairs_right': 0}, {'pairs': 0, 'pairs_right': 0}, {'pairs': 0, 'pairs_right': 0}]
    """
    whole: dict[Any, bool] = {}
    for key, one in zip(keys, right, strict=True):
        whole[key] = whole.get(key, True) and one
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    marks = [key is not None and first[key] == place for place, key in enumerate(keys)]
    return [{name: int(m), f"{name}_right": int(m and whole[k])} for m, k in zip(marks, keys, strict=True)]
