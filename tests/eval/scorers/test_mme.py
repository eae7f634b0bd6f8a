"""MME: figures of the official scorer on made-up results of all fourteen tasks, its folder layout, and bad input."""

import doctest
import json
import random

import pytest

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import mme, result
from vlm_fix.eval.stats import column_sums

TASKS = (*mme.PERCEPTION, *mme.COGNITION)
REPLIES = ["Yes", "No", "yes, it is", "No.", " no", "Know", "It is", "Well, yes", "not sure", "NO", "The yes", ""]


def write_results(folder):
    """One TASK.txt per task: 6 to 19 images, odd answers among them."""
    rng = random.Random(0)
    for task in TASKS:
        lines = []
        for image in range(6 + rng.randrange(14)):
            for truth in ("Yes", "No"):
                reply = truth if rng.random() < 0.5 else rng.choice(REPLIES)
                lines.append(f"{image:06}.jpg\tIs there {image}? Please answer yes or no.\t{truth}\t{reply}\n")
        (folder / f"{task}.txt").write_text("".join(lines))
    return folder


OFFICIAL = {
    "existence": 102.63157894736842,
    "count": 64.28571428571428,
    "position": 84.375,
    "color": 87.5,
    "posters": 73.68421052631578,
    "celebrity": 94.11764705882354,
    "scene": 121.42857142857143,
    "landmark": 123.07692307692307,
    "artwork": 97.36842105263158,
    "OCR": 78.57142857142857,
    "perception": 927.0394949477767,
    "commonsense_reasoning": 66.66666666666666,
    "numerical_calculation": 104.54545454545453,
    "text_translation": 112.50000000000001,
    "code_reasoning": 113.63636363636363,
    "cognition": 397.3484848484848,
}


def test_scores_are_those_of_the_official_scorer(tmp_path):
    """Printed by eval_tool/calculation.py on these results: the score of each task and of both groups."""
    asked, answers = mme.load_results(write_results(tmp_path))
    found = mme.score(answers, asked)
    assert {part: 100 * found[part].figures["score"] for part in OFFICIAL} == pytest.approx(OFFICIAL, rel=1e-12)
    tasks = [found[task].figures["score"] for task in mme.HALLUCINATION]
    assert found["hallucination"].figures["score"] == pytest.approx(sum(tasks), rel=1e-12)
    assert found["hallucination"].n == sum(found[task].n for task in mme.HALLUCINATION)
    for each in found.values():  # the bootstrap sums the columns of the first row
        sums = column_sums(each.rows, [name for name in each.rows[0] if name != "image"])
        assert {name: metric(sums) for name, metric in mme.METRICS.items()} == each.figures


def test_worked_examples():
    assert [doctest.testmod(module) for module in (mme, result)] == [(0, 2), (0, 1)]


def test_answers_are_read_as_the_official_scorer_does():
    read = {reply: mme.verdict(reply, "no", "official") for reply in REPLIES}
    yes, no = ("Yes", "yes, it is"), ("No", "No.", " no", "Know", "not sure", "NO")
    assert read == {reply: "yes" if reply in yes else "no" if reply in no else "unknown" for reply in REPLIES}
    ours = {reply: mme.verdict(reply, "no", "ours") for reply in ("Know", "Well, yes", "not sure")}
    assert ours == {"Know": "unknown", "Well, yes": "yes", "not sure": "unknown"}
    assert mme.verdict(None, "no", "official") == "unknown"


@pytest.fixture
def release(tmp_path):
    """Both layouts of the release: folders of images and texts, and everything in one."""
    texts = tmp_path / "count" / "questions_answers_YN"
    (tmp_path / "count" / "images").mkdir(parents=True)
    texts.mkdir()
    (tmp_path / "color").mkdir()
    (tmp_path / "count" / "images" / "a.jpg").write_bytes(b"")
    (texts / "a.txt").write_text("Are there two dogs? Please answer yes or no.\tYes\nThree?\tNo\n")
    (tmp_path / "color" / "b.png").write_bytes(b"")
    (tmp_path / "color" / "b.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n\n")
    return tmp_path


def test_the_release_is_read_in_both_layouts(release):
    asked = mme.load(release)
    assert [(q.id, q.label) for q in asked] == [
        ("count/a/1", "yes"),
        ("count/a/2", "no"),
        ("color/b/1", "yes"),
        ("color/b/2", "no"),
    ]
    assert asked[0].text == "Are there two dogs? Please answer yes or no." and asked[2].image.endswith("color/b.png")
    assert list(mme.score(["Yes"] * 4, asked)) == ["count", "color"]  # no group is whole


def test_bad_folders_get_one_sentence(release, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(VlmFixError, match="holds none of MME's tasks"):
        mme.load(empty)
    with pytest.raises(VlmFixError, match="holds no results of MME"):
        mme.load_results(empty)
    (release / "color" / "b.txt").write_text("Is it red?\tYes\n")
    with pytest.raises(VlmFixError, match="1 are about .*b.png in color"):
        mme.load(release)
    (release / "color" / "b.txt").write_text("Is it red? Yes\n")
    with pytest.raises(VlmFixError, match="b.txt, line 1: not a question"):
        mme.load(release)
    (release / "color" / "b.png").unlink()
    with pytest.raises(VlmFixError, match="asks about an image that is not at"):
        mme.load(release)
    (empty / "count.txt").write_text("a.jpg\tq\tmaybe\tyes\n")
    with pytest.raises(VlmFixError, match="count.txt, line 1"):
        mme.load_results(empty)


def test_the_command_scores_a_folder(tmp_path, capsys):
    write_results(tmp_path)
    assert cli.main(["score", "mme", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"hallucination", "perception", "cognition", *TASKS} == said.keys()
    assert cli.main(["score", "mme", str(tmp_path / "none")]) == 2
    assert "holds no results" in capsys.readouterr().err
