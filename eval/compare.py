"""Compare two sets of answers to the same questions, or captions of the same images, and say in one sentence what came of it.

    better, worse        the interval of the accuracy, or of CHAIR_i at equal recall, excludes 0
    no difference seen   it does not, nor does that of CHAIR_i itself
    only by saying no    the accuracy is better, answers of yes are fewer and of no more, and yes is told from no no better
                         than before
    only by saying less  CHAIR_i is lower, but not at equal recall; only by saying more: it is higher, but not at equal recall

How well yes is told from no, whatever the share of yes, is d' of signal detection theory:

    d' = z(yes where it is right / labels yes) - z(yes where it is wrong / labels no)        z: quantile of the normal

with 1/2 added to the numerators and 1 to the denominators, so that it is finite. A shift of the threshold moves along a
curve of equal d' (D. Green and J. Swets 1966; the correction: M. Hautus 1995). An answer that is neither yes nor no, or that
failed, is wrong here as in the accuracy: it counts as no where yes is right, and as yes where it is wrong.

Recall and CHAIR_i rise together as captions get longer. The frontier of a run is what it has if each caption is cut to
5, 10, ... 100 % of its words. Runs are compared at equal recall: the run with more recall is cut along its frontier, with
linear interpolation, until it has the other's. All intervals are 95 %, from paired resamples of images. Source of the
verdicts: this project.

Worked example: of 100 questions with label yes and 100 with no, the baseline answers yes to 90 and to 30, d' = 1.78; the
method to 80 and to 15, d' = 1.85. The accuracy rises from .80 to .825, and d' says that most of it is caution.
>>> sums = [{"tp": 90, "fp": 30, "positive": 100, "n": 200}, {"tp": 80, "fp": 15, "positive": 100, "n": 200}]
>>> [round(d_prime(each), 2) for each in sums]
[1.78, 1.85]
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.length import rate_ratio
from vlm_fix.eval.scorers.answers import plain_text
from vlm_fix.eval.scorers.benchmark import Captions, Layout
from vlm_fix.eval.stats import (
    Comparison,
    Metric,
    Sums,
    column_sums,
    outcomes,
    paired_bootstrap,
    paired_intervals,
    ratio,
    transitions,
)

SHARES = [share / 20 for share in range(1, 21)]
SHARES_OF_ANSWERS: dict[str, Metric] = {
    "said_no": lambda s: ratio(s["no"], s["asked"]),
    "neither": lambda s: ratio(s["neither"], s["asked"]),
}


def compare(layout: Layout, pairs: Sequence[tuple[Any, Any]], seed: int = 0, every: bool = False) -> dict[str, Any]:
    """Compare (baseline, method) results of one task and part, one pair per seed of the run.

    Returns `delta` {metric: Comparison as a dictionary}, of `layout.compared` or with `every` of all columns; `outcomes`
    and `transitions` (see `stats`); for yes/no answers `d_prime`, `said_yes` where the scorer's yes-ratio is that of the
    labels, and `said_no` and `neither` (shares of the questions) where an answer is neither yes nor no; for captions
    `equal_length` {metric: ...}, `equal_recall` and `rate_ratio` (see `length`) where they can be computed; `verdict` {"is",
    "text"}, where `is` is better, worse or same, or better or worse followed by " by saying" no, yes, less or more. Counts
    are summed over the pairs and p is the largest.
    Raises VlmFixError for results that are not about the same questions.
    """
    pairs = [(base, _in_order_of(base, method)) for base, method in pairs]
    for base, method in pairs:
        _same_questions(base, method)
    base, method = ([row for pair in pairs for row in pair[side].rows] for side in (0, 1))
    wanted = [name for name in layout.columns if name in layout.metrics] if every else layout.compared
    metrics = {name: layout.metrics[name] for name in {**dict.fromkeys(layout.compared), **dict.fromkeys(wanted)}}
    defined = [result.figures for result in pairs[0] if hasattr(result, "figures")]  # some need answers of both labels
    metrics = {name: metric for name, metric in metrics.items() if all(name in figures for figures in defined)}
    found: dict[str, Any] = {"delta": _plain(paired_bootstrap(metrics, base, method, seed=seed))}
    each = [outcomes(one.rows, other.rows, layout.right) for one, other in pairs]
    found["outcomes"] = {name: sum(e[name] for e in each) for name in ("mended", "broken")}
    found["outcomes"]["p"] = max(e["p"] for e in each)
    if {"tp", "fp", "tn", "fn"} <= base[0].keys():
        moves = [transitions(one.rows, other.rows) for one, other in pairs]
        found["transitions"] = {name: sum(move[name] for move in moves) for name in moves[0]}
    answers = layout.answers
    if isinstance(answers, Captions):
        if answers.at_equal_length:
            cut = [answers.at_equal_length(one, other) for one, other in pairs]
            rows = [[row for pair in cut for row in pair[side]] for side in (0, 1)]
            compared = {name: layout.metrics[name] for name in layout.compared}
            found["equal_length"] = _plain(paired_bootstrap(compared, rows[0], rows[1], seed=seed))
        if answers.at_share:
            found |= _plain({"equal_recall": equal_recall(layout, answers, pairs, seed)})
        if "tokens" in base[0]:
            found["rate_ratio"] = rate_ratio(base, method)
        found["verdict"] = _of_captions(found, answers)
    else:
        labels = {row["positive"] for row in base if "positive" in row}
        if len(labels) == 2:
            sides = [[_sides(row) for row in rows] for rows in (base, method)]
            found |= _plain(paired_bootstrap({"d_prime": d_prime}, sides[0], sides[1], seed=seed))
        if labels and "yes_ratio" not in found["delta"]:
            yes = {"yes_ratio": layout.metrics["yes_ratio"]}
            found["delta"] |= _plain(paired_bootstrap(yes, base, method, seed=seed))
        if any("tp" in row and row["yes"] != row["tp"] + row["fp"] for row in base):  # lmms's yes-ratio is the labels'
            said_yes: dict[str, Metric] = {"said_yes": lambda s: ratio(s["tp"] + s["fp"], s["n"])}
            found |= _plain(paired_bootstrap(said_yes, base, method, seed=seed))
        shares = [[_shares(row) for row in rows] for rows in (base, method)] if labels else []
        if any(row["neither"] for rows in shares for row in rows):
            found |= _plain(paired_bootstrap(SHARES_OF_ANSWERS, shares[0], shares[1], seed=seed))
        found["verdict"] = _of_answers(found, answers.accuracy, {*labels})
    return found


def shared(base: Any, method: Any) -> tuple[Any, Any]:
    """Return both results with the rows of the images of which both answer the same questions.

    Whole images, since a figure may be about all questions of one. Raises VlmFixError if there are none.
    """
    one, other = (_by_image(result) for result in (base, method))
    common = {image for image, texts in one.items() if sorted(texts) == sorted(other.get(image, ()))}
    if not common:
        what = "ask different questions of the images that both have" if one.keys() & other.keys() else "share no image"
        raise VlmFixError(f"The two files {what}: give answers to the same questions.")
    places = ([n for n, row in enumerate(result.rows) if row["image"] in common] for result in (base, method))
    kept, rest = (_picked(result, its) for result, its in zip((base, method), places, strict=True))
    return kept, rest


def _by_image(result: Any) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for image, text, _ in _keys(result):
        found.setdefault(image, []).append(text)
    return found


def _keys(result: Any) -> list[tuple[Any, str, int]]:
    """Image, question and label of each row; of the question what comes before its mark, as prompts add to it."""
    asked = getattr(result, "asked", ()) or [""] * len(result.rows)
    return [
        (row["image"], plain_text(text.partition("?")[0]), row.get("label", row.get("positive", 0)))
        for row, text in zip(result.rows, asked, strict=True)
    ]


def _in_order_of(base: Any, method: Any) -> Any:
    """Return `method` with its rows in the order of `base`, if both answer the same questions; else as it is."""
    wanted, keys = ([key[:2] for key in _keys(result)] for result in (base, method))
    if wanted == keys or Counter(wanted) != Counter(keys):
        return method
    places: dict[tuple[Any, str], list[int]] = {}
    for place, key in reversed([*enumerate(keys)]):
        places.setdefault(key, []).append(place)
    return _picked(method, [places[key].pop() for key in wanted])


def _picked(result: Any, places: Sequence[int]) -> Any:
    """Return a result with these rows, in this order."""

    def picked(values: Sequence[Any]) -> list[Any]:
        return [values[place] for place in places]

    lists: dict[str, Any] = {
        name: picked(held) for name in ("rows", "captions", "asked", "correct") if (held := getattr(result, name, None))
    }
    if cut := getattr(result, "at_share", None):
        lists["at_share"] = lambda share: picked(cut(share))
    return dataclasses.replace(result, n=len(places), **lists)


def d_prime(s: Sums) -> Any:
    """Compute d' from the sums of tp, fp, positive and n."""
    hit = (s["tp"] + 0.5) / (s["positive"] + 1)
    false = (s["fp"] + 0.5) / (s["n"] - s["positive"] + 1)
    return _quantile(hit) - _quantile(false)


def _quantile(p: Any) -> Any:
    if getattr(p, "ndim", 0):
        import numpy as np

        return np.array([NormalDist().inv_cdf(float(one)) for one in p])
    return NormalDist().inv_cdf(p)


def equal_recall(layout: Layout, captions: Captions, pairs: Sequence[tuple[Any, Any]], seed: int = 0) -> Comparison:
    """Compare the rate of hallucination of two runs, the one with more recall cut to the recall of the other."""
    import numpy as np

    assert captions.at_share
    rows: list[list[dict[str, Any]]] = [[], []]
    for pair in pairs:
        for side, result in enumerate(pair):
            cuts = [captions.at_share(result, share) for share in SHARES[:-1]]
            for place, whole in enumerate(result.rows):
                row = {"image": whole["image"]}
                for k, cut in enumerate([*(each[place] for each in cuts), whole]):
                    row |= {f"{k} {name}": value for name, value in cut.items() if name != "image"}
                rows[side].append(row)
    invented, recall = layout.metrics[captions.invented], layout.metrics[captions.found]
    names = [name.removeprefix("0 ") for name in rows[0][0] if name.startswith("0 ")]

    def curve(sums: Sums) -> tuple[Any, Any]:
        levels = [{name: sums[f"{k} {name}"] for name in names} for k in range(len(SHARES))]
        return np.array([recall(level) for level in levels]), np.array([invented(level) for level in levels])

    def meet(base: Sums, method: Sums) -> Any:
        """The rates of both at the lower of their recalls, [2] or [2, resamples]."""
        frontiers = [curve(sums) for sums in (base, method)]
        target = np.minimum(frontiers[0][0][-1], frontiers[1][0][-1])
        if target.ndim == 0:
            return np.array([np.interp(target, *frontier) for frontier in frontiers])
        return np.array([[np.interp(t, x[:, i], y[:, i]) for i, t in enumerate(target)] for x, y in frontiers])

    totals = [column_sums(side, [name for name in side[0] if name != "image"]) for side in rows]
    before, after = map(float, meet(*totals))
    change = {"change": lambda base, method: np.subtract(*meet(base, method)[::-1])}
    low, high = paired_intervals(change, rows[0], rows[1], seed=seed)["change"]
    return Comparison(before, after, after - before, low, high, 0.95)


def frontier(layout: Layout, captions: Captions, result: Any) -> list[tuple[float, float, float]]:
    """Return (share of the words kept, recall, rate of hallucination) of captions cut shorter and shorter."""
    assert captions.at_share
    points = []
    for share in SHARES:
        rows = captions.at_share(result, share)
        sums = column_sums(rows, [name for name in rows[0] if name != "image"])
        found, invented = (float(layout.metrics[name](sums)) for name in (captions.found, captions.invented))
        points.append((share, found, invented))
    return points


def _same_questions(base: Any, method: Any) -> None:
    keys = [_keys(result) for result in (base, method)]
    places = [[image for image, *_ in each] for each in keys]
    remedy = "give answers to the same questions, or compare what they share with --common."
    if places[0] != places[1] and {*places[0]} != {*places[1]}:
        both = len({*places[0]} & {*places[1]})
        raise VlmFixError(
            f"The two files are not about the same images: {len({*places[0]})} and {len({*places[1]})}, of which {both} are "
            f"in both; {remedy}"
        )
    if Counter(places[0]) != Counter(places[1]):
        raise VlmFixError(
            f"The two files have {len(keys[0])} and {len(keys[1])} answers about the same images, not the same number about "
            f"each: {remedy}"
        )
    in_order = places[0] == places[1]
    for one, other in zip(*(keys if in_order else map(sorted, keys)), strict=True):
        if one != other and not (in_order and one[2] == other[2] and "" in (one[1], other[1])):
            texts = f" ({one[1]!r} and {other[1]!r})" if one[1] != other[1] else ""
            raise VlmFixError(
                "The two files have different questions or labels for the same images, the first of image "
                f"{one[0]}{texts}: {remedy}"
            )


def _sides(row: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of `d_prime`; what is neither yes nor no is wrong for either label."""
    wrong = row["n"] and row.get("unparsed", 0) * (1 - row["positive"])
    counts = {"tp": _said_yes(row) * row["positive"], "fp": _said_yes(row) * (1 - row["positive"]) + wrong}
    return {"image": row["image"], "n": row["n"], "positive": row["positive"], **counts}


def _shares(row: Mapping[str, Any]) -> dict[str, Any]:
    """Whether an answer is no, or neither yes nor no; those that a scorer leaves out (n = 0) are neither."""
    neither = row.get("unparsed", 0) if row["n"] else 1
    return {"image": row["image"], "asked": 1, "no": 1 - _said_yes(row) - neither, "neither": neither}


def _said_yes(row: Mapping[str, Any]) -> Any:
    """ "yes" of the scorer lmms is the label, tp and fp are not."""
    return row["tp"] + row["fp"] if "tp" in row else row["yes"]


def _plain(found: Mapping[str, Comparison]) -> dict[str, Any]:
    return {name: one.to_dict() | {"excludes_zero": one.excludes_zero} for name, one in found.items()}


def _of_answers(found: Mapping[str, Any], accuracy: str, labels: set[int]) -> dict[str, str]:
    gain, told, yes = (
        found["delta"][accuracy],
        found.get("d_prime"),
        found.get("said_yes") or found["delta"].get("yes_ratio"),
    )
    text, sign = said(ACCURACIES.get(accuracy, accuracy), gain), _sign(gain)
    word = {1: "better", -1: "worse", 0: "no difference seen"}[sign]
    no, neither = found.get("said_no"), found.get("neither")
    if neither and _sign(neither):
        text += f", {said('answers that are neither yes nor no', neither)}"
    if not yes or not _sign(yes) or (no and _sign(no) != -_sign(yes)):  # what was no answer is no shift from yes to no
        return {"is": word if sign else "same", "text": f"{word}: {text}"}
    more, shift = (
        "yes" if yes["delta"] > 0 else "no",
        said("answers of yes" if "said_yes" in found else "yes-ratio", yes),
    )
    if no and more == "no":
        shift = said("answers of no", no)
    if not sign:
        return {"is": "same", "text": f"{word}: {text}; it says {more} more often, {shift}"}
    by = f"{word} by saying {more}"
    if not told:
        label = "yes" if 1 in labels else "no"
        return {"is": by, "text": f"{word} only by saying {more}: {text}, {shift}; every label is {label}"}
    d_prime = said("d'", told, 1)
    if _sign(told) == sign:
        return {"is": word, "text": f"{word}: {text}, {d_prime}; it says {more} more often, {shift}"}
    kept = "as well as before" if not _sign(told) else "worse than before" if sign > 0 else "better than before"
    text = f"{word} only by saying {more}: {text}, {shift}, but yes is told from no {kept} ({d_prime})"
    return {"is": by, "text": text}


ACCURACIES = {"accuracy_plus": "accuracy+"}


def _of_captions(found: Mapping[str, Any], answers: Captions) -> dict[str, str]:
    name, recall = answers.heading, answers.found
    raw, more, equal = found["delta"][answers.invented], found["delta"][recall], found.get("equal_recall")
    text = f"{said(name, raw)}, {said(recall, more)}"
    gain = -_sign(raw)
    word = {1: "better", -1: "worse", 0: "no difference seen"}
    by = {1: "better by saying less", -1: "worse by saying more"}
    if equal is None:
        if gain and _sign(more) == -gain:
            return {"is": by[gain], "text": f"{by[gain].replace(' by', ', but by')}: {text}"}
        return {"is": word[gain] if gain else "same", "text": f"{word[gain]}: {text}"}
    fair = -_sign(equal)
    longer = "the baseline's captions" if more["delta"] < 0 else "the new captions"
    cut = f"with {longer} cut to the same {recall}, {said(name, equal)}"
    if not gain:
        return {"is": word[fair] if fair else "same", "text": f"{word[fair]}: {text}; {cut}"}
    if fair == gain:
        return {"is": word[gain], "text": f"{word[gain]}: {text}; {cut}"}
    return {"is": by[gain], "text": f"{by[gain].replace(' by', ' only by')}: {text}; but {cut}"}


def _sign(comparison: Mapping[str, Any]) -> int:
    """1 or -1 if the interval excludes 0, else 0."""
    return (comparison["delta"] > 0) * 2 - 1 if comparison["excludes_zero"] else 0


def said(name: str, c: Mapping[str, Any], scale: int = 100) -> str:
    """Write a comparison, such as "accuracy 91.4 to 92.0 (+0.6 [0.1, 1.1])", in percent unless `scale` is 1."""
    form = ".1f" if scale == 100 else ".2f"
    before, after, low, high = (f"{scale * c[key]:{form}}" for key in ("base", "method", "low", "high"))
    return f"{name} {before} to {after} ({scale * c['delta']:+{form}} [{low}, {high}])"
