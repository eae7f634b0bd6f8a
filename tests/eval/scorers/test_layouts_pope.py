"""POPE's answers in every layout, with the figures of LLaVA-1.5-7B's real answers."""

import random
from pathlib import Path

import pytest

from tests.support.answer_files import SUFFIX, lines, sheet
from tests.support.paths import DATA
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import files
from vlm_fix.eval.scorers import pope
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import files as pope_files

LLAVA = DATA / "pope" / "answers_llava15"
needs_llava = pytest.mark.skipif(not LLAVA.exists(), reason=f"LLaVA's answers are not in {LLAVA}")
OFFICIAL = {  # printed by POPE's evaluate.py on LLaVA-1.5-7B's answers: TP, FP, TN, FN
    "random": (1339, 98, 1402, 161),
    "popular": (1339, 216, 1284, 161),
    "adversarial": (1341, 366, 1134, 159),
}
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def counts(found: dict) -> tuple:
    return tuple(found[name] for name in ("tp", "fp", "tn", "fn"))


@pytest.fixture(scope="module")
def replies():
    """LLaVA-1.5-7B's real answers by split."""
    return {kind: files.read_rows(LLAVA / f"coco_{kind}.jsonl", "answers") for kind in OFFICIAL}


@pytest.fixture
def joint(replies):
    """The same in LLaVA's joint file: three splits one after the other, ids with offsets, no image."""
    return [
        {"question_id": offset + row["question_id"], "prompt": row["prompt"] + SUFFIX, "text": row["text"]}
        for kind, offset in OFFSETS.items()
        for row in replies[kind]
    ]


def kit_rows(replies):
    """VLMEvalKit's POPE: a question that several splits share comes once, its category names them all."""
    merged: dict = {}
    for kind, rows in replies.items():
        for question, row in zip(pope_data.coco_questions(kind), rows, strict=True):
            first = {"question": question.text, "answer": question.label.capitalize(), "prediction": row["text"]}
            merged.setdefault((question.image, question.text), first | {"kinds": []})["kinds"].append(kind)
    return [
        {"index": i, **{k: row[k] for k in ("question", "answer", "prediction")}, "category": ",".join(row["kinds"])}
        for i, row in enumerate(merged.values())
    ]


@needs_llava
def test_llavas_joint_file_is_three_splits(joint, tmp_path):
    found = pope.BENCHMARK.score_files(lines(tmp_path / "a", joint))
    assert {split: counts(found[split]) for split in OFFICIAL} == OFFICIAL
    checked = [*(f"{split} RePOPE" for split in OFFSETS), "mean", "overall", "mean RePOPE", "overall RePOPE"]
    assert list(found) == [*OFFSETS, *checked]
    assert found["mean"]["accuracy"] == pytest.approx((0.825 + 0.91367 + 0.87433) / 3, abs=1e-5)
    shuffled = random.Random(0).sample(joint, len(joint))
    assert pope.BENCHMARK.score_files(lines(tmp_path / "b", shuffled)) == found
    as_text = [{**row, "question_id": str(row["question_id"])} for row in joint]
    assert pope.BENCHMARK.score_files(lines(tmp_path / "c", as_text)) == found
    two = [row for row in joint if row["question_id"] > 10_000_000]
    assert pope.BENCHMARK.score_files(lines(tmp_path / "d", two)).keys() == {
        *("random", "popular", "mean", "overall"),
        *("random RePOPE", "popular RePOPE", "mean RePOPE", "overall RePOPE"),
    }


@needs_llava
def test_the_older_release_has_8910_questions(joint, tmp_path):
    """`random` of 2910 questions, by the package, by a folder of label files, and by a question file without labels."""
    old = pope_files.official()[pope_files.OLD]
    assert len(old) == 2910 and sum(question.label == "yes" for question in old) == 1500
    rng = random.Random(1)
    mine = [
        {"question_id": 10_000_000 + i, "prompt": q.text + SUFFIX, "text": rng.choice(["Yes", "No"])}
        for i, q in enumerate(old, 1)
    ]
    rows = joint[:3000] + mine + joint[6000:]
    right = sum((row["text"] == "Yes") == (q.label == "yes") for row, q in zip(mine, old, strict=True))
    path = lines(tmp_path / "a", rows)
    found = pope.BENCHMARK.score_files(path)
    assert [found[split]["n"] for split in OFFSETS] == [3000, 2910, 3000]
    assert found["random"]["accuracy"] == right / 2910
    assert {split: counts(found[split]) for split in ("popular", "adversarial")} == {
        split: OFFICIAL[split] for split in ("popular", "adversarial")
    }
    folder = tmp_path / "coco"
    folder.mkdir()
    by_split = {"popular": pope_data.coco_questions("popular"), "adversarial": pope_data.coco_questions("adversarial")}
    for split, questions in (by_split | {"random": old}).items():
        lines(folder / f"coco_pope_{split}.json", [vars(q) for q in questions])
    assert pope.BENCHMARK.score_files(path, str(folder)) == found
    unlabelled = [
        {"question_id": row["question_id"], "image": q.image, "text": row["prompt"], "category": split}
        for split, part, questions in (
            ("adversarial", joint[:3000], by_split["adversarial"]),
            ("random", mine, old),
            ("popular", joint[6000:], by_split["popular"]),
        )
        for row, q in zip(part, questions, strict=True)
    ]
    asked = lines(tmp_path / "llava_pope_test.jsonl", unlabelled)
    by_id = pope.BENCHMARK.score_files(lines(tmp_path / "b", rows[::-1]), asked)  # whatever the order
    assert {split: counts(by_id[split]) for split in OFFSETS} == {split: counts(found[split]) for split in OFFSETS}


@needs_llava
def test_an_incomplete_joint_file_says_how_far_it_goes(joint, tmp_path):
    with pytest.raises(
        VlmFixError, match=r"5712 answers, of which the first 3000 .* \(3000 of adversarial\); give all"
    ):
        pope.BENCHMARK.score_files(lines(tmp_path / "a", joint[:5712]))
    joint[4000]["prompt"] = "Is there a unicorn in the image?"
    with pytest.raises(VlmFixError, match="the first 3000 are those to whole splits"):
        pope.BENCHMARK.score_files(lines(tmp_path / "a", joint))


@needs_llava
@pytest.mark.parametrize(
    "form", ["plain", "upper and spaces", "CSV", "lmms-eval", "id and response", "image and prompt"]
)
def test_one_split_in_every_layout(form, replies, tmp_path):
    rows = replies["popular"]
    made = {
        "plain": [{"question_id": row["question_id"], "answer": row["text"]} for row in rows],
        "upper and spaces": [{"question": f" {r['prompt'].upper()}  ", "answer": r["text"]} for r in rows],
        "CSV": [{"question_id": row["question_id"], "text": row["text"]} for row in rows],
        "lmms-eval": [
            {
                "doc_id": i,
                "target": question.label,
                "filtered_resps": row["text"],
                "input": row["prompt"] + SUFFIX,
                "pope_accuracy": {"question_id": str(row["question_id"]), "score": 1.0, "prediction": "-"},
            }
            for i, (row, question) in enumerate(zip(rows, pope_data.coco_questions("popular"), strict=True))
        ],
        "id and response": [{"id": str(row["question_id"]), "response": row["text"]} for row in rows],
        "image and prompt": [
            {
                "question_id": 3 * i,
                "image": f"val2014/{row['image']}",
                "prompt": row["prompt"] + SUFFIX,
                "text": row["text"],
            }
            for i, row in enumerate(rows)
        ],
    }[form]
    path = lines(tmp_path / "a", made)
    if form == "CSV":
        body = "".join(f"{row['question_id']},{row['text']}\n" for row in made)
        path = str(tmp_path / "a.csv")
        Path(path).write_text("question_id,text\n" + body)
    questions = lines(tmp_path / "q.json", [vars(q) for q in pope_data.coco_questions("popular")])
    assert counts(pope.BENCHMARK.score_files(path, questions).to_dict()) == OFFICIAL["popular"]
    if form in ("upper and spaces", "lmms-eval"):  # the questions tell which split it is
        assert counts(pope.BENCHMARK.score_files(path).to_dict()) == OFFICIAL["popular"]


@needs_llava
def test_vlmevalkits_file_has_labels_and_splits_of_its_own(replies, tmp_path):
    told: list[str] = []
    rows = kit_rows(replies)
    found = pope.BENCHMARK.score_files(lines(tmp_path / "a", rows), scorer="vlmevalkit", tell=told.append)
    assert len(rows) == 5127 and [found[kind]["n"] for kind in OFFICIAL] == [3000] * 3
    # printed by VLMEvalKit@e8e78f0 on this file: F1 and accuracy
    printed = {
        "random": (91.181478, 91.366667),
        "popular": (87.688278, 87.466667),
        "adversarial": (83.504833, 82.366667),
    }
    for split, figures in (printed | {"overall": (87.345075, 87.066667)}).items():
        assert [100 * found[split][name] for name in ("f1", "accuracy")] == pytest.approx(figures, abs=1e-6)
    assert "rows of VLMEvalKit (reply in prediction, id in index)" in told[0] and "of the answer file" in told[1]
    sheet_rows = [[*rows[0]], *[[str(cell) for cell in row.values()] for row in rows]]
    (tmp_path / "model_POPE.xlsx").write_bytes(sheet(sheet_rows))
    assert pope.BENCHMARK.score_files(str(tmp_path / "model_POPE.xlsx"), scorer="vlmevalkit") == found


def test_labels_that_differ_are_told(tmp_path):
    told: list[str] = []
    asked = lines(tmp_path / "q", [{"question_id": 1, "image": "a.jpg", "text": "A dog?", "label": "yes"}])
    given = lines(tmp_path / "a", [{"question_id": 1, "label": "no", "text": "Yes"}])
    assert pope.BENCHMARK.score_files(given, asked, tell=told.append).accuracy == 1
    assert told[-1] == "note: 1 label of the answer file differs from the questions', which are used"
