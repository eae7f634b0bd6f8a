"""Comparisons of two files: verdicts on data whose truth is known, equal recall by loops, and real public captions."""

import doctest
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import DATA
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import compare as comparing
from vlm_fix.eval.bench import scaling
from vlm_fix.eval.compare import compare, equal_recall, shared
from vlm_fix.eval.length import rate_ratio
from vlm_fix.eval.report import curves as pruning
from vlm_fix.eval.report import frontier as drawing
from vlm_fix.eval.report import methods_page, models_page
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.chair.data import ground_truth
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.scorers.pope.data import coco_questions
from vlm_fix.eval.scorers.registry import BENCHMARKS, LAYOUTS

PUBLIC = DATA / "captions" / "opera_llava15"
needs_data = pytest.mark.skipif(not PUBLIC.exists(), reason=f"no public captions at {PUBLIC}")


def test_worked_example() -> None:
    assert doctest.testmod(comparing).failed == 0


def answers(skill: float, threshold: float, images: int = 800, seed: int = 0) -> pope.PopeResult:
    """Answers of an observer who says yes where a normal score, `skill` higher for labels yes, is above the threshold."""
    rng = np.random.default_rng(seed)
    questions = [pope.Question(i, f"{i // 6}.jpg", "", ("yes", "no")[i % 2]) for i in range(6 * images)]
    scores = rng.normal(size=len(questions)) + [skill * (q.label == "yes") for q in questions]
    said = ["Yes" if score > threshold else "No" for score in scores]
    return pope.score(questions, [pope.Answer(i, text) for i, text in enumerate(said)])


@pytest.mark.parametrize(
    ("skill", "threshold", "verdict"),
    [
        (1.5, 0.2, "same"),
        (2.2, 0.2, "better"),
        (1.5, 0.75, "better by saying no"),  # the best threshold; the observer is the same
        (1.5, -0.6, "worse by saying yes"),
        (1.0, 0.2, "worse"),
    ],
)
def test_verdicts_of_an_observer_whose_skill_and_caution_are_known(
    skill: float, threshold: float, verdict: str
) -> None:
    found = compare(
        LAYOUTS["pope"], [(answers(1.5, 0.2), answers(skill, threshold, seed=1 if verdict == "same" else 0))]
    )
    assert found["verdict"]["is"] == verdict, found["verdict"]
    assert found["d_prime"]["method"] == pytest.approx(skill, abs=0.2)
    assert found["outcomes"]["mended"] - found["outcomes"]["broken"] == round(
        found["delta"]["accuracy"]["delta"] * 4800
    )


def test_a_shift_of_the_threshold_is_caution_to_lmms_too() -> None:
    results = []
    for threshold in (0.2, 0.75):
        result = answers(1.5, threshold)
        questions = [pope.Question(n, f"{n // 6}.jpg", "", ("yes", "no")[n % 2]) for n in range(result.n)]
        texts = ["yes" if row["tp"] or row["fp"] else "no" for row in result.rows]
        results.append(pope.score(questions, [pope.Answer(n, text) for n, text in enumerate(texts)], "lmms"))
    found = compare(LAYOUTS["pope"], [(results[0], results[1])])
    assert found["delta"]["yes_ratio"]["base"] == found["delta"]["yes_ratio"]["method"] == 0.5
    assert found["said_yes"]["delta"] < -0.1 and "answers of yes" in found["verdict"]["text"]
    assert found["verdict"]["is"] == "better by saying no"


def test_a_benchmark_whose_labels_are_all_no_cannot_tell_skill_from_caution() -> None:
    questions = [pope.Question(i, f"{i}.jpg", "", "no") for i in range(100)]
    base, method = (
        pope.score(questions, [pope.Answer(i, "Yes" if i < yes else "No") for i in range(100)]) for yes in (60, 30)
    )
    verdict = compare(LAYOUTS["pope"], [(base, method)])["verdict"]
    assert verdict["is"] == "better by saying no" and "every label is no" in verdict["text"]


def said(texts: list[str | None], scorer: str = "official") -> pope.PopeResult:
    """Answers to questions with label yes and no in turn, six about an image."""
    questions = [pope.Question(i, f"{i // 6}.jpg", "", ("yes", "no")[i % 2]) for i in range(len(texts))]
    return pope.score(questions, [pope.Answer(i, text) for i, text in enumerate(texts)], scorer)


def test_answers_that_failed_are_told_as_such_and_not_as_no() -> None:
    yes = said(["Yes"] * 1200)
    failed = compare(LAYOUTS["pope"], [(yes, said(["Yes", None] * 600))])
    assert failed["said_no"]["method"] == 0 and failed["neither"]["method"] == 0.5
    assert failed["verdict"]["is"] == "same" and "says no" not in failed["verdict"]["text"]
    assert "answers that are neither yes nor no 0.0 to 50.0" in failed["verdict"]["text"]
    assert abs(failed["d_prime"]["delta"]) < 1e-9
    # one in seven wrong yes is mended, the others fail: a small gain, and no great skill
    few = said([("Yes" if n % 2 == 0 else "No" if n % 7 == 0 else None) for n in range(1200)])
    found = compare(LAYOUTS["pope"], [(yes, few)])
    mended = said([("Yes" if n % 2 == 0 else "No" if n % 7 == 0 else "Yes") for n in range(1200)])
    assert found["d_prime"]["method"] == compare(LAYOUTS["pope"], [(yes, mended)])["d_prime"]["method"]
    base = answers(1.5, 0.2)
    texts = [None if n % 10 == 0 else "Yes" if row["yes"] else "No" for n, row in enumerate(base.rows)]
    tenth = compare(LAYOUTS["pope"], [(base, said(texts))])
    assert tenth["verdict"]["is"] == "worse" and "says no" not in tenth["verdict"]["text"]
    assert tenth["d_prime"]["delta"] < 0


@pytest.mark.parametrize("scorer", ["ours", "vlmevalkit", "lmms"])
def test_answers_without_yes_or_no_that_become_no_are_no_shift(scorer: str) -> None:
    questions = [pope.Question(i, f"{i}.jpg", "", "no") for i in range(300)]
    base, method = (
        pope.score(questions, [pope.Answer(i, "no" if i < n else "a dog") for i in range(300)], scorer)
        for n in (100, 290)
    )
    verdict = compare(LAYOUTS["pope"], [(base, method)])["verdict"]
    assert verdict["is"] == "better" and "saying" not in verdict["text"]
    assert "answers that are neither yes nor no 66.7 to 3.3" in verdict["text"]


OBJECTS = ["dog", "cup", "cat", "car", "chair", "book", "bowl", "bench"]


def captions(
    images: int = 200, wrong: float = 0.3, named: int = 6, keep: float = 1.0, seed: int = 0
) -> chair.ChairResult:
    """Captions that name true objects first and then, at a rate that grows towards the end, absent ones."""
    rng, truth, made = np.random.default_rng(seed), {}, []
    for image in range(images):
        order = list(rng.permutation(OBJECTS))
        truth[image] = order[:4]
        words = [
            (order[4:] if rng.random() < wrong * place / named else order[:4])[rng.integers(4)]
            for place in range(named)
        ]
        text = " ".join(f"There is a {word}." for word in words).split()
        made.append(chair.Caption(image, " ".join(text[: round(keep * len(text))])))
    return chair.score(made, truth, "pattern")


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        ({"seed": 0, "keep": 0.5}, "better by saying less"),
        ({"wrong": 0.1}, "better"),
        ({"wrong": 0.6}, "worse"),
        ({"named": 12, "wrong": 0.6}, "worse by saying more"),  # the same captions, gone on with
        ({"seed": 0}, "same"),
    ],
)
def test_verdicts_of_captions_whose_truth_is_known(method: dict, verdict: str) -> None:
    found = compare(LAYOUTS["chair"], [(captions(), captions(**method))])
    assert found["verdict"]["is"] == verdict, found["verdict"]


def test_the_same_captions_cut_short_equal_the_baseline_at_equal_recall() -> None:
    base, cut = captions(), captions(keep=0.5)
    found = equal_recall(LAYOUTS["chair"], BENCHMARKS["chair"].layouts["chair"].answers, [(base, cut)])
    assert cut.chair_i < base.chair_i - 0.05
    assert found.base == pytest.approx(found.method, abs=1e-9)  # 50 % is a point of the frontier
    assert found.low <= 0 <= found.high


def test_equal_recall_is_read_off_the_frontier() -> None:
    base, method = captions(wrong=0.5), captions(wrong=0.1, keep=0.6)
    points = []
    for share in comparing.SHARES:  # by cutting the texts and scoring them again
        texts = [c.caption.split() for c in base.captions]
        kept = [chair.Caption(i, " ".join(words[: int(np.ceil(share * len(words)))])) for i, words in enumerate(texts)]
        truth = {c.image_id: {o.node for o in c.correct} for c in base.captions}
        again = chair.score(kept, truth, "pattern")
        points.append((sum(r["found"] for r in again.rows) / sum(r["truth"] for r in base.rows), again.chair_i))
    assert points[0][0] < method.recall < points[-1][0]
    after = next(i for i, (recall, _) in enumerate(points) if recall >= method.recall)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    expected = y0 + (method.recall - x0) / (x1 - x0) * (y1 - y0)
    found = equal_recall(LAYOUTS["chair"], BENCHMARKS["chair"].layouts["chair"].answers, [(base, method)])
    assert (found.base, found.method) == (pytest.approx(expected), pytest.approx(method.chair_i))


def test_only_what_both_files_have_is_compared_when_asked() -> None:
    base, method = captions(50), captions(40)
    with pytest.raises(VlmFixError, match="50 and 40, of which 40 are in both.*--common"):
        compare(LAYOUTS["chair"], [(base, method)])
    one, other = shared(base, method)
    assert one.rows == base.rows[:40] and one.captions == base.captions[:40] and other.rows == method.rows
    with pytest.raises(VlmFixError, match="different questions or labels"):
        compare(LAYOUTS["pope"], [(answers(1, 0, 2), flipped(answers(1, 0, 2)))])


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def told(capsys, *arguments: str) -> list[dict]:
    assert cli.main(["compare", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def kit_rows(seed: int, name: str = "existence") -> list[dict]:
    """VLMEvalKit's rows, two questions about each of 30 images, without a column of the image."""
    rng = np.random.default_rng(seed)
    return [
        {
            "index": n,
            "question": f"Is there a {('dog', 'cup')[n % 2]} in image {n // 2}?",
            "answer": ("Yes", "No")[n % 2],
            "category": name,
            "prediction": str(rng.choice(["Yes", "No"])),
        }
        for n in range(60)
    ]


def test_the_order_of_rows_does_not_change_a_comparison(tmp_path: Path, capsys) -> None:
    rows = kit_rows(1)
    base = lines(tmp_path / "base", kit_rows(0))
    for benchmark, name in (("pope", "random"), ("amber", "discriminative-attribute-state")):
        base = lines(tmp_path / "base", kit_rows(0, name))
        new = [{**row, "category": name} for row in rows]
        forward = told(capsys, base, lines(tmp_path / "new", new), "--benchmark", benchmark)
        assert told(capsys, base, lines(tmp_path / "new", new[::-1]), "--benchmark", benchmark) == forward
        assert forward[0]["delta"]["accuracy"]["delta"] != 0


def test_other_questions_about_the_same_images_are_not_compared(tmp_path: Path, capsys) -> None:
    files = []
    for split in ("random", "popular"):
        asked = coco_questions(split)[:600]
        questions = [vars(q) for q in asked]
        answered = [{"question_id": q.question_id, "text": "Yes", **vars(q)} for q in asked]
        for row in answered:
            row["question"], row["text"] = row["text"], "Yes"
        files.append((lines(tmp_path / f"{split}_q", questions), lines(tmp_path / split, answered)))
    results = [BENCHMARKS["pope"].results(answers, questions)["pope"] for questions, answers in files]
    one, other = (next(iter(each.values())) for each in results)
    with pytest.raises(VlmFixError, match=r"different questions.*\('is there a .*--common"):
        compare(LAYOUTS["pope"], [(one, other)])
    with pytest.raises(VlmFixError, match="different questions of the images that both have"):
        shared(one, other)


def test_with_common_an_image_counts_if_both_answer_the_same_questions_about_it(tmp_path: Path, capsys) -> None:
    questions = lines(tmp_path / "q", [vars(q) for q in coco_questions("random")[:600]])
    rows = [{"question_id": q.question_id, "text": "No"} for q in coco_questions("random")[:600]]
    base, new = lines(tmp_path / "base", rows), lines(tmp_path / "new", rows[:-1])
    options = ["--benchmark", "r-bench", "--questions", questions]
    assert cli.main(["compare", base, new, *options]) == 2
    assert "600 and 599 answers about the same images" in capsys.readouterr().err
    (found,) = told(capsys, base, new, *options, "--common")
    assert found["n"] == 594


def test_curves_need_captions_and_are_of_the_images_that_common_leaves(tmp_path: Path, capsys, monkeypatch) -> None:
    asked = lines(tmp_path / "asked", kit_rows(0, "discriminative-attribute-state"))
    options = ["--frontier", str(tmp_path / "f.png")]
    assert cli.main(["compare", asked, asked, "--benchmark", "amber", *options]) == 2
    assert f"--frontier draws captions, and {asked} has none" in capsys.readouterr().err
    assert not (tmp_path / "f.png").exists()
    ids = [*ground_truth("coco", "pattern")][:4]
    told_of = {"base": ids, "new": ids[:3], "other": ids[1:]}
    files = [
        lines(tmp_path / name, [{"image_id": i, "caption": f"{'a dog and ' * n}a cat"} for n, i in enumerate(each)])
        for name, each in told_of.items()
    ]
    seen: dict[str, list] = {}
    monkeypatch.setattr(drawing, "draw", lambda curves, *_: seen.update(curves))
    captions = [*files, "--benchmark", "chair", "--variant", "pattern", "--json", *options]
    assert cli.main(["compare", *captions, "--common"]) == 0
    capsys.readouterr()
    both = ids[1:3]
    kept = {
        name: [{"image_id": i, "caption": f"{'a dog and ' * each.index(i)}a cat"} for i in both]
        for name, each in told_of.items()
    }
    for name, rows in kept.items():
        result = BENCHMARKS["chair"].results(lines(tmp_path / f"k-{name}", rows), variant="pattern", tell=str)
        layout = LAYOUTS["chair"]
        assert seen[name] == comparing.frontier(layout, layout.answers, *result["chair"].values())


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    curves = {"a": [(0.5, 0.1, 0.0), (1.0, 0.2, 0.1)]}
    for ending in (".png", ".svg", ".pdf"):
        drawing.draw(curves, "CHAIR_i", "recall", tmp_path / f"f{ending}")
        assert (tmp_path / f"f{ending}").stat().st_size > 1000
    whole = (tmp_path / "f.png").read_bytes()

    def cut(self, place, **how):
        Path(place).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", cut)
    point = {"size": "visual", "value": 64, "spec": "pai", "peak_mb": [1, 1]}
    results = {
        "runs": {
            name: {
                "pope": {"random": {"accuracy": 0.9}},
                "chair": {"captions": {"chair_i": 0.1, "recall": 0.8}},
            }
            for name in ("baseline", "hiprune:keep=32")
        }
    }
    for draw in (
        lambda place: drawing.draw(curves, "CHAIR_i", "recall", place),
        lambda place: pruning.figure(results, place),
        lambda place: scaling.figure({"points": [point]}, place),
    ):
        with pytest.raises(OSError, match="no space left"):
            draw(tmp_path / "f.png")
        assert (tmp_path / "f.png").read_bytes() == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == ["f.pdf", "f.png", "f.svg"]


@pytest.mark.parametrize("module", [methods_page, models_page])
def test_a_page_is_written_whole_or_not_at_all(module, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "page.md"
    place.write_text("as it was\n")
    monkeypatch.setattr(module, "page", lambda *_: "new\n")
    monkeypatch.setattr(sys, "argv", ["", str(place)])
    if module is methods_page:
        monkeypatch.setattr(module.measured, "write", lambda *_: None)

    def killed(self, target):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(OSError, match="killed"):
            module.main()
    assert place.read_text() == "as it was\n" and [*tmp_path.iterdir()] == [place]
    module.main()
    assert place.read_text() == "new\n"


def flipped(result: pope.PopeResult) -> pope.PopeResult:
    for row in result.rows:
        row["positive"] = 1 - row["positive"]
    return result


@needs_data
def test_public_captions_of_beam_search_cut_by_hand_are_better_only_by_saying_less(tmp_path: Path, capsys) -> None:
    base = PUBLIC / "beam5.jsonl"
    rows = [json.loads(line) for line in base.read_text().splitlines()]
    for row in rows:
        row["caption"] = " ".join(row["caption"].split()[:40])
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    options = ["--benchmark", "chair", "--variant", "pattern", "--json"]
    assert cli.main(["compare", str(base), str(short), str(PUBLIC / "ours.jsonl"), *options]) == 0
    short_one, ours = json.loads(capsys.readouterr().out)
    assert short_one["verdict"]["is"] == "better by saying less"
    assert short_one["delta"]["chair_i"]["delta"] < -0.03 and not short_one["equal_recall"]["excludes_zero"]
    assert ours["verdict"]["is"] == "same"  # OPERA against beam search: -1.1 points of CHAIR_i, [-2.4, 0.1]
    assert ours["delta"]["chair_s"]["excludes_zero"] and ours["outcomes"]["p"] < 0.05


@needs_data
def test_public_answers_and_an_all_cautious_copy(tmp_path: Path, capsys) -> None:
    base = DATA / "pope" / "answers_llava15" / "coco_adversarial.jsonl"
    questions = str(DATA / "pope" / "coco_pope_adversarial.json")
    labels = [json.loads(line)["label"] for line in Path(questions).read_text().splitlines()]
    rows = [json.loads(line) for line in base.read_text().splitlines()]
    rng = np.random.default_rng(0)
    mended = [dict(row) for row in rows]
    for row, label in zip(mended, labels, strict=True):
        if row["text"].lower().rstrip(".") != label and rng.random() < 0.4:
            row["text"] = label.title()
    better = tmp_path / "better.jsonl"
    better.write_text("".join(json.dumps(row) + "\n" for row in mended))
    arguments = ["score", "pope", questions, str(better), "--against", str(base)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "\nbetter: accuracy" in shown and "broken 0 " in shown
    assert cli.main([*arguments, "--json"]) == 0
    found, checked = json.loads(capsys.readouterr().out)
    fixed = sum(old != new for old, new in zip(rows, mended, strict=True))
    assert found["outcomes"]["mended"] == fixed and found["verdict"]["is"] == "better"
    assert (
        checked["part"] == "adversarial RePOPE"
        and checked["n"] == 2684
        and checked["delta"]["accuracy"]["base"] < 0.842
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "beaf"], "BEAF also needs --questions"),
        (["--benchmark", "mme", "--variant", "nltk"], "--variant has no effect on mme"),
    ],
)
def test_what_is_missing_or_has_no_effect_is_an_error(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(["compare", "a", "b", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_same_captions_twice_have_equal_rates_and_others_of_another_length_are_extrapolated(capsys) -> None:
    rng = np.random.default_rng(0)
    base = [
        {"image": i, "tokens": int(n), "hallucinated": int(rng.poisson(n / 20))}
        for i, n in enumerate(rng.integers(60, 110, 300))
    ]
    same = rate_ratio(base, base)
    assert (same["ratio"], same["low"], same["high"]) == (1, 1, 1) and not same["extrapolated"]
    short = [{"image": i, "tokens": 30 + i % 5, "hallucinated": int(rng.poisson(1))} for i in range(300)]
    assert rate_ratio(base, short)["extrapolated"] and rate_ratio(short, base)["extrapolated"]


def test_equal_chair_with_less_recall_is_worse_as_the_help_says(capsys) -> None:
    base, method = captions(wrong=0.5, named=10), captions(wrong=0.9, named=4)
    found = compare(LAYOUTS["chair"], [(base, method)])
    assert found["equal_recall"]["low"] > 0 and found["verdict"]["is"].startswith("worse"), found["verdict"]
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    assert "of captions that of CHAIR_i\nat equal recall" in capsys.readouterr().out
