"""Paired statistics: is a method better than the baseline on the same images?

A metric is a function of summed counts, for example ``c_i = hallucinated / mentions``. The bootstrap draws images with
replacement (all rows of an image move together, since six POPE questions share one image), sums the counts of the drawn
images for the baseline and the method, and takes the difference of the two metrics. One matrix product gives the sums
of every resample, so 2000 resamples of 500 images take milliseconds.

Worked example, two images with one question each: the baseline answers one right, the method both. ``accuracy`` is 0.5
and 1.0, delta 0.5; resamples that draw only the first image give 0.0, those that draw only the second 1.0.

Many methods against one baseline are many chances of a lucky interval: `p_value` turns an interval into a p-value, and
`holm` corrects the p-values of a table; `bonferroni` gives the level of intervals of which several are claimed.

Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), percentile interval; Q. McNemar (1947), the
exact two-sided binomial form; D. Altman and J. Bland, How to obtain the P value from a confidence interval, BMJ 343
(2011); S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979); O. Dunn,
Multiple comparisons among means, JASA 56 (1961), for `bonferroni`; Efron and Tibshirani, chapter 11, for `jackknife`;
T. Hesterberg, What teachers should know about the bootstrap, The American Statistician 69 (2015), and Abramowitz and Stegun
26.7.5, for `expanded`;
L. DeCarlo, Signal detection theory and generalized linear models, Psychological Methods 3 (1998), for `same_caution`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vlm_fix.errors import VlmFixError

if TYPE_CHECKING:
    import numpy as np  # imported where arrays are made, so that listing the benchmarks does not load it

Sums = Mapping[str, Any]
"""Column name -> sum over rows: a float, or an array with one sum per resample."""
SIGNIFICANT = 0.05
"""Below it a p-value, corrected for the number of comparisons, is called significant."""
Metric = Callable[[Sums], Any]
"""Computes the metric from sums; must work on floats and arrays alike (see `ratio`)."""
Row = Mapping[str, Any]
"""Counts of one question or caption, with the image it belongs to under one key."""


def ratio(numerator: Any, denominator: Any) -> Any:
    """Divide floats or arrays; 0 where the denominator is 0 (no mentions, no "yes")."""
    if getattr(denominator, "ndim", 0):
        import numpy as np

        return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)
    return numerator / denominator if denominator else 0.0


def harmonic(precision: Any, recall: Any) -> Any:
    """Compute F1 with the official scripts' order of operations, so that the last digit agrees."""
    return ratio(2 * precision * recall, precision + recall)


def column_sums(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, float]:
    """Sum each column over all rows: the input of a metric."""
    return {name: sum(row[name] for row in rows) for name in columns}


@dataclass(frozen=True)
class Comparison:
    """One metric of both runs, with the interval [`low`, `high`] of method - base at confidence `level`."""

    base: float
    method: float
    delta: float
    low: float
    high: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def p(self) -> float:
        """The two-sided p-value that the interval stands for, see `p_value`."""
        return p_value(self.delta, self.low, self.high, self.level)

    def to_dict(self) -> dict[str, float]:
        """Return what results.json holds."""
        return asdict(self)


def paired_bootstrap(
    metrics: Mapping[str, Metric],
    base_rows: Sequence[Row],
    method_rows: Sequence[Row],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    cluster: str = "image",
) -> dict[str, Comparison]:
    """Compute method - base of each metric, with a percentile interval from `n` paired resamples of images.

    Rows are dictionaries of counts (`PopeResult.rows`, `ChairResult.rows`); the key `cluster` holds the image, every
    other key is a count. Both runs must have the same number of rows for every image.
    Raises VlmFixError for empty or unpaired rows and for n or level out of range.
    """

    def change(metric: Metric) -> Callable[[Sums, Sums], Any]:
        return lambda base, method: metric(method) - metric(base)

    deltas = {name: change(metric) for name, metric in metrics.items()}
    ends = paired_intervals(deltas, base_rows, method_rows, n, seed, level, cluster)
    result = {}
    for name, metric in metrics.items():
        before, after = (float(metric(_totals(rows, cluster))) for rows in (base_rows, method_rows))
        result[name] = Comparison(before, after, after - before, *ends[name], level)
    return result


def paired_intervals(
    deltas: Mapping[str, Callable[[Sums, Sums], Any]],
    base_rows: Sequence[Row],
    method_rows: Sequence[Row],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    cluster: str = "image",
) -> dict[str, tuple[float, float]]:
    """Return the percentile interval (low, high) of each function of (base sums, method sums) over paired resamples.

    Rows and errors are those of `paired_bootstrap`; the sums are arrays with one value per resample.
    """
    import numpy as np

    if n < 1 or not 0 < level < 1:
        raise VlmFixError(f"The bootstrap needs n >= 1 and 0 < level < 1, not n={n} and level={level}.")
    if not base_rows or not method_rows:
        raise VlmFixError("There is nothing to compare: one of the two runs has no rows.")
    columns = [name for name in base_rows[0] if name != cluster]
    base_sums, method_sums = (_sums_per_image(rows, columns, cluster) for rows in (base_rows, method_rows))
    for image in base_sums | method_sums:
        rows = [int(side[image][0]) if image in side else 0 for side in (base_sums, method_sums)]
        if rows[0] != rows[1]:
            raise VlmFixError(
                f"The two runs are not paired: image {image!r} has {rows[0]} rows in the baseline and {rows[1]} in the "
                "method; run both on the same questions or captions."
            )
    base = np.array([base_sums[image][1:] for image in base_sums])
    method = np.array([method_sums[image][1:] for image in base_sums])
    return table_intervals(deltas, columns, base, method, n, seed, level)


def table_intervals(
    deltas: Mapping[str, Callable[[Sums, Sums], Any]],
    columns: Sequence[str],
    base: np.ndarray,
    method: np.ndarray,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return the same of counts that are tables already: base and method [images, columns], an image a row."""
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in deltas}
    images = len(base)
    for start in range(0, n, 250):  # in chunks, so that 50,000 images fit in memory
        weights = rng.multinomial(images, np.full(images, 1 / images), min(250, n - start)).astype(float)
        resampled = [dict(zip(columns, (weights @ table).T, strict=True)) for table in (base, method)]
        for name, delta in deltas.items():
            drawn[name].append(delta(*resampled))
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = {name: np.quantile(np.concatenate(parts), tails) for name, parts in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def jackknife(
    delta: Callable[[Sums, Sums], Any], columns: Sequence[str], base: np.ndarray, method: np.ndarray
) -> tuple[float, float]:
    """Return (estimate, standard error) of a function of (base sums, method sums); tables [images, columns], an image a row.

    With d_i the value without image i of n and d their mean, the error is sqrt((n - 1) / n sum (d_i - d)^2): what a bootstrap
    would give, for n evaluations in one call, which is what a search over many candidates can afford. Infinite for one image.

    >>> import numpy as np
    >>> jackknife(lambda a, b: (b["right"] - a["right"]) / b["n"], ["n", "right"], np.array([[1, 0], [1, 1]]), np.ones((2, 2)))
    (0.5, 0.5)
    """
    import numpy as np

    both = base.sum(axis=0), method.sum(axis=0)
    estimate = float(delta(*(dict(zip(columns, sums, strict=True)) for sums in both)))
    n = len(base)
    if n < 2:
        return estimate, math.inf
    without = [
        dict(zip(columns, (sums - table).T, strict=True)) for sums, table in zip(both, (base, method), strict=True)
    ]
    each = np.asarray(delta(*without), dtype=float)
    return estimate, float(np.sqrt((n - 1) / n * np.square(each - each.mean()).sum()))


def bonferroni(claims: int, alpha: float = SIGNIFICANT) -> float:
    """Return the level of each of `claims` intervals at which all of them hold with probability 1 - alpha or more.

    >>> bonferroni(2)
    0.975
    """
    return 1 - alpha / max(claims, 1)


def expanded(level: float, n: int) -> float:
    """Return the level at which a percentile interval of `n` images holds what an interval at `level` promises.

    Percentile intervals of few images are too narrow: they lack the factor sqrt(n / (n - 1)) and the tails of Student's t. The
    tails are taken at Phi(-sqrt(n / (n - 1)) t), with t the quantile of n - 1 degrees of freedom by its expansion in 1 / n.

    >>> round(expanded(0.95, 30), 3), round(expanded(0.95, 1000), 3)
    (0.962, 0.95)
    """
    if n < 2:
        return 1 - 1e-9
    normal, v = statistics.NormalDist(), n - 1
    z = normal.inv_cdf((1 + level) / 2)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return 1 - 2 * normal.cdf(-t * math.sqrt(n / v))


def same_caution(hit: Any, false: Any, yes: Any) -> tuple[Any, Any]:
    """Return the rates of (right, wrong) yes that answers have if their threshold is moved until right + wrong = 2 `yes`.

    hit and false are the shares of yes where it is right and where it is wrong, in (0, 1); floats or arrays. A constant t on
    the log-odds of yes moves both: logit(hit) + t, logit(false) + t. With A, B their odds, s = 2 yes and x = exp(t):

        A x / (1 + A x) + B x / (1 + B x) = s    <=>    A B (2 - s) x^2 + (A + B) (1 - s) x - s = 0

    So answers that gain only by caution gain nothing on the baseline at the same caution. This is `d_prime` of `compare` with
    logistic instead of normal noise, and in closed form.

    >>> [round(float(rate), 3) for rate in same_caution(0.9, 0.3, 0.475)]
    [0.795, 0.155]
    """
    a, b, s = hit / (1 - hit), false / (1 - false), 2 * yes
    square, linear = a * b * (2 - s), (a + b) * (1 - s)
    x = (-linear + (linear**2 + 4 * square * s) ** 0.5) / (2 * square)
    return a * x / (1 + a * x), b * x / (1 + b * x)


def p_value(delta: float, low: float, high: float, level: float = 0.95) -> float:
    """Return the two-sided p-value of a difference with the interval [`low`, `high`] at confidence `level`.

    With z the normal quantile of `level` (1.96 for 95 %) and d the distance from `delta` to the bound that faces 0, the
    standard error is d / z and p = 2 (1 - Phi(z |delta| / d)). So p < 1 - level exactly where the interval excludes 0.
    Altman and Bland take half the interval's width for d; a bootstrap interval need not be symmetric. It has no floor of
    2 / (resamples + 1), below which a correction for many comparisons could never reach.

    >>> p_value(0.02, 0.0, 0.05), p_value(-0.1, -0.2, 0.1) > 0.05, p_value(0.0, 0.0, 0.0)
    (0.05, True, 1.0)
    """
    if delta == 0:
        return 1.0
    facing = delta - low if delta > 0 else high - delta
    if facing <= 0:  # every resample moved at least as far
        return 0.0
    normal = statistics.NormalDist()
    z = normal.inv_cdf((1 + level) / 2)
    return round(2 * normal.cdf(-z * abs(delta) / facing), 12)  # rounded, so that an interval that ends at 0 gives .05


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number by Holm's step-down procedure, in the same order.

    Sorted, the i-th of m (from 0) is multiplied by m - i, never below the one before it and at most 1. Calling those
    below alpha significant keeps the chance of even one false claim among them below alpha.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, last = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        last = corrected[place] = min(1.0, max(last, (len(p_values) - rank) * p_values[place]))
    return corrected


def mcnemar(base_correct: Sequence[bool], method_correct: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of base and method being equally often right, from their disagreements.

    >>> mcnemar([True, True, False], [True, False, True])  # one each way: no evidence
    1.0
    """
    if len(base_correct) != len(method_correct):
        raise VlmFixError(
            f"McNemar's test needs the same questions twice, not {len(base_correct)} and {len(method_correct)} answers."
        )
    lost = sum(bool(b) and not m for b, m in zip(base_correct, method_correct, strict=True))
    won = sum(bool(m) and not b for b, m in zip(base_correct, method_correct, strict=True))
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2 ** (lost + won))


def outcomes(base_rows: Sequence[Row], method_rows: Sequence[Row], right: Callable[[Row], Any]) -> dict[str, Any]:
    """Count the rows that only the method gets right (`mended`) or only the base (`broken`), with McNemar's `p`."""
    base, method = ([bool(right(row)) for row in rows] for rows in (base_rows, method_rows))
    p = mcnemar(base, method)
    mended = sum(m and not b for b, m in zip(base, method, strict=True))
    return {"mended": mended, "broken": sum(base) - sum(method) + mended, "p": p}


def transitions(base_rows: Sequence[Row], method_rows: Sequence[Row]) -> dict[str, int]:
    """Count how yes/no answers changed from base to method: fn_to_tp, tp_to_fn, fp_to_tn and tn_to_fp.

    fn_to_tp together with tn_to_fp is a shift to "yes", whatever it does to accuracy. Answers that a scorer reads as
    neither yes nor no are not counted here, only in `outcomes`.
    """
    moves = ("fn", "tp"), ("tp", "fn"), ("fp", "tn"), ("tn", "fp")
    pairs = list(zip(base_rows, method_rows, strict=True))
    return {f"{a}_to_{b}": sum(bool(base[a] and method[b]) for base, method in pairs) for a, b in moves}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean and sample standard deviation (n - 1) over seeds, with the values themselves."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": list(values)}


def _totals(rows: Sequence[Row], cluster: str) -> dict[str, float]:
    return column_sums(rows, [name for name in rows[0] if name != cluster])


def _sums_per_image(rows: Sequence[Row], columns: Sequence[str], cluster: str) -> dict[Any, np.ndarray]:
    """Image -> (number of rows, sum of each column), in order of appearance."""
    import numpy as np

    table: dict[Any, np.ndarray] = {}
    for row in rows:
        values = np.array([1.0, *(row[name] for name in columns)])
        table[row[cluster]] = table[row[cluster]] + values if row[cluster] in table else values
    return table
