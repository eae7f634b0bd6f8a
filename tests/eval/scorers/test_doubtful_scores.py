"""What `score` doubts of figures: labels that were read as the replies, options without effect, and one or many of a thing."""

import json

import pytest

from vlm_fix import cli
from vlm_fix.eval import files
from vlm_fix.eval.scorers.amber import data as amber_data
from vlm_fix.eval.scorers.pope import data as pope_data

DOUBT = (
    "each of the {} answers is right: if these are the labels and not the replies, name the key of the replies with "
    "--answer-key"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("key", ["answer", "text", "result"])
def test_labels_read_as_replies_are_doubted(key, tmp_path, capsys):
    asked = pope_data.coco_questions("random")
    rows = [{"question_id": q.question_id, key: q.label} for q in asked]
    told = "note: " + DOUBT.format(3000)
    assert cli.main(["score", "pope", "coco:random", write(tmp_path / "a", rows)]) == 0
    assert told in capsys.readouterr().err
    for wrong, expected in ((range(1), "99.9 % of the 3000 answers are right"), (range(1, 31), "")):
        for n in wrong:  # 1, then 31 labels that are wrong themselves
            rows[n][key] = {"yes": "no", "no": "yes"}[rows[n][key]]
        assert cli.main(["score", "pope", "coco:random", write(tmp_path / "b", rows)]) == 0
        err = capsys.readouterr().err
        assert expected in err and (bool(expected) or "right" not in err)


def test_labels_of_other_benchmarks_are_doubted_too(tmp_path, capsys):
    relation = [q for q in amber_data.questions() if q.kind == "relation"]
    rows = [{"id": q.id, "response": q.label.capitalize()} for q in relation]
    assert cli.main(["score", "amber", write(tmp_path / "a", rows)]) == 0
    assert f"note: relation: {DOUBT.format(1664)}" in capsys.readouterr().err
    rows = [
        {"img_id": f"{i}.png", "object_name": "bed", "gt": label, "answer": label}
        for i, label in enumerate(["yes", "no"] * 15)
    ]
    assert cli.main(["score", "dash-b", write(tmp_path / "d", rows)]) == 0
    assert f"note: questions: {DOUBT.format(30)}" in capsys.readouterr().err
    assert cli.main(["score", "dash-b", write(tmp_path / "e", rows[:19])]) == 0  # a good model may be right so often
    assert "is right" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, says",
    [
        (
            "score amber {amber} --variant pattern",
            "--variant has no effect on {amber}, of which no captions are scored",
        ),
        ("score opope coco:random {captions} --variant nltk", "--variant has no effect with --scorer official"),
    ],
)
def test_a_variant_without_effect_is_an_error(command, says, tmp_path, capsys):
    relation = [q for q in amber_data.questions() if q.kind == "relation"]
    paths = {
        "amber": write(tmp_path / "amber", [{"id": q.id, "response": "No"} for q in relation]),
        "captions": write(tmp_path / "captions", [{"image_id": 310196, "caption": "A dog."}]),
    }
    assert cli.main(command.format(**paths).split()) == 2
    assert says.format(**paths) in capsys.readouterr().err


def test_a_number_has_its_noun():
    assert [files.counted(n, "scene") for n in (0, 1, 2)] == ["0 scenes", "1 scene", "2 scenes"]


def test_files_are_written_into_folders_that_are_missing(tmp_path):
    files.write_atomic(tmp_path / "a/b/c.csv", "caf\u00e9\n")
    assert (tmp_path / "a/b/c.csv").read_bytes() == "caf\u00e9\n".encode() and len([*(tmp_path / "a/b").iterdir()]) == 1


def test_a_comparison_says_what_is_misread_and_what_failed(tmp_path, capsys):
    asked = [
        {"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog?", "label": "yes" if i % 2 else "no"}
        for i in range(24)
    ]
    questions = write(tmp_path / "q", asked)
    said = [{"question_id": q["question_id"], "text": f"{q['label'].capitalize()}, so it is."} for q in asked]
    base = write(tmp_path / "base", said)
    bold = write(tmp_path / "bold", [{**row, "text": f"**{row['text'].partition(',')[0]}**"} for row in said])
    lost = write(tmp_path / "lost", [{**row, "text": None if i < 3 else row["text"]} for i, row in enumerate(said)])
    told = f'note: {bold}: the scorer official takes 12 answers against their plain word: "**No**", which says no'
    assert cli.main(["compare", base, bold, lost, "--benchmark", "pope", "--questions", questions]) == 0
    out, err = capsys.readouterr()
    assert told in err and out.count("neither yes nor no") == 1
    assert out.partition("neither yes nor no")[2].split()[:2] == ["0", "3"]
    assert cli.main(["score", "pope", questions, bold, "--against", base]) == 0
    assert told in capsys.readouterr().err


def test_words_for_yes_and_no_in_other_languages_are_words(tmp_path, capsys):
    rows = [
        {"question_id": i, "image": "a.jpg", "text": "Is there a dog?", "label": "yes" if i else "no"} for i in range(2)
    ]
    given = write(tmp_path / "a", [{"question_id": i, "text": ("Non", "Oui")[i]} for i in range(2)])
    assert cli.main(["score", "pope", write(tmp_path / "q", rows), given, "--scorer", "ours", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["unparsed"] == 0 and json.loads(out)["accuracy"] == 1 and "holds yes or no" not in err
