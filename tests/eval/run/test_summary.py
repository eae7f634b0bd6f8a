"""The comparisons of a table are corrected for the number of its runs."""

import copy

import pytest

from vlm_fix.eval.run.summary import correct
from vlm_fix.eval.stats import holm, p_value


def split(deltas, equal=None):
    made = {name: {"delta": d, "low": d - 0.03, "high": d + 0.04, "level": 0.95} for name, d in deltas.items()}
    return {"delta": made} | ({"equal_length": copy.deepcopy(made)} if equal else {})


def test_each_metric_and_split_is_a_family_over_the_runs():
    moved = [0.05, 0.033, 0.02, -0.045]
    runs = {"baseline": {"pope": {"random": {"delta": {}}}, "chair": {"captions": {"delta": {}}}}}
    for i, d in enumerate(moved):
        runs[f"run {i}"] = {
            "pope": {"random": split({"accuracy": d, "f1": moved[0]}), "popular": split({"accuracy": moved[0]})},
            "chair": {"captions": split({"recall": d}, equal=True)},
        }
    correct(runs)
    ps = [p_value(d, d - 0.03, d + 0.04) for d in moved]
    for i, corrected in enumerate(holm(ps)):
        found = runs[f"run {i}"]
        for place in (
            found["pope"]["random"]["delta"]["accuracy"],
            found["chair"]["captions"]["delta"]["recall"],
            found["chair"]["captions"]["equal_length"]["recall"],
        ):
            assert (place["p"], place["p_holm"]) == (ps[i], pytest.approx(corrected))
        assert found["pope"]["random"]["delta"]["f1"]["p_holm"] == pytest.approx(4 * ps[0]), "equal ones, times four"
    assert ps[1] < 0.05 < runs["run 1"]["pope"]["random"]["delta"]["accuracy"]["p_holm"]
    before = copy.deepcopy(runs)
    correct(runs)
    assert runs == before, "correcting twice is correcting once"
