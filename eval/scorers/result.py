"""The result of a scorer: its figures, and the counts that they come from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.stats import Metric, column_sums

from .yesno import Misread

NONE = Misread()


@dataclass(frozen=True)
class Result:
    """Figures, as fractions of 1, over `n` answers; `rows` are counts with their image, for `stats.paired_bootstrap`.

    `unparsed` answers are neither yes nor no to the scorer; `misread` are those it takes against their plain word.
    `at_share` returns the rows with each caption cut to a share of its words; None for answers that are no captions.
    `asked` are the questions of the rows, by which two results are paired; () where the image alone names a row. `notes` say
    by name what figures depend on. A row whose `n` is 0 was asked, and is in no figure.
    """

    scorer: str
    n: int
    figures: dict[str, float]
    unparsed: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    misread: Misread = NONE
    at_share: Callable[[float], list[dict[str, Any]]] | None = field(default=None, repr=False, compare=False)
    asked: Sequence[str] = field(default=(), repr=False, compare=False)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds: everything but the rows."""
        return {
            "scorer": self.scorer,
            "n": self.n,
            **self.figures,
            "unparsed": self.unparsed,
            **told(self.misread),
            **self.notes,
        }

    def sums(self) -> dict[str, float]:
        """Sum each count over the rows."""
        return column_sums(self.rows, [name for name in self.rows[0] if name != "image"])


def or_none(value: Any) -> Any:
    """A figure as JSON has it: None for one that cannot be told, such as an AUROC of one label."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(misread: Misread) -> dict[str, Any]:
    """Return what results.json says of misread answers."""
    return {"misread": misread.n} | ({"misread_example": misread.example} if misread.n else {})


def tally(
    scorer: str,
    rows: list[dict[str, Any]],
    metrics: Mapping[str, Metric],
    misread: Misread = NONE,
    asked: Sequence[str] = (),
) -> Result:
    """Compute the metrics of the summed rows and count the `unparsed` ones. Raises VlmFixError if there are no rows."""
    if not rows:
        raise VlmFixError("There are no answers to score.")
    sums = column_sums(rows, [name for name in rows[0] if name != "image"])
    figures = {name: float(metric(sums)) for name, metric in metrics.items()}
    return Result(scorer, len(rows), figures, int(sums.get("unparsed", 0)), rows, misread, asked=asked)


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
