"""Outputs of others: scores by hand on made-up files, checked copies, and a page that shows scores.json."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.support.paths import DATA, ROOT
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.report import published_outputs
from vlm_fix.eval.scorers.chair import data as chair_files
from vlm_fix.eval.scorers.chair import words
from vlm_fix.eval.scorers.pope import data as pope_files

FOLDER = ROOT / "results" / "published-outputs"
COPIES = DATA / "published"


def world(tmp_path, monkeypatch, captions, answers):
    """Pairs of made-up files: `captions` base and method by image, `answers` base and method by question."""
    truth = {1: {"dog"}, 2: {"dog", "cat"}, 3: {"cat"}}
    monkeypatch.setattr(chair_files, "ground_truth", lambda source="coco", variant="nltk": truth)
    folder, copies = tmp_path / "results", tmp_path / "copies"
    folder.mkdir()
    pairs = []

    def side(name, rows):
        path = copies / "someone" / "method" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"repository": "someone/method", "path": name, "sha256": sha, "what": "greedy"}

    about = {"model": "M-7B", "label": "X", "note": "a note."}
    told = [[{"image_id": i, "caption": text} for i, text in texts.items()] for texts in captions]
    pairs.append(
        {"name": "c", "benchmark": "chair", "base": side("b.jsonl", told[0]), "method": side("m.jsonl", told[1])}
        | about
    )
    said = [[{"question_id": i, "text": text} for i, text in enumerate(texts, 1)] for texts in answers]
    first = {"split": "random", "first": len(answers[0])}
    pairs.append(
        {"name": "p", "benchmark": "pope", "base": side("b.json", said[0]), "method": side("m.json", said[1])}
        | about
        | first
    )
    repositories = {"someone/method": {"commit": "c0ffee" * 6 + "c0ff", "licence": "MIT", "whose": "Someone's."}}
    listed = {"variant": "pattern", "repositories": repositories, "pairs": pairs}
    (folder / "pairs.json").write_text(json.dumps(listed))
    return folder, copies


@pytest.fixture
def made(tmp_path, monkeypatch):
    captions = (
        {1: "A dog and a cat here.", 2: "A dog on a chair today.", 3: "A cat."},
        {3: "A cat.", 2: "A dog.", 1: "A dog."},
    )
    labels = [q.label for q in pope_files.coco_questions("random")[:12]]
    wrong = {"yes": "No", "no": "Yes"}
    base = [wrong[label] if i in (0, 1, 7) else label.title() for i, label in enumerate(labels)]
    method = [wrong[label] if i == 7 else label.title() for i, label in enumerate(labels)]
    return world(tmp_path, monkeypatch, captions, (base, method))


def test_both_sides_are_scored_whatever_their_order(made):
    folder, copies = made
    captions, questions = published_outputs.score_all(folder, copies)["pairs"]
    figures = captions["figures"]
    assert (captions["samples"], captions["images"], questions["samples"], questions["images"]) == (3, 3, 12, 2)
    assert figures["chair_s"]["base"] == pytest.approx(2 / 3) and figures["chair_s"]["method"] == 0
    assert figures["chair_i"]["base"] == pytest.approx(2 / 5) and figures["chair_i"]["delta"] == pytest.approx(-2 / 5)
    assert figures["recall"]["base"] == figures["recall"]["method"] == pytest.approx(3 / 4)
    assert figures["words"]["base"] == pytest.approx(14 / 3) and figures["words"]["method"] == 2
    assert figures["equal_chair_i"]["base"] == 0, "cut to two words, the baseline names no absent object"
    told = questions["figures"]
    assert told["accuracy"]["base"] == pytest.approx(9 / 12) and told["accuracy"]["method"] == pytest.approx(11 / 12)
    assert questions["outcomes"] == {"mended": 2, "broken": 0, "p": 0.5}
    assert questions["unparsed"] == {"base": 0, "method": 0}


def test_holm_is_over_the_rows_of_a_benchmark():
    ps = {"chair": [0.01, 0.04, 0.03], "pope": [0.04]}
    rows = [{"benchmark": b, "figures": {"x": {"p": p}}} for b, listed in ps.items() for p in listed]
    published_outputs.correct(rows)
    assert [row["figures"]["x"]["p_holm"] for row in rows] == [0.03, 0.06, 0.06, 0.04]


def test_a_copy_that_is_absent_or_another_is_an_error_with_the_command(made):
    folder, copies = made
    path = copies / "someone" / "method" / "m.jsonl"
    text = path.read_text()
    path.write_text(text + "\n")
    with pytest.raises(VlmFixError, match=r"sha256 .* was listed with .*checkout c0ffee"):
        published_outputs.score_all(folder, copies)
    path.unlink()
    with pytest.raises(VlmFixError, match=r"is not there.*git clone https://github.com/someone/method"):
        published_outputs.score_all(folder, copies)
    with pytest.raises(VlmFixError, match="no pair is called 'q'; there are c, p"):
        published_outputs.score_all(folder, copies, ["q"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda listed: listed["pairs"].append(listed["pairs"][0]), "'c' is no listed"),
        (lambda listed: listed["repositories"].clear(), "'someone/method' is no listed"),
        (lambda listed: listed["pairs"][0].update(benchmark="amber"), "'amber' is no listed"),
        (lambda listed: listed["pairs"][0].pop("method"), "is not a list of pairs"),
    ],
)
def test_a_malformed_list_is_an_error(made, change, told):
    folder, copies = made
    listed = json.loads((folder / "pairs.json").read_text())
    change(listed)
    (folder / "pairs.json").write_text(json.dumps(listed))
    with pytest.raises(VlmFixError, match=told):
        published_outputs.score_all(folder, copies)


def test_the_program_writes_scores_and_page_and_prints_one_row(made, tmp_path, capsys):
    folder, copies = made
    published_outputs.main([str(folder), "--copies", str(copies), "--only", "p"])
    [row] = json.loads(capsys.readouterr().out)
    assert row["command"].endswith("--copies COPIES --only p") and not (folder / "scores.json").exists()
    with pytest.raises(VlmFixError, match="score the pairs first"):
        published_outputs.page(folder)
    published_outputs.main([str(folder), "--copies", str(copies), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "4 such files from\n1 repositories" in page and "`c`: a note." in page
    assert "66.7 → 0.0<br>-66.7" in page and "75.0 → 91.7<br>" in page and "| 2 / 0, 0.5 |" in page
    assert (
        "Someone's." in page
        and f"`{hashlib.sha256((copies / 'someone/method/m.json').read_bytes()).hexdigest()[:16]}`" in page
    )


def test_a_bold_figure_is_significant_after_the_correction():
    figure = {"base": 0.5, "method": 0.25, "delta": -0.25, "low": -0.4, "high": -0.1, "p": 0.001}
    assert published_outputs._figure("recall", figure | {"p_holm": 0.02}) == "50.0 → 25.0<br>**-25.0** [-40.0, -10.0]"
    assert published_outputs._figure("words", figure | {"p_holm": 0.06}).endswith("<br>-0.2 [-0.4, -0.1]")


def test_the_page_shows_the_scores_of_the_listed_files():
    scores = json.loads((FOLDER / "scores.json").read_text())
    listed = published_outputs.read_pairs(FOLDER)
    assert scores["repositories"] == listed["repositories"]
    assert [{key: row[key] for key in pair} for row, pair in zip(scores["pairs"], listed["pairs"], strict=True)] == (
        listed["pairs"]
    )
    assert len(scores["pairs"]) >= 8 and len({row["base"]["repository"] for row in scores["pairs"]}) >= 4
    page = (ROOT / "docs" / "published-outputs.md").read_text()
    assert page == published_outputs.page(FOLDER), "run `make docs`"


@pytest.mark.skipif(not COPIES.exists(), reason=f"the files of others are not in {COPIES}")
@pytest.mark.parametrize("name", ["students-vcd-popular", "devils-llava-1.5"])
def test_a_row_is_made_again_from_the_files(name):
    [kept] = [row for row in json.loads((FOLDER / "scores.json").read_text())["pairs"] if row["name"] == name]
    if kept["benchmark"] == "chair" and not words.nltk_ready():
        pytest.skip("NLTK data are not on this machine")
    [row] = published_outputs.score_all(FOLDER, COPIES, [name])["pairs"]
    for metric, figure in row["figures"].items():
        assert figure == pytest.approx({key: kept["figures"][metric][key] for key in figure}), metric
