"""HallusionBench: figures of the official functions on made-up marks, both ways of judging, and bad input."""

import doctest
import json
import random

import pytest

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA, read_rows
from vlm_fix.eval.scorers import hallusion
from vlm_fix.eval.stats import column_sums


def rows():
    return read_rows(DATA / "hallusion/hallusionbench.jsonl.gz", "HallusionBench")


def marked():
    """The questions with marks of a judge: 1 right, 0 wrong, 2 uncertain."""
    rng = random.Random(0)
    return [{**row, hallusion.MARK: rng.choice("1111111102")} for row in rows()]


OFFICIAL = {
    "overall": {"aAcc": 947 / 1129, "qAcc": 297 / 455, "fAcc": 210 / 346, "easy": 361 / 455, "hard": 349 / 430},
    "VD": {"aAcc": 497 / 591, "qAcc": 194 / 277, "fAcc": 147 / 230, "easy": 232 / 277, "hard": 226 / 274},
    "VS": {"aAcc": 450 / 538, "qAcc": 103 / 178, "fAcc": 63 / 116, "easy": 129 / 178, "hard": 123 / 156},
}


def test_figures_are_those_of_the_official_functions(tmp_path):
    """get_eval_all, get_eval_pair_all, _easy, _hard and get_eval_fig of tianyi-lab/HallusionBench@744007c."""
    path = tmp_path / "marked.json"
    path.write_text(json.dumps(marked()))
    asked, marks = hallusion.load_answers(path, "official")
    found = hallusion.score(marks, asked, "official")
    got = {part: {name: r.figures[name] for name in OFFICIAL["overall"]} for part, r in found.items()}
    assert got == OFFICIAL
    for each in found.values():
        sums = column_sums(each.rows, [name for name in each.rows[0] if name != "image"])
        assert {name: metric(sums) for name, metric in hallusion.METRICS.items()} == each.figures


def test_the_package_holds_all_questions():
    asked = hallusion.questions()
    assert len(asked) == 1129 and sum(not question.image for question in asked) == 178
    named = [row["filename"] for row in rows()]
    assert [q.image for q in asked] == [
        (name or "").removeprefix("./").removeprefix("hallusion_bench/") for name in named
    ]


def test_worked_example():
    assert doctest.testmod(hallusion) == (0, 2)


def test_answers_in_words():
    asked = [q for q in hallusion.questions() if q.label == "yes"]
    text_only = next(q for q in asked if not q.image)
    seen = next(q for q in asked if q.image)

    def right(question, answer, scorer="vlmevalkit"):
        return hallusion.score([answer], [question], scorer)["overall"].figures["aAcc"] == 1

    assert right(seen, "Yes, it is.") and not right(seen, "No.") and not right(seen, "I cannot tell")
    assert right(text_only, "I cannot tell") and not right(text_only, "No") and not right(text_only, None)
    assert not right(seen, "Yes. No.") and right(seen, "Yes. No.", "ours")


@pytest.mark.parametrize("reply", ["", " ", "nan", "None", "N/A", "...", "Failed to obtain answer via API.", None])
def test_no_answer_is_not_an_uncertain_one(reply):
    asked = [question for question in hallusion.questions() if not question.image]
    assert len(asked) == 178
    assert hallusion.score([reply] * 178, asked)["overall"].figures["aAcc"] == 0
    assert hallusion.score(["I am not certain."] * 178, asked)["overall"].figures["aAcc"] == 1


def test_bad_input_gets_one_sentence(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{**rows()[0], "model_prediction": "Yes"}] * 2))
    with pytest.raises(VlmFixError, match="1 question asked twice"):
        hallusion.score(*reversed(hallusion.load_answers(path)))
    assert cli.main(["score", "hallusion", str(path), "--scorer", "official"]) == 2
    assert "needs GPT-4's marks, --scorer vlmevalkit does not" in capsys.readouterr().err
    with pytest.raises(VlmFixError, match="'Yes' is no mark"):
        hallusion.verdict("Yes", "yes", "official")
    path.write_text(json.dumps([{"model_prediction": "Yes", "category": "VD"}]))
    with pytest.raises(VlmFixError, match="row 1: 'subcategory' is missing"):
        hallusion.load_answers(path)


def test_the_command_scores_a_file(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{**row, "model_prediction": "Yes."} for row in rows()]))
    assert cli.main(["score", "hallusion", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    yes = sum(row["gt_answer"] == "1" for row in rows())
    assert said["overall"]["aAcc"] == yes / 1129 and said["overall"]["yes_ratio"] == 1
    assert said["VD"]["n"] + said["VS"]["n"] == 1129
