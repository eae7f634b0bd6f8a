"""Paired statistics: against plain loops, on data with a known answer, and by coverage."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.stats import (
    Comparison,
    bonferroni,
    expanded,
    holm,
    jackknife,
    mcnemar,
    outcomes,
    p_value,
    paired_bootstrap,
    ratio,
    same_caution,
    spread,
    table_intervals,
    transitions,
)

ACCURACY = {"accuracy": lambda s: ratio(s["correct"], s["n"])}


def rows_of(correct: np.ndarray, per_image: int = 1) -> list[dict]:
    return [{"image": i // per_image, "n": 1, "correct": int(c)} for i, c in enumerate(correct)]


def pope_rows(rng: np.random.Generator, images: int, skill: float) -> list[dict]:
    questions = [pope.Question(i, f"{i // 6}.jpg", "", "yes" if i % 2 == 0 else "no") for i in range(6 * images)]
    right = rng.random(len(questions)) < skill
    said = [q.label if ok else {"yes": "no", "no": "yes"}[q.label] for q, ok in zip(questions, right, strict=True)]
    return pope.score(questions, [pope.Answer(i, text) for i, text in enumerate(said)]).rows


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_run_against_itself_has_a_zero_interval(pairs: list[tuple[int, bool]], seed: int) -> None:
    rows = [{"image": image, "n": 1, "correct": int(ok)} for image, ok in pairs]
    result = paired_bootstrap(ACCURACY, rows, rows[::-1], n=50, seed=seed)["accuracy"]
    assert (result.delta, result.low, result.high) == (0, 0, 0)
    assert not result.excludes_zero


def test_resampling_equals_a_loop_over_repeated_images() -> None:
    rng = np.random.default_rng(1)
    base, method = pope_rows(rng, 8, 0.6), pope_rows(rng, 8, 0.8)
    n, draws = 40, []
    for weights in np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), n):
        picked = [f"{i}.jpg" for i, times in enumerate(weights) for _ in range(times)]
        scores = []
        for rows in (base, method):
            again = [row for image in picked for row in rows if row["image"] == image]
            tp, fp, fn = (sum(row[name] for row in again) for name in ("tp", "fp", "fn"))
            precision, recall = tp / (tp + fp), tp / (tp + fn)
            scores.append(2 * precision * recall / (precision + recall))
        draws.append(scores[1] - scores[0])
    result = paired_bootstrap(pope.METRICS, base, method, n=n, seed=5, level=0.9)["f1"]
    assert [result.low, result.high] == pytest.approx(np.quantile(draws, [0.05, 0.95]), abs=1e-12)
    assert result.delta == pytest.approx(result.method - result.base)


def test_a_large_effect_excludes_zero_and_a_seed_repeats() -> None:
    rng = np.random.default_rng(0)
    base, method = pope_rows(rng, 60, 0.6), pope_rows(rng, 60, 0.9)
    first = paired_bootstrap(pope.METRICS, base, method, seed=7)
    assert first["accuracy"].excludes_zero
    assert first["accuracy"].low > 0
    assert first["f1"].excludes_zero
    assert first == paired_bootstrap(pope.METRICS, base, method, seed=7)
    assert first != paired_bootstrap(pope.METRICS, base, method, seed=8)
    turned = paired_bootstrap(pope.METRICS, method, base, seed=7)["accuracy"]
    assert (turned.low, turned.high) == pytest.approx((-first["accuracy"].high, -first["accuracy"].low))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """400 simulated studies of 120 images, true accuracies 0.6 and 0.7, half of the images as hard for both runs."""
    rng = np.random.default_rng(3)
    inside = 0
    for study in range(400):
        hard, shared = rng.random((2, 120)), rng.random(120) < 0.5
        base, method = hard[0] < 0.6, np.where(shared, hard[0], hard[1]) < 0.7
        result = paired_bootstrap(ACCURACY, rows_of(base), rows_of(method), n=400, seed=study)["accuracy"]
        inside += result.low <= 0.1 <= result.high
    assert 0.91 <= inside / 400 <= 0.98


def test_images_not_rows_are_resampled() -> None:
    """Six identical answers per image hold the information of one: the interval must not shrink."""
    rng = np.random.default_rng(2)
    base, method = rng.random(100) < 0.6, rng.random(100) < 0.7
    once = paired_bootstrap(ACCURACY, rows_of(base), rows_of(method))["accuracy"]
    six = paired_bootstrap(ACCURACY, rows_of(base.repeat(6), 6), rows_of(method.repeat(6), 6))["accuracy"]
    assert (six.low, six.high) == pytest.approx((once.low, once.high))


def test_chair_metrics_of_resamples_without_mentions_are_zero_not_nan() -> None:
    truth = {0: {"dog"}, 1: {"cat"}}
    base = chair.score([chair.Caption(0, "a tree"), chair.Caption(1, "a dog")], truth, "pattern").rows
    method = chair.score([chair.Caption(0, "a dog"), chair.Caption(1, "a cat")], truth, "pattern").rows
    result = paired_bootstrap(chair.METRICS, base, method, n=200)
    assert all(np.isfinite([c.base, c.method, c.low, c.high]).all() for c in result.values())
    assert (result["chair_i"].base, result["chair_i"].method, result["recall"].delta) == (1, 0, 1)


def test_unpaired_runs_get_one_sentence() -> None:
    rows = rows_of(np.ones(4))
    with pytest.raises(VlmFixError, match="image 3 has 1 rows in the baseline and 0 in the method"):
        paired_bootstrap(ACCURACY, rows, rows[:3])
    with pytest.raises(VlmFixError, match="image 0 has 1 rows in the baseline and 2 in the method"):
        paired_bootstrap(ACCURACY, rows, [*rows, rows[0]])
    with pytest.raises(VlmFixError, match="nothing to compare"):
        paired_bootstrap(ACCURACY, rows, [])
    with pytest.raises(VlmFixError, match="0 < level < 1, not n=0"):
        paired_bootstrap(ACCURACY, rows, rows, n=0)
    with pytest.raises(VlmFixError, match="3 and 2 answers"):
        mcnemar([True] * 3, [True] * 2)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    base, method = [True] * 1 + [False] * 9 + [True] * 40, [False] * 1 + [True] * 9 + [True] * 40
    assert mcnemar(base, method) == 2 * (1 + 10) / 2**10
    assert mcnemar(base, base) == 1
    assert mcnemar([True], [False]) == 1
    assert mcnemar([False] * 3000, [True] * 3000) == pytest.approx(0, abs=1e-300)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_a_symmetric_probability(pairs: list[tuple[bool, bool]]) -> None:
    base, method = [b for b, _ in pairs], [m for _, m in pairs]
    assert mcnemar(base, method) == mcnemar(method, base)
    assert 0 < mcnemar(base, method) <= 1


def test_transitions_and_outcomes_against_plain_loops() -> None:
    rng = np.random.default_rng(4)
    classes = ("tp", "fp", "tn", "fn", "neither")

    def drawn(labels: np.ndarray) -> list[str]:
        return [rng.choice(["tp", "fn", "neither"] if yes else ["fp", "tn", "neither"]) for yes in labels]

    labels = rng.random(300) < 0.5
    base, method = drawn(labels), drawn(labels)
    rows = [[{"image": i, "n": 1} | {c: int(c == k) for c in classes} for i, k in enumerate(s)] for s in (base, method)]
    expected = dict.fromkeys(("fn_to_tp", "tp_to_fn", "fp_to_tn", "tn_to_fp"), 0)
    only = {"base": 0, "method": 0}
    for before, after in zip(base, method, strict=True):
        if f"{before}_to_{after}" in expected:
            expected[f"{before}_to_{after}"] += 1
        if (before in ("tp", "tn")) != (after in ("tp", "tn")):
            only["base" if before in ("tp", "tn") else "method"] += 1
    assert transitions(*rows) == expected and min(expected.values()) > 5
    found = outcomes(*rows, lambda row: row["tp"] or row["tn"])
    assert (found["mended"], found["broken"]) == (only["method"], only["base"])
    assert found["p"] == mcnemar([k in ("tp", "tn") for k in base], [k in ("tp", "tn") for k in method])


def test_rows_of_runs_of_other_lengths_are_no_pairs() -> None:
    rows = [{"image": i, "n": 1, "tp": 1, "fp": 0, "tn": 0, "fn": 0} for i in range(3)]
    for function in (transitions, lambda *both: outcomes(*both, lambda row: row["tp"])):
        function(rows, rows)
        with pytest.raises((ValueError, VlmFixError)):
            function(rows, rows[:2])


def test_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "sd": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}


def test_equal_length_counts_only_what_both_captions_had_room_for() -> None:
    truth = {0: {"dog", "cat"}, 1: {"car"}, 2: {"dog"}}
    long = ["A dog and a horse near a (cat) and a pizza.", "A car.", "a bear"]
    short = ["A dog on a bed.", "A car and a bus and a person here.", ""]
    base = chair.score([chair.Caption(i, text) for i, text in enumerate(long)], truth, "pattern")
    method = chair.score([chair.Caption(i, text) for i, text in enumerate(short)], truth, "pattern")
    cut = chair.at_equal_length(base, method)
    # image 0: five words each: "A dog and a horse" | "A dog on a bed."; image 1: two words each; image 2: none
    names = ("hallucinating", "hallucinated", "mentions", "found", "objects", "truth", "n")
    assert [[row[name] for name in names] for row in cut[0]] == [
        [1, 1, 2, 1, 2, 2, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert [[row[name] for name in names] for row in cut[1]] == [
        [1, 1, 2, 1, 2, 2, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    same = chair.at_equal_length(base, base)
    assert all(rows == base.rows for rows in same)
    with pytest.raises(VlmFixError, match="same images"):
        chair.at_equal_length(base, chair.score([chair.Caption(1, "a car")], truth, "pattern"))


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=200, deadline=None)
def test_p_is_below_alpha_exactly_where_the_interval_excludes_zero(
    delta: float, below: float, above: float, level: float
) -> None:
    found = Comparison(0, delta, delta, delta - below, delta + above, level)
    if min(abs(found.low), abs(found.high)) > 1e-6:  # away from an interval that ends at 0
        assert (found.p < 1 - level) == (found.excludes_zero and delta != 0)
    assert 0 <= found.p <= 1


def test_p_of_a_symmetric_interval_is_that_of_the_normal_test() -> None:
    # Altman and Bland 2011, first example: a ratio of .81 [.70, .94], p = .005; its bounds are rounded to two digits
    low, delta, high = np.log([0.70, 0.81, 0.94])
    assert p_value(delta, low, high) == pytest.approx(0.005, abs=1e-3)
    assert p_value(0.1, -0.1, 0.3) == pytest.approx(0.3271, abs=1e-4), "z = 1.96 / 2"
    assert p_value(0.1, 0.1, 0.1) == 0.0 and p_value(0.0, -0.1, 0.2) == 1.0


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=100, deadline=None)
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]) -> None:
    corrected, m = holm(ps), len(ps)
    for alpha in (0.01, 0.05, 0.2):
        left = sorted(range(m), key=ps.__getitem__)
        rejected = set()
        while left and ps[left[0]] * len(left) <= alpha:  # against alpha / hypotheses that are left
            rejected.add(left.pop(0))
        assert {i for i in range(m) if corrected[i] <= alpha} == rejected
    assert all(c >= p for c, p in zip(corrected, ps, strict=True))


def test_holm_keeps_the_chance_of_any_false_claim() -> None:
    rng = np.random.default_rng(0)
    draws = rng.random((4000, 15))
    plain, corrected = (np.mean([min(f(list(row))) < 0.05 for row in draws]) for f in (list, holm))
    assert plain > 0.5 and corrected == pytest.approx(0.05, abs=0.012)


# ------------------------------------------------------------------------------------------------ for a search and its proof

NAMES = ["n", "right", "wrong"]


def tables(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(
        np.stack([np.full(images, 3.0), rng.integers(0, 4, images), rng.integers(0, 2, images)], 1) for _ in range(2)
    )


def change(base: dict, method: dict) -> np.ndarray:
    """A function of both sums that is not linear."""
    return (
        ratio(method["right"], method["n"]) - ratio(base["right"], base["n"]) - ratio(method["wrong"], method["right"])
    )


def test_jackknife_against_a_loop_without_each_image() -> None:
    base, method = tables(9)
    estimate, error = jackknife(change, NAMES, base, method)
    each = []
    for i in range(9):
        sums = [dict(zip(NAMES, np.delete(table, i, 0).sum(0), strict=True)) for table in (base, method)]
        each.append(float(change(*sums)))
    mean = sum(each) / 9
    assert error == pytest.approx((8 / 9 * sum((d - mean) ** 2 for d in each)) ** 0.5)
    assert estimate == pytest.approx(float(change(*(dict(zip(NAMES, t.sum(0), strict=True)) for t in (base, method)))))


def test_jackknife_agrees_with_the_bootstrap() -> None:
    base, method = tables(300)
    _, error = jackknife(change, NAMES, base, method)
    low, high = table_intervals({"change": change}, NAMES, base, method)["change"]
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)


def test_jackknife_of_one_image_knows_nothing() -> None:
    assert jackknife(change, NAMES, np.ones((1, 3)), np.ones((1, 3)))[1] == float("inf")


@pytest.mark.parametrize(("n", "t"), [(10, 2.262), (30, 2.045), (100, 1.984)])  # Student's tables, 97.5 %
def test_expanded_has_the_tails_of_student(n: int, t: float) -> None:
    z = NormalDist().inv_cdf((1 + expanded(0.95, n)) / 2)
    assert z == pytest.approx(t * (n / (n - 1)) ** 0.5, abs=0.005)


@given(st.integers(2, 400), st.sampled_from([0.8, 0.9, 0.95, 0.975]))
@settings(max_examples=60, deadline=None)
def test_expanded_is_the_expansion_of_students_quantile(n: int, level: float) -> None:
    """Abramowitz and Stegun 26.7.5, its terms by their coefficients."""
    z, v = NormalDist().inv_cdf((1 + level) / 2), n - 1
    terms = [[0, 1], [0, 1 / 4, 0, 1 / 4], [0, 3 / 96, 0, 16 / 96, 0, 5 / 96]]
    t = sum(c * z**power / v**order for order, term in enumerate(terms) for power, c in enumerate(term))
    assert expanded(level, n) == pytest.approx(math.erf(t * (n / v) ** 0.5 / 2**0.5), abs=1e-12)
    assert level < expanded(level, n) <= 1 and expanded(level, n + 1) <= expanded(level, n)


@pytest.mark.parametrize("n", [1, 249, 250, 251, 600])
def test_as_many_resamples_as_were_asked_for(n: int) -> None:
    """They are drawn in chunks, of which the last may be a short one: the draws are those of one piece."""
    base, method = tables(5)
    drawn: list[np.ndarray] = []

    def watched(a: dict, b: dict) -> np.ndarray:
        drawn.append(b["right"] - a["right"])
        return drawn[-1]

    low, high = table_intervals({"change": watched}, NAMES, base, method, n=n, seed=4, level=0.9)["change"]
    weights = np.random.default_rng(4).multinomial(5, np.full(5, 1 / 5), n)
    expected = weights @ (method - base)[:, 1]
    assert np.array_equal(np.concatenate(drawn), expected) and max(map(len, drawn)) <= 250
    assert [low, high] == pytest.approx(np.quantile(expected, [0.05, 0.95]))


@pytest.mark.parametrize("yes", [0.05, 0.3, 0.5, 0.9])
@given(hit=st.floats(0.02, 0.98), false=st.floats(0.02, 0.98))
@settings(max_examples=30, deadline=None)
def test_same_caution_moves_both_log_odds_by_one_constant(yes: float, hit: float, false: float) -> None:
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    right, wrong = same_caution(hit, false, yes)
    assert (right + wrong) / 2 == pytest.approx(yes)
    assert logit(right) - logit(hit) == pytest.approx(logit(wrong) - logit(false), abs=1e-6)


def test_same_caution_takes_arrays() -> None:
    arrays = same_caution(np.array([0.9, 0.8]), np.array([0.3, 0.1]), np.array([0.5, 0.5]))
    assert [float(a[0]) for a in arrays] == pytest.approx(list(same_caution(0.9, 0.3, 0.5)))


def test_bonferroni_shares_the_chance_of_a_false_claim() -> None:
    assert (bonferroni(1), bonferroni(2), bonferroni(5, 0.1)) == pytest.approx((0.95, 0.975, 0.98))
