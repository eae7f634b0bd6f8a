"""Where a row offers two replies or two ids nothing is guessed: an error names both, and an option decides."""

import doctest
import json

import pytest

from tests.support.answer_files import lines, read
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import answers, chair, chats


@pytest.mark.parametrize(
    "row, how, says",
    [
        ({"question_id": 1, "text": "Is it?", "answer": "Yes"}, {}, 'both "text" and "answer" .* --answer-key answer'),
        ({"image_id": 1, "caption": "A", "text": "B"}, {"images": True}, 'both "caption" and "text"'),
        ({"id": 1, "response_vcd": "A", "response_pai": "B"}, {}, 'both "response_vcd" and "response_pai"'),
        ({"id": 1, "question_id": 2, "text": "A"}, {}, r'both "question_id" \(2\) and "id" \(1\) .* --id-key'),
        ({"image_id": 9, "id": 8, "caption": "A"}, {"images": True}, r'both "image_id" \(9\) and "id" \(8\)'),
        ({"image": "COCO_val2014_000000000009.jpg", "question_id": 8, "text": "A"}, {"images": True}, "--id-key image"),
        ({"id": 1, "words": "A"}, {}, 'no "text" or "answer" .*its keys are id, words.*--answer-key'),
        ({"id": 1, "text": "A"}, {"keys": answers.Keys("says")}, 'no "says" .*as --answer-key'),
        ({"id": 1, "text": "A"}, {"keys": answers.Keys(None, "says")}, 'no "says" .*as --id-key'),
        ({"id": 1, "text": ["A", "B"]}, {}, r"the reply in \"text\" is \['A', 'B'\], not a text"),
        ({"id": 1, "text": True}, {}, "is True, not a text"),
        ({"id": True, "text": "A"}, {}, "is True, which is no id"),
    ],
)
def test_two_candidates_are_an_error_that_names_both(row, how, says, tmp_path):
    with pytest.raises(VlmFixError, match=says):
        read(lines(tmp_path / "a", [row]), **how)


def test_the_options_decide(tmp_path, capsys):
    questions = [{"question_id": i, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"} for i in (1, 2)]
    asked = lines(tmp_path / "q", questions)
    given = lines(tmp_path / "a", [{**row, "id": 7, "answer": "yes"} for row in questions])
    assert cli.main(["score", "pope", asked, given]) == 2
    assert "--answer-key answer" in capsys.readouterr().err
    assert cli.main(["score", "pope", asked, given, "--answer-key", "answer"]) == 2
    assert "--id-key question_id" in capsys.readouterr().err
    keys = ["--answer-key", "answer", "--id-key", "question_id", "--json"]
    assert cli.main(["score", "pope", asked, given, *keys]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["accuracy"] == 1
    assert "JSON lines, plain rows (reply in answer, id in question_id)" in err
    captions = [{"image_id": 9, "text": "Describe the zebra.", "answer": "A bowl."}]
    path = lines(tmp_path / "c", captions)
    assert cli.main(["score", "chair", path, "--variant", "pattern"]) == 2
    assert cli.main(["score", "chair", path, "--variant", "pattern", "--answer-key", "answer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chair_s"] == 0


def test_candidates_that_say_the_same_are_no_conflict(tmp_path):
    row = {"image_id": 391895, "image": "val2014/COCO_val2014_000000391895.jpg", "id": "cap_2", "caption": "A dog"}
    assert read(lines(tmp_path / "a", [row]), images=True) == [("391895", "A dog")]


@pytest.mark.parametrize(
    "name, number",
    [
        ("COCO_val2014_000000391895.jpg", 391895),
        ("COCO_train2014_000000000042", 42),
        ("/data/val2017/000000062554.png", 62554),
        (r"D:\coco\COCO_val2014_000000391895.JPG", 391895),
        ("391895", 391895),
        (42.0, 42),
        ("42.jpg", 42),
        *[(name, None) for name in ("COCO_val2014_000000391895_25", "COCO_val2014_391895.jpg", "vg_123.jpg", "img25")],
        *[(name, None) for name in ("COCO_val2014_0000000391895.jpg", "000000391895_blur.jpg", 4.5, True, "")],
    ],
)
def test_an_image_is_named_by_its_12_digits_or_refused(name, number, tmp_path):
    path = lines(tmp_path / "a", [{"image_id": name, "caption": "A dog"}])
    if number is not None:
        assert chair.files.load_captions(path) == [(number, "A dog")]
    else:
        with pytest.raises(VlmFixError, match="which is no id of an image: a number, or a COCO name with 12 digits"):
            chair.files.load_captions(path)


def test_worked_example():
    assert doctest.testmod(answers) == (0, 1) and doctest.testmod(chats) == (0, 3)
