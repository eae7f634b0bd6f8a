"""What is asked: Picto, folders and rows of one's own, split in two by image."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.recommend.api import seconds_of
from vlm_fix.eval.recommend.data import load


def rows(n=10):
    """Two questions and a caption of each image."""
    made = []
    for i in range(n):
        image = Image.new("RGB", (32, 32), (i, 0, 0))
        made += [
            {"image": image, "question": f"Is there a {w}?", "label": a} for w, a in (("dog", "yes"), ("cat", "no"))
        ]
        made.append({"image": image, "objects": ["dog", "dining table"]})
    return made


def test_rows_are_split_by_image_and_no_image_is_in_both_halves():
    data = load(rows(), None, 0)
    assert data.parts == ["captions", "questions"]
    assert len(data.search) == len(data.proof) == 5 and not {*data.search} & {*data.proof}
    assert len(data.pope.samples) == 20 and len(data.chair.samples) == 10
    assert {sample.file for sample in data.for_calibration().samples} == {*data.search}
    assert (
        data.chair.score({sample.id: "a dog at a table with a cat" for sample in data.chair.samples})["captions"].n
        == 10
    )


def test_objects_are_cocos_by_any_of_their_names():
    picture = Image.new("RGB", (8, 8))
    data = load([*rows(), {"image": picture, "objects": "bus, Dining Table, puppies"}], None, 0)
    assert data.chair.samples[-1].reference["ground_truth"] == ["bus", "dining table", "dog"]


def test_the_split_follows_the_seed():
    split = [load(rows(), None, seed).search for seed in (0, 0, 1)]
    assert split[0] == split[1] != split[2]


def test_a_limit_counts_images():
    data = load(rows(20), 9, 0)
    assert len(data.search) + len(data.proof) == 9


def test_files_name_images_from_their_own_folder(tmp_path):
    for i in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    file = tmp_path / "rows.jsonl"
    answers = [{"image": f"{i}.png", "question": "Is it red?", "answer": "yes" if i % 2 else "No"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    data = load(str(file), None, 0)
    assert data.parts == ["questions"] and data.about()["questions"] == 8
    assert all(sample.image.is_file() for sample in data.pope.samples)
    assert {sample.reference["label"] for sample in data.pope.samples} == {"yes", "no"}


def test_picto_asks_questions_and_captions_of_the_same_scenes():
    data = load("picto:shift", 12, 0)
    assert data.parts == ["captions", "questions"]
    assert {s.file for s in data.chair.samples} <= {*data.search, *data.proof}
    assert data.about()["sha256"] == load("picto:shift", 12, 0).about()["sha256"]


def test_a_coco_folder_asks_captions_of_the_images_that_it_asks_questions_about(tmp_path):
    scenes = picto.scenes("shift", 20, 0)
    (tmp_path / "annotations").mkdir()
    for kind, content in zip(("instances", "captions"), picto.coco_annotations(scenes), strict=True):
        (tmp_path / "annotations" / f"{kind}_val2014.json").write_text(json.dumps(content))
    for scene in scenes:
        scene.image.save(tmp_path / scene.file_name)
    data = load(f"coco:{tmp_path}", 10, 0)
    assert {s.file for s in data.chair.samples} == {s.file for s in data.pope.samples}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"question": "Is it?", "label": "yes"}, "row 1 of samples of the caller has no image"),
        ({"image": "a.png", "question": "Is it?"}, "label yes or no"),
        ({"image": "a.png", "question": "Is it?", "label": "perhaps"}, "label yes or no"),
        ({"image": "a.png", "objects": "dog, unicorn"}, "'unicorn' is none of COCO's"),
    ],
)
def test_a_bad_row_gets_one_sentence(wrong, said):
    with pytest.raises(VlmFixError, match=said):
        load([wrong, *rows()], None, 0)


def test_images_that_are_missing_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    made = [{"image": f"{i}.png", "question": "Is it red?", "label": "yes" if i % 2 else "no"} for i in range(10)]
    for i in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    with pytest.raises(VlmFixError, match=r"5 of the 10 images of rows.jsonl are no files, first .*5\.png"):
        load(str(file), None, 0)
    for wrong in ({"imgae": "0.png"}, {"image": ""}, {"image": 3}):
        file.write_text(
            "".join(json.dumps(row) + "\n" for row in [made[0], {**wrong, "question": "Is it?", "label": "no"}])
        )
        with pytest.raises(VlmFixError, match="row 2 of rows.jsonl has no image"):
            load(str(file), None, 0)


def test_a_question_is_asked_once_however_far_apart_and_with_one_answer():
    data = load([*rows(40), *rows(40)[:1]], None, 0)
    assert len(data.pope.samples) == 81  # an image of its own
    made = rows(40)
    twice = load([*made, made[0], made[1]], None, 0)
    assert len(twice.pope.samples) == 80 and "(2 repeated questions left out)" in twice.about()["source"]
    assert len({sample.id for sample in twice.pope.samples}) == 80
    for place in (1, len(made)):
        again = [*made[:place], {**made[0], "label": "no"}, *made[place:]]
        with pytest.raises(VlmFixError, match="asks 'Is there a dog\\?' again with the other answer"):
            load(again, None, 0)


def test_data_that_prove_nothing_are_an_error():
    with pytest.raises(VlmFixError, match="give at least 8"):
        load(rows(3), None, 0)
    with pytest.raises(VlmFixError, match="every question's answer is yes"):
        load([row for row in rows() if row.get("label") == "yes"], None, 0)
    with pytest.raises(VlmFixError, match=r"no file: give picto:SPLIT, coco:DIR or files"):
        load("pictures", None, 0)


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("1h30m", 5400), ("90", 90), (120, 120), ("1.5h", 5400)])
def test_a_budget_is_a_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "30 minutes", "5", "-3m", "m"])
def test_a_bad_budget_gets_one_sentence(text):
    with pytest.raises(VlmFixError, match="--budget"):
        seconds_of(text)
