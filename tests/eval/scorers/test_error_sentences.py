"""What scorers say of files that are readable and yet wrong: one sentence each, with the row or the id that is meant.

Each row here is a branch of a scorer that no other test of the scorers goes through.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.report import tables
from vlm_fix.eval.run import runner
from vlm_fix.eval.scorers import amber, chair, dash_b, pope_prob, reefknot, result
from vlm_fix.eval.scorers.chair import data as chair_data
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import files as pope_files
from vlm_fix.eval.scorers.registry import better
from vlm_fix.eval.stats import expanded

COCO = "COCO_val2014_{:012d}.jpg"
ASKED = [
    {"question_id": n, "image": COCO.format(n), "text": f"Is there a {name} in the image?", "label": label}
    for n, name, label in [(1, "dog", "yes"), (2, "cat", "no")]
]
SURE = [{"question_id": n, "p_yes": 0.7, "p_no": 0.2, "yes_tokens": ["Yes"], "no_tokens": ["No"]} for n in (1, 2)]
EVAL = [
    {"run": run, "benchmark": "pope", "batch": 0, "id": n, "image": f"{n}.jpg", "prompt": "Is there a dog?"}
    | {"label": label, "splits": ["random"], "p_yes": p, "p_no": None if p is None else 0.9 - p}
    for run in ("baseline", "pai")
    for n, label, p in [(1, "yes", 0.8), (2, "no", 0.1), (3, "no", None)]
]
SAID = [{"question_id": n, "answer": "Yes."} for n in (1, 2)]
CAPTIONS = [{"image_id": n, "caption": "A dog on a bed."} for n in (1, 2)]
KNOT = {"image_id": 1, "query_prompt": "Is it on?", "label": "Yes", "type": "Yes/No", "relation_type": "perception"}


def changed(rows: list[dict[str, Any]], place: int, **new: Any) -> list[dict[str, Any]]:
    return [{**row, **new} if i == place else row for i, row in enumerate(rows)]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("pope-prob asked said", {"asked": ASKED, "said": [*SURE, SURE[0]]}, "row 3: question_id 1 comes twice; keep one."),
    ("pope-prob asked said", {"asked": ASKED, "said": changed(SURE, 1, no_tokens=["no"])},
     "row 2: other tokens count as yes or no than in the rows before."),
    ("pope-prob asked said", {"asked": ASKED, "said": SURE[:1]}, "(question_id '2')"),
    ("pope-prob asked said", {"asked": ASKED, "said": changed(SURE, 1, prompt="Is there a car in the image?")},
     "row 2 answers 'Is there a car in the image?' under id 2, where"),
    ("pope-prob asked said", {"asked": ASKED, "said": changed(SURE, 1, image=COCO.format(7))},
     "row 2 answers 'COCO_val2014_000000000007.jpg' under id 2, where"),
    ("pope-prob said", {"said": SURE}, "has no questions: give the question file before it"),
    ("pope-prob asked said --method pai", {"asked": ASKED, "said": SURE}, "--method has no effect but on the samples"),
    ("pope-prob asked samples.jsonl", {"asked": ASKED, "samples.jsonl": EVAL}, "brings its questions along: leave"),
    ("pope-prob samples.jsonl --method var", {"samples.jsonl": EVAL}, "has no run 'var': give one of baseline, pai."),
    ("pope-prob samples.jsonl", {"samples.jsonl": [row for row in EVAL if row["p_yes"] is None]},
     "has no p_yes and p_no of questions with yes or no"),
    ("pope-prob samples.jsonl", {"samples.jsonl": EVAL, "results.json": "[1]"}, "does not say which tokens are yes and no"),
    ("pope-prob samples.jsonl", {"samples.jsonl": EVAL, "results.json": b"\xff\xfe\x00"}, "results.json"),
    ("opope asked said --scorer ours --variant pattern",
     {"asked": changed(ASKED, 1, text="Is there a unicorn in the image?"), "said": CAPTIONS},
     "CHAIR does not know the object 'unicorn': --scorer official reads it by its letters."),
    ("opope asked said", {"asked": changed(ASKED, 1, image="2.jpg"), "said": CAPTIONS}, "2.jpg is no COCO name with 12 digits"),
    ("opope asked said", {"asked": ASKED, "said": [*CAPTIONS, CAPTIONS[0]]}, "several captions of an image"),
    ("opope asked said", {"asked": ASKED, "said": [{"image_id": 9, "caption": "A dog."}]}, "describes none of the images"),
    ("r-bench asked said", {"asked": ASKED, "said": [*SAID, {"question_id": 9, "answer": "Yes."}]},
     "answers question '9', which"),
    ("r-bench asked said --subsets ids", {"asked": ASKED, "said": SAID, "ids": "[1, 7]"}, "The subsets name question '7', which"),
    ("r-bench asked said --subsets ids", {"asked": ASKED, "said": SAID, "ids": "7"}, "is not a JSON array of question ids."),
    ("r-bench asked said --subsets none", {"asked": ASKED, "said": SAID}, "none"),
    ("pope folder said", {"folder/": "", "said": SAID}, "holds no question files"),
    ("pope asked said", {"asked": [{**{k: v for k, v in ASKED[0].items() if k != "label"}, "category": "random"}], "said": SAID},
     'row 1: no "label", and no official question about its image'),
    ("pope asked said", {"asked": changed(ASKED, 1, label="maybe"), "said": SAID},
     "row 2: label 'maybe' is neither \"yes\" nor \"no\"."),
    ("pope asked said", {"asked": changed(ASKED, 1, text=7), "said": SAID}, "row 2: image and text must be texts"),
    ("pope said", {"said": [{"id": 1, "question": "Is it?", "answer": "Yes", "label": "yes", "category": "random"},
                            {"id": 1, "question": "Is it?", "answer": "No", "label": "yes", "category": "random"}]},
     "row 2: the question '1' of random comes twice; keep one"),
    ("reefknot said", {"said": [{**KNOT, "type": "Open", "response": "Yes"}]}, "type 'Open' with label 'Yes' is not scored"),
    ("reefknot said", {"said": [{**KNOT, "label": "A", "response": "Yes"}]}, "type 'Yes/No' with label 'A' is not scored"),
    ("reefknot said", {"said": [{key: value for key, value in KNOT.items() if key != "label"} | {"response": "Yes"}]},
     'row 1: no "label" in its keys'),
    ("chair said", {"said": '{"sentences": ["a dog", "a cat"]}'}, "not a row with names but"),
]  # fmt: skip


def laid(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        if name.endswith("/"):
            (folder / name).mkdir()
        elif isinstance(content, list):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(("command", "files", "sentence"), WRONG, ids=[f"{c}: {s[:40]}" for c, _, s in WRONG])
def test_a_wrong_file_is_one_sentence(
    command: str, files: dict[str, Any], sentence: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    laid(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score", *command.split()]) == 2
    said = capsys.readouterr().err
    assert sentence in " ".join(said.split()), said
    assert "Traceback" not in said and not any(tmp_path.glob("**/*.html"))


def test_probabilities_of_a_run_are_scored_by_run_and_split(tmp_path: Path, capsys: Any) -> None:
    laid(
        tmp_path,
        {"samples.jsonl": EVAL, "results.json": json.dumps({"probabilities": {"yes_tokens": ["Yes"], "n": 1}})},
    )
    assert cli.main(["score", "pope-prob", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert {*found} == {"baseline: random", "pai: random"}, "the row without a probability is in no part"
    assert all((part["n"], part["accuracy"], part["auroc"]) == (2, 1.0, 1.0) for part in found.values())
    assert "read 4 rows of p_yes and p_no" in err and "2 rows have none" in err
    assert cli.main(["score", "pope-prob", str(tmp_path), "--method", "pai", "--json"]) == 0
    assert {*json.loads(capsys.readouterr().out)} == {"random"}
    laid(tmp_path, {"samples.jsonl": [row | {"benchmark": row["run"]} for row in EVAL]})
    assert cli.main(["score", "pope-prob", str(tmp_path), "--json"]) == 0
    assert {*json.loads(capsys.readouterr().out)} == {"baseline: baseline random", "pai: pai random"}


def test_what_cannot_be_told_is_null_in_json_and_a_dash_in_tables(tmp_path, capsys) -> None:
    rows = [
        {
            "run": "baseline",
            "benchmark": "pope",
            "batch": i,
            "id": str(i),
            "image": f"{i}.jpg",
            "prompt": "Is there a dog?",
        }
        | {"label": "yes", "splits": ["random"], "labels": {}, "p_yes": 0.7, "p_no": 0.2}
        for i in range(4)
    ]
    told = runner.probabilities(rows, {"yes": {"Yes": 1}, "no": {"No": 2}})
    json.dumps(told, allow_nan=False)
    assert told["runs"]["baseline"]["pope"]["random"]["auroc"] is None
    results = {"settings": {"data": {"pope": {}}}, "probabilities": told}
    (grid,) = tables._by_probability(results)
    assert [str(cell) for cell in grid.rows[0][2]] == ["4", "100.0", "-", "22.2", "90.0"]
    asked, given = tmp_path / "q.json", tmp_path / "p.jsonl"
    asked.write_text(json.dumps([{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}]))
    given.write_text('{"question_id": 1, "p_yes": 0.7, "p_no": 0.2, "yes_tokens": ["Yes"], "no_tokens": ["No"]}')
    assert cli.main(["score", "pope-prob", str(asked), str(given)]) == 0
    assert re.search(r"auroc +-$", capsys.readouterr().out, re.M)
    assert cli.main(["score", "pope-prob", str(asked), str(given), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))


def test_why_probabilities_are_missing_is_told() -> None:
    tokens = {"yes_tokens": ["Yes"], "no_tokens": ["No"]}
    for settings, probabilities, run, reason in (
        ({"server": "http://a"}, {}, "pai", "a server answers"),
        ({"engine": "vllm"}, tokens, "pai", "vLLM answers"),
        ({}, {**tokens, "yes_tokens": []}, "pai", "no token of the vocabulary is yes"),
        ({}, tokens, "draft:keep=0.5", "it drafts"),
        ({}, tokens, "opera", "in a loop of its own"),
    ):
        results = {"settings": settings, "warnings": {}, "runs": {run: {}}, "changed": {}}
        assert tables.notes(results) == [], "nothing with yes or no was asked"
        results["probabilities"] = {**probabilities, "runs": {}}
        ((where, note),) = tables.notes(results)
        assert where == run and note.startswith("p_yes and p_no were not read: ") and reason in note
        results["probabilities"]["runs"] = {run: {}}
        assert tables.notes(results) == []


def test_auroc_without_one_of_the_labels_is_no_number() -> None:
    assert math.isnan(pope_prob.auroc([(0.3, True), (0.4, True)])) and math.isnan(pope_prob.auroc([(0.3, False)]))


def test_sentences_of_functions(tmp_path: Path) -> None:
    with pytest.raises(VlmFixError, match="There are no answers to score"):
        result.tally("official", [], {})
    with pytest.raises(VlmFixError, match="per_image=5: give an even number"):
        pope_data.make_questions([], per_image=5)
    asked = [reefknot.Question(kind, "1", "?", kind, "perception", "yes") for kind in ("reefknot", "choices")]
    with pytest.raises(VlmFixError, match="yes/no questions and choices apart"):
        reefknot.score(["Yes", "A"], asked)
    laid(tmp_path, {"truth.json": '{"1": "dog"}', "dash_benchmark_neg.json": "7"})
    with pytest.raises(VlmFixError, match="truth.json is not of the form"):
        chair_data.ground_truth(tmp_path / "truth.json", "pattern")
    with pytest.raises(VlmFixError, match="dash_benchmark_neg.json is not a list of DASH-B's images"):
        dash_b.questions(tmp_path)
    with pytest.raises(VlmFixError, match="dash_benchmark_neg.json"):
        dash_b.questions(tmp_path / "none")


def test_the_whole_coco_data_are_the_three_splits_and_the_older_one() -> None:
    found = pope_files.load("coco")
    assert {name: len(each) for name, each in found.items()} == {
        "random": 3000, "popular": 3000, "adversarial": 3000, "random (2910)": 2910
    }  # fmt: skip


def test_marks_of_captions_are_the_words_of_the_text() -> None:
    row = {"answer": "A dog and two cats near a table.", "ground_truth": ["dog"], "hallu": ["cat"]}
    for module, variant, absent in (
        (chair, "pattern", "not there"),
        (amber, "picto, pattern", "typical, but not there"),
    ):
        marks, wrong = module.mark(row, {"variant": variant})
        said = {row["answer"][m.start : m.end]: (m.node, m.right, m.reason) for m in marks}
        assert said["dog"][:2] == ("dog", True) and "in the image" in said["dog"][2]
        assert said["cats"] == ("cat", False, absent)
        assert wrong == sum(not m.right for m in marks) == len(said) - 1


@pytest.mark.parametrize(("name", "change", "expected"), [
    ("accuracy", 0.1, True), ("accuracy", -0.1, False), ("chair_i", -0.1, True), ("chair_i", 0.1, False),
    ("yes_ratio", 0.1, None), ("accuracy", 0.0, None),
])  # fmt: skip
def test_which_way_is_better(name: str, change: float, expected: bool | None) -> None:
    assert better(name, change) is expected


def test_an_interval_of_one_image_promises_nothing() -> None:
    assert expanded(0.95, 1) > 1 - 1e-8


@pytest.mark.parametrize("per_image", [-2, 0, 1, 5])
def test_an_odd_number_of_pope_questions_or_none_is_refused(per_image):
    from vlm_fix.eval.scorers.pope.data import make_questions

    with pytest.raises(VlmFixError, match=f"per_image={per_image}: give an even number"):
        make_questions(
            [("a.jpg", ["dog", "cat", "cup"]), ("b.jpg", ["bus", "car", "hat"])], images=1, per_image=per_image
        )


def test_as_many_answers_as_questions():
    from vlm_fix.eval.scorers import dash_b

    asked = [dash_b.Question(str(i), f"{i}.jpg", "Is there a dog?", "dog", "no") for i in range(3)]
    with pytest.raises(ValueError, match="shorter|longer"):
        dash_b.score(["no"] * 2, asked)


def test_mme_scores_are_told_in_points():
    from vlm_fix.eval.scorers import mme

    class Made:
        def to_dict(self):
            return {"score": 15.25, "n": 4}

    assert mme.in_points({"mme": {"perception": Made()}}) == {"perception": {"score": 1525.0, "n": 4}}
