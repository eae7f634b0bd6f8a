"""HallusionBench in every layout, its incomplete files and its marks."""

import random

import pytest

from tests.support.answer_files import SUFFIX, hallusion_rows, lines
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import hallusion


def place(row: dict, visual: bool = False) -> str:
    keys = ("category", "subcategory", *["visual_input"] * visual, "set_id", "figure_id", "question_id")
    return "_".join(row[key] for key in keys)


@pytest.mark.parametrize("layout", ["official", "LLaVA", "LLaVA in order", "VLMEvalKit", "lmms-eval"])
def test_hallusionbench_in_every_layout(layout, tmp_path):
    rows = [row for row in hallusion_rows() if row["visual_input"] != "0"]  # 951, as other harnesses ask
    rng = random.Random(3)
    said = [rng.choice(["Yes.", "No."]) for _ in rows]
    made = [
        {
            "official": {**row, "model_prediction": one},
            "LLaVA": {"question_id": place(row), "prompt": row["question"], "text": one},
            "LLaVA in order": {"question_id": n, "prompt": row["question"] + SUFFIX, "text": one},
            "VLMEvalKit": {"index": place(row, True), "question": row["question"], "answer": "Yes", "prediction": one},
            "lmms-eval": {"doc_id": n, "filtered_resps": one, "target": "1", "aAcc": {**row, "model_prediction": one}},
        }[layout]
        for n, (row, one) in enumerate(zip(rows, said, strict=True))
    ]
    told: list[str] = []
    found = hallusion.BENCHMARK.score_files(lines(tmp_path / "a", made), tell=told.append)["overall"]
    right = sum((one == "Yes.") == (row["gt_answer"] == "1") for row, one in zip(rows, said, strict=True))
    assert found["n"] == 951 and found["aAcc"] == right / 951
    assert found["mean"] == pytest.approx((found["aAcc"] + found["fAcc"] + found["qAcc"]) / 3)
    assert told[-1].startswith(
        "note: 951 of HallusionBench's 1129 questions are answered; the others (first VS_chart_0_0_0)"
    )


def test_hallusionbench_of_vlmevalkit_has_its_figures(tmp_path):
    """Printed by VLMEvalKit@e8e78f0 on these answers: aAcc, fAcc and qAcc."""
    rng = random.Random(0)
    odd = ["Yes, it is", "No.", "Unclear", "Yes and no"]
    rows = []
    for question in [q for q in hallusion.questions() if q.image]:
        index = [question.category, question.subcategory, question.visual]
        reply = question.label if rng.random() < 0.7 else rng.choice(odd)
        row = {"index": "_".join([*index, question.set, question.figure, question.question]), "prediction": reply}
        rows.append(row | {"question": question.text, "answer": question.label.capitalize()})
    found = hallusion.BENCHMARK.score_files(lines(tmp_path / "a", rows))
    printed = {
        "overall": (75.920084, 48.554913, 57.362637),
        "VD": (77.326565, 53.478261, 58.844765),
        "VS": (73.611111, 38.793103, 55.056180),
    }
    for part, figures in printed.items():
        assert [100 * found[part][name] for name in ("aAcc", "fAcc", "qAcc")] == pytest.approx(figures, abs=1e-6)
        assert 100 * found[part]["mean"] == pytest.approx(sum(figures) / 3, abs=1e-6)


@pytest.mark.parametrize("kind", [int, str, float, lambda mark: f"{mark}.0"])
def test_marks_of_a_judge_in_every_writing(kind, tmp_path):
    rng = random.Random(5)
    marks = [rng.choice([0, 1, 1, 2]) for _ in hallusion_rows()]
    rows = [{**row, "gpt4v_output_gpt_check": kind(mark)} for row, mark in zip(hallusion_rows(), marks, strict=True)]
    found = hallusion.BENCHMARK.score_files(lines(tmp_path / "a", rows))[
        "overall"
    ]  # marks alone: the scorer is official
    blind = [row["category"] == "VS" and row["figure_id"] == "0" for row in hallusion_rows()]
    right = sum(mark == 1 or (mark == 2 and alone) for mark, alone in zip(marks, blind, strict=True))
    assert found["scorer"] == "official" and found["aAcc"] == right / 1129


def test_hallusionbench_null_is_a_failure_and_a_missing_key_a_question_not_asked(tmp_path):
    rows = [{**row, "model_prediction": None} for row in hallusion_rows()]
    assert (
        hallusion.BENCHMARK.score_files(lines(tmp_path / "a", rows))["overall"]["aAcc"] == 0
    )  # in 178 it counted as right
    for row in rows[:1000]:
        row["model_prediction"] = {"0": "No", "1": "Yes"}[row["gt_answer"]]
    rows = [row for row in rows[:1000]] + [
        {k: v for k, v in row.items() if k != "model_prediction"} for row in rows[1000:]
    ]
    found = hallusion.BENCHMARK.score_files(lines(tmp_path / "b", rows))["overall"]
    assert found["n"] == 1000 and found["aAcc"] == found["qAcc"] == found["fAcc"] == 1
    with pytest.raises(VlmFixError, match="all replies in model_prediction are 0, 1 or 2: if a judge gave these marks"):
        hallusion.BENCHMARK.score_files(
            lines(tmp_path / "c", [{**row, "model_prediction": "1"} for row in hallusion_rows()])
        )
