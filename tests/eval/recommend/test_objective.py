"""The objective against counts worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.recommend.objective import COLUMNS, Judge, Limits, sums_of

BASE = {"positive": 100, "negative": 100, "tp": 90, "fp": 30, "tn": 70, "captions": 50, "mentions": 200, "invented": 20}
BASE |= {"found": 150, "truth": 200, "words": 1000, "seconds": 50.0, "tokens": 1200, "changed": 0}
BASE |= {"cut_mentions": 200, "cut_invented": 20, "base_cut_mentions": 200, "base_cut_invented": 20}
NONE = Limits(None, None, None, None)


def both(**changes):
    """Sums of the baseline and of a method that differs in these."""
    assert {*BASE} == {*COLUMNS}
    return dict(BASE), {**BASE, **changes}


def judge(name="hallucination", limits=NONE, available=("captions", "questions")):
    return Judge.of(name, available, limits)


def test_fewer_hallucinations_at_the_same_length_count():
    base, method = both(invented=10, cut_invented=10)
    assert judge("captions").gain(base, method) == pytest.approx(5.0)  # 10 to 5 percent
    assert judge().gain(base, method) == pytest.approx(2.5)  # the mean with the questions, which are as before


def test_saying_less_gains_nothing():
    """Half of the words, with half of the mentions and no hallucination; the baseline has none in its first half either."""
    base, method = both(words=500, mentions=100, invented=0, cut_mentions=100, cut_invented=0)
    method |= {"base_cut_mentions": 100, "base_cut_invented": 0}
    assert judge("captions").gain(base, method) == 0


def test_saying_no_more_often_gains_nothing():
    """The baseline's odds moved by exp(-1): more balanced accuracy, and no better knowledge."""
    hit, false = 900.5 / 1001, 300.5 / 1001
    x = np.exp(-1.0)
    moved = [1001 * r / (1 - r) * x / (1 + r / (1 - r) * x) - 0.5 for r in (hit, false)]
    base, method = both(positive=1000, negative=1000, tp=moved[0], fp=moved[1], tn=1000 - moved[1])
    base |= {"positive": 1000, "negative": 1000, "tp": 900, "fp": 300, "tn": 700}
    judged = judge("questions")
    assert 100 * (method["tp"] + method["tn"]) / 2000 > 80.5  # the baseline has 80
    assert judged.gain(base, method) == pytest.approx(0, abs=1e-9)


def test_knowing_better_at_the_same_caution_counts():
    base, method = both(tp=95, fp=25, tn=75)
    assert judge("questions").gain(base, method) == pytest.approx(5, abs=0.1)


def test_a_loss_is_a_loss_whatever_the_control_says():
    base, method = both(invented=30, cut_invented=5)
    assert judge("captions").gain(base, method) == pytest.approx(-5)


def test_arrays_give_what_floats_give():
    base, method = both(tp=95, invented=15, cut_invented=12, words=900)
    stacked = [{name: np.array([float(value)] * 3) for name, value in sums.items()} for sums in (base, method)]
    judged = judge(limits=Limits(5.0, 1.0, 1.0, 1.0))
    for function in (judged.gain, judged.score):
        assert function(*stacked) == pytest.approx([float(function(base, method))] * 3)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"found": 140}, {"recall": 4.0}),  # 75 to 70 percent, where one point is allowed
        ({"words": 1300}, {"length": 5.0}),
        ({"words": 700}, {"length": 5.0}),
        ({"tp": 60, "fp": 20, "tn": 80}, {"yes-ratio": 10.0}),
        ({"seconds": 130.0}, {"speed": 10.0}),
        ({"found": 149}, {}),
    ],
)
def test_limits_are_missed_by_so_many_points(changes, missed):
    base, method = both(**changes)
    judged = judge(limits=Limits())
    assert judged.missed(base, method) == pytest.approx(missed)
    assert judged.score(base, method) == pytest.approx(judged.gain(base, method) - sum(missed.values()))


def test_recall_is_watched_where_questions_alone_are_the_objective():
    base, method = both(found=100)
    assert judge("questions", Limits()).missed(base, method)
    assert not judge("questions", Limits(), ("questions",)).missed(base, method)


def test_the_objective_says_what_it_is():
    told = judge("captions", Limits(max_slowdown=1.3)).told()
    assert "CHAIR_i" in told and "1.3 times" in told and "accuracy" not in told
    assert "recall" not in judge("questions", Limits(), ("questions",)).told()


def test_an_objective_that_the_data_cannot_tell_is_an_error():
    with pytest.raises(VlmFixError, match="captions needs captions"):
        judge("captions", available=("questions",))
    with pytest.raises(VlmFixError, match="choose from"):
        judge("speed")
    with pytest.raises(VlmFixError, match="1 or more"):
        Limits(max_slowdown=0.5)


def test_sums_are_by_column():
    assert sums_of(np.ones((3, len(COLUMNS))))["tp"] == 3
