"""Answers in the judges' input formats, as the judges' own scripts read them."""

import json

import pytest

from vlm_fix import cli
from vlm_fix.eval.scorers import judges


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTIONS = [
    {
        "image_id": f"{i:x}a",
        "image_content": ["Dog"],
        "question": f"How many dogs, {i}?",
        "gt_answer": "Two.",
        "model_answer": "",
    }
    for i in range(4)
]


@pytest.fixture
def template(tmp_path):
    (tmp_path / "template.json").write_text(json.dumps(QUESTIONS))
    return str(tmp_path / "template.json")


def run(judge, answers, out, *more):
    return cli.main(["export", judge, str(answers), "--out", str(out), *more])


def test_mmhal_fills_its_template_by_order_or_by_id(template, tmp_path, capsys):
    by_order = [{"question_id": i, "prompt": q["question"] + "\n", "text": f" {i}."} for i, q in enumerate(QUESTIONS)]
    by_id = [{"id": q["image_id"], "response": f"{i}."} for i, q in enumerate(QUESTIONS)][::-1]
    for rows in (by_order, by_id):
        assert run("mmhal", lines(tmp_path / "a", rows), tmp_path / "o.json", "--template", template) == 0
        made = json.loads((tmp_path / "o.json").read_text())
        assert made == [{**q, "model_answer": f"{i}."} for i, q in enumerate(QUESTIONS)]
    capsys.readouterr()
    assert run("mmhal", lines(tmp_path / "b", by_order[::-1]), tmp_path / "o", "--template", template) == 2
    assert "row 1 answers 'How many dogs, 3?" in capsys.readouterr().err
    assert run("mmhal", lines(tmp_path / "b", by_order[:3]), tmp_path / "o", "--template", template) == 2
    assert "has 4 questions and" in capsys.readouterr().err
    assert run("mmhal", tmp_path / "a", tmp_path / "o") == 2
    assert "give it with --template (response_template.json" in capsys.readouterr().err


def test_objhal_has_image_question_and_text(tmp_path, capsys):
    rows = [{"image_id": f"COCO_val2014_{i:012}.jpg", "question": "Describe it.", "answer": f"A {i}."} for i in (42, 7)]
    assert run("objhal", lines(tmp_path / "a", rows), tmp_path / "o.jsonl") == 0
    expected = [{"image_id": i, "question": "Describe it.", "text": f"A {i}."} for i in (42, 7)]
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()] == expected
    asked = lines(
        tmp_path / "q", [{"question_id": n, "image_id": i, "question": "Describe it."} for n, i in enumerate((42, 7))]
    )
    bare = lines(tmp_path / "b", [{"question_id": n, "text": f"A {i}."} for n, i in reversed([*enumerate((42, 7))])])
    assert run("objhal", bare, tmp_path / "p.jsonl", "--template", asked) == 0
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == expected
    assert run("objhal", bare, tmp_path / "p.jsonl") == 2
    assert "no image_id; give Object HalBench's questions" in capsys.readouterr().err


def test_llava_bench_and_mm_vet(tmp_path):
    rows = [{"question_id": i, "prompt": "What?", "text": None if i else "A dog.", "model_id": "m"} for i in range(2)]
    answers = lines(tmp_path / "a", rows)
    assert run("llava-bench", answers, tmp_path / "l.jsonl") == 0
    made = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["prompt"], row["text"], row["model_id"]) for row in made] == [
        (0, "What?", "A dog.", "m"),
        (1, "What?", "", "m"),
    ]
    assert run("mm-vet", answers, tmp_path / "v.json") == 0
    assert json.loads((tmp_path / "v.json").read_text()) == {"v1_0": "A dog.", "v1_1": ""}
    named = lines(tmp_path / "b", [{"id": "v1_7", "response": "A cat."}])
    assert run("mm-vet", named, tmp_path / "v.json") == 0
    assert json.loads((tmp_path / "v.json").read_text()) == {"v1_7": "A cat."}


def test_mmhal_is_never_filled_by_position_against_its_ids(template, tmp_path, capsys):
    own = [{"image_id": q["image_id"], "text": f"{i}."} for i, q in enumerate(QUESTIONS)]
    assert run("mmhal", lines(tmp_path / "a", own[::-1]), tmp_path / "o.json", "--template", template) == 0
    made = json.loads((tmp_path / "o.json").read_text())
    assert made == [{**q, "model_answer": f"{i}."} for i, q in enumerate(QUESTIONS)]
    numbered = [{"question_id": i, "text": f"{i}."} for i in range(4)]
    assert run("mmhal", lines(tmp_path / "a", numbered), tmp_path / "o.json", "--template", template) == 0
    capsys.readouterr()
    for rows in (
        numbered[::-1],
        [numbered[0]] * 4,
        [*own[:3], own[0]],
        [{"id": f"x{i}", "text": "A"} for i in range(4)],
    ):
        assert run("mmhal", lines(tmp_path / "a", rows), tmp_path / "p", "--template", template) == 2
        assert "are not those of" in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_what_a_judge_would_misread_is_refused(tmp_path, capsys):
    row = {"question_id": 1, "prompt": "What?", "text": "A dog."}
    for judge, rows, message in (
        ("mm-vet", [{"id": "v1_0", "text": "A"}, {"id": "0", "text": "B"}], "row 2: id 'v1_0' comes twice"),
        ("mm-vet", [{"id": "hello", "text": "A"}], "row 1: the id is 'hello'; mm-vet's are v1_0"),
        ("llava-bench", [{"question_id": 1, "text": "A"}], "row 1: no question"),
        ("llava-bench", [row, row], "row 2: question_id 1 comes twice"),
        ("objhal", [{"image_id": 7, **row}] * 2, "comes twice"),
    ):
        assert run(judge, lines(tmp_path / "a", rows), tmp_path / "o") == 2
        assert message in capsys.readouterr().err


def test_the_folder_of_the_file_is_made(tmp_path):
    answers = lines(tmp_path / "a", [{"id": "v1_7", "response": "A cat."}])
    assert run("mm-vet", answers, tmp_path / "new" / "folder" / "v.json") == 0
    assert json.loads((tmp_path / "new" / "folder" / "v.json").read_text()) == {"v1_7": "A cat."}


def test_a_caption_that_failed_is_no_empty_one_for_the_judge(tmp_path, capsys):
    rows = [{"image_id": i, "question": "Describe it.", "text": None if i == 2 else "A dog."} for i in (1, 2, 3)]
    command = ["export", "objhal", lines(tmp_path / "a", rows), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert [json.loads(line)["image_id"] for line in (tmp_path / "out").read_text().splitlines()] == [1, 3]
    assert "1 of them null, which are left out" in capsys.readouterr().err


def test_mm_vet_says_how_many_of_its_questions_are_answered(tmp_path):
    told = []
    (tmp_path / "a").write_text(
        "".join(json.dumps({"question_id": f"v1_{n}", "text": "A dog."}) + "\n" for n in range(96))
    )
    judges.export("mm-vet", str(tmp_path / "a"), str(tmp_path / "out"), tell=told.append)
    assert told[-1] == "note: 96 of MM-Vet's 218 questions are answered"
