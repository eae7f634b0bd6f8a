"""Hallucinations at equal length: a Poisson regression of their number in a caption on its words and on the run.

    log E[hallucinated mentions of caption i in run r] = a + b [r is the method] + c log(words of caption i in run r)

exp(b) is the ratio of the rates at equal length: .8 means a fifth fewer hallucinations than the baseline in captions of the
same number of words. Fitted by iteratively reweighted least squares; the interval is 95 %, exp(b +- 1.96 s) with s from the
sandwich estimator, clustered by image, since both runs describe the same images and counts vary more than Poisson's.

Source: P. McCullagh and J. Nelder, Generalized Linear Models (1989); K.-Y. Liang and S. Zeger, Biometrika 73 (1986).

Worked example: captions of 10 words with 1, and of 20 words with 2 hallucinations each. The rate follows the words, so the
ratio at equal length is 1.
>>> def rows(words, wrong):
...     return [{"image": i, "tokens": words + i % 3, "hallucinated": wrong * (words + i % 3)} for i in range(6)]
>>> round(rate_ratio(rows(10, 1), rows(20, 1))["ratio"], 3)
1.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

STEPS, CLOSE = 100, 1e-10


def rate_ratio(
    base: Sequence[Mapping[str, Any]],
    method: Sequence[Mapping[str, Any]],
    words: str = "tokens",
    wrong: str = "hallucinated",
) -> dict[str, Any] | None:
    """Return `ratio` exp(b) with `low`, `high`, `exponent` c and `extrapolated`.

    None if a run has no hallucination or no words vary.

    Rows are counts of captions with their image; `words` and `wrong` name the columns. c is how fast hallucinations grow with
    length: 1 in proportion, more than 1 if they come late in captions. `extrapolated` says that 95 % of the captions of one run
    are shorter than 95 % of those of the other, so that no captions show their rates at the same number of words.
    """
    import numpy as np

    rows = [*base, *method]
    count = np.array([float(row[wrong]) for row in rows])
    length = np.log([max(float(row[words]), 1.0) for row in rows])
    side = np.repeat([0.0, 1.0], [len(base), len(method)])
    if not (count[side == 0].any() and count[side == 1].any()) or np.ptp(length) == 0:
        return None
    design = np.stack([np.ones_like(length), side, length], axis=1)
    if np.linalg.matrix_rank(design) < 3:
        return None
    mean = count + 0.5
    weights = np.zeros(3)
    for _ in range(STEPS):
        response = np.log(mean) + (count - mean) / mean
        old, weights = weights, np.linalg.solve(design.T @ (mean[:, None] * design), design.T @ (mean * response))
        mean = np.exp(design @ weights)
        if abs(weights - old).max() < CLOSE:
            break
    scores: dict[Any, Any] = {}
    for row, each in zip(rows, (count - mean)[:, None] * design, strict=True):
        scores[row["image"]] = scores.get(row["image"], 0) + each
    bread = np.linalg.inv(design.T @ (mean[:, None] * design))
    table = np.stack([*scores.values()])
    sd = float(np.linalg.norm(table @ bread[1]))  # a root of the sandwich that rounding cannot spoil
    b = round(float(weights[1]), 9)  # as far as the fit is exact: the same captions twice have a ratio of 1
    ends = [np.quantile(length[side == run], (0.05, 0.95)) for run in (0, 1)]
    apart = bool(ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0])
    low, high = (math.exp(b + z * round(sd, 9)) for z in (-1.96, 1.96))
    return {"ratio": math.exp(b), "low": low, "high": high, "exponent": float(weights[2]), "extrapolated": apart}
