"""AMBER: figures of the official script on made-up answers to all 15,220 prompts, and each rule on small cases."""

import doctest
import json
import math
import random
import tarfile

import nltk
import pytest

from tests.support.paths import DATA
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.compare import compare
from vlm_fix.eval.scorers.amber import data as amber_data
from vlm_fix.eval.scorers.amber import official as amber_file
from vlm_fix.eval.scorers.amber import score as amber
from vlm_fix.eval.scorers.chair import words
from vlm_fix.eval.scorers.registry import LAYOUTS

PACK = DATA / "nltk_pack.tar.gz"


@pytest.fixture(scope="module")
def nltk_data(tmp_path_factory):
    """NLTK data from the pack, if they are not on this machine already."""
    before = list(nltk.data.path)
    if not words.nltk_ready():
        if not PACK.exists():
            pytest.skip(f"NLTK data are not on this machine and {PACK} does not exist")
        folder = tmp_path_factory.mktemp("nltk")
        with tarfile.open(PACK) as archive:
            archive.extractall(folder, filter="data")
        nltk.data.path.insert(0, str(folder / "nltk_pack"))
    yield
    nltk.data.path[:] = before


def made_up() -> list[dict]:
    """Answers that meet every rule: true, listed, similar, invented and other words, capitals, plurals, odd yes and no."""
    rng = random.Random(0)
    lexicon = amber_data.lexicon("official", "pattern")
    vocabulary = sorted({*lexicon.stand_for, *(w for each in lexicon.stand_for.values() for w in each)})
    rows = []
    for scene in amber_data.scenes():
        pool = [*scene.truth, *scene.hallu, *rng.sample(vocabulary, 2)]
        pool += [w for name in scene.truth for w in lexicon.stand_for[name]]
        a, b, c, d, e = rng.choices(pool, k=5)
        text = f"There is a {a} and two {b}s near the {c}. {d.capitalize()}s and a {e} are behind it."
        rows.append({"id": scene.id, "response": "" if rng.random() < 0.02 else text})
    replies = ["Yes"] * 6 + ["No"] * 8 + ["yes", "No.", "Yes, there is.", "It is not clear"]
    return rows + [{"id": question.id, "response": rng.choice(replies)} for question in amber_data.questions()]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("amber") / "answers.json"
    path.write_text(json.dumps(made_up()))
    return path


OFFICIAL = {
    "captions": {"CHAIR": 32.9, "Cover": 34.0, "Hal": 72.3, "Cog": 16.6},
    "existence": {"Accuracy": 44.8, "Precision": 100.0, "Recall": 44.8, "F1": 61.8},
    "attribute": {"Accuracy": 39.6, "Precision": 50.7, "Recall": 45.0, "F1": 47.7},
    "relation": {"Accuracy": 38.1, "Precision": 41.9, "Recall": 44.8, "F1": 43.3},
    "questions": {"Accuracy": 41.2, "Precision": 66.8, "Recall": 44.9, "F1": 53.7},
}


def test_figures_are_those_of_the_official_script(file, nltk_data):
    """Printed by inference.py of junyangwang0410/AMBER@534babf on these answers, its similarities read from our table."""
    found = amber_file.score_file(file)
    got = {part: amber_file.printed(r, 0.001 if part == "existence" else 0.0001) for part, r in found.items()}
    assert got == OFFICIAL


def test_the_package_holds_all_of_amber():
    scenes, questions = amber_data.scenes(), amber_data.questions()
    assert [scene.id for scene in scenes] == list(range(1, 1005))
    assert [question.id for question in questions] == list(range(1005, 15221))
    kinds = [question.kind for question in questions]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"existence": 4924, "attribute": 7628, "relation": 1664}
    assert {question.label for question in questions if question.kind == "existence"} == {"no"}
    lexicon = amber_data.lexicon("official", "pattern")
    known = {*lexicon.stand_for, *(w for each in lexicon.stand_for.values() for w in each)}
    assert len(known) == 418 and {w for pair in lexicon.similar for w in pair} <= known
    assert {w for scene in scenes for w in scene.truth + scene.hallu} <= {*lexicon.stand_for}


def test_worked_example():
    for module in (amber, amber_data, amber_file):
        run = doctest.testmod(module)
        assert run.failed == 0 and run.attempted >= 3


def figures(text, truth, hallu, scorer="official"):
    scene = amber_data.Scene(1, "a.jpg", truth, hallu)
    return amber.score_captions([text], [scene], amber_data.lexicon(scorer, "pattern")).figures


def test_each_rule_of_a_caption():
    assert figures("a dog and a dog", ("dog",), ("cat",)) == {"chair": 0, "cover": 1, "hal": 0, "cog": 0}
    assert figures("a man", ("person",), ("cat",)) == {"chair": 0, "cover": 1, "hal": 0, "cog": 0}  # listed
    assert figures("a bicycle", ("tree",), ("motorbike",))["cog"] == 1  # similar to a hallu word, and to no object
    assert figures("a bicycle", ("tree",), ("motorbike",))["chair"] == 1
    assert figures("a bicycle", ("tree",), ("motorbike",), "ours")["cog"] == 0
    assert figures("a cat", ("dog",), ("cat",)) == {"chair": 0, "cover": 1, "hal": 0, "cog": 1}  # both at once
    assert figures("an orange", ("dog",), ("cat",)) == {"chair": 0, "cover": 0, "hal": 0, "cog": 0}  # never judged
    assert figures("Dogs", ("dog",), ("cat",))["cover"] == 0  # as written, so capitals are no mention
    assert figures("Dogs", ("dog",), ("cat",), "ours")["cover"] == 1
    assert figures("two ships", ("ship", "ship"), ("cat",))["cover"] == 0.5  # the second ship is never reached


def test_mentions_stand_where_they_are_written():
    """Each with its place, what it fits and what it invents; the scores are their counts."""
    scene = amber_data.Scene(1, "a.jpg", ("tree", "dog"), ("cat", "motorbike"))
    text = 'A man\'s Dog, two "dogs", trees, an orange (bicycles) and a cat: wow!'
    read = {}
    for scorer in ("official", "ours"):
        found = amber.mentions(text, scene, amber_data.lexicon(scorer, "pattern"))
        read[scorer] = [(text[m.noun.start : m.noun.end], m.noun.node, m.fits, {*m.imagined}, m.wrong) for m in found]
        figures = amber.score_captions([text], [scene], amber_data.lexicon(scorer, "pattern")).sums()
        assert figures["hallucinated"] == sum(wrong for *_, wrong in read[scorer]) and figures["mentions"] == len(found)
    man, dogs, trees = (
        ("man", "man", None, set(), True),
        ("dogs", "dog", 1, set(), False),
        ("trees", "tree", 0, set(), False),
    )
    orange, bicycles = ("orange", "orange", None, set(), False), ("bicycles", "bicycle", None, {1}, True)
    assert read["official"] == [man, dogs, trees, orange, bicycles, ("cat", "cat", 1, {0}, False)]
    last = [("bicycles", "bicycle", None, set(), True), ("cat", "cat", None, {0}, True)]
    assert read["ours"] == [man, ("Dog", "dog", 1, set(), False), dogs, trees, orange, *last]


def test_yes_and_no():
    replies = ["Yes", "No", "yes", "No.", "No, it is.", "", None, "not"]
    read = {scorer: [amber.verdict(r, "no", scorer) for r in replies] for scorer in ("official", "ours", "vcd")}
    assert read["official"] == ["yes", "no", *["unknown"] * 6]
    assert read["ours"] == ["yes", "no", "yes", "no", "no", "unknown", "unknown", "unknown"]
    assert read["vcd"][:5] == ["yes", "no", "yes", "no", "no"]
    asked = [
        amber_data.Question(i, "a.jpg", "?", "relation", label) for i, label in enumerate(["no", "no", "no", "yes"])
    ]
    result = amber.score_questions(["No", "Yes", "?", "No"], asked)
    assert result.figures == {"accuracy": 1 / 4, "precision": 1 / 2, "recall": 1 / 3, "f1": 0.4, "yes_ratio": 1 / 4}
    assert result.unparsed == 1


def test_the_command_scores_a_file_and_wants_all_of_a_part(file, tmp_path, nltk_data, capsys):
    assert cli.main(["score", "amber", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["captions"]["n"] == 1004 and said["amber_score"] == amber.amber_score(amber_file.score_file(file))
    assert {part: said[part]["printed"] for part in OFFICIAL} == OFFICIAL
    rows = made_up()
    for kept, words_ in (
        ([*rows, {"id": 0, "response": ""}], "an answer to 0"),
        ([*rows, rows[5]], "id 6 comes twice"),
        ([{"id": "1", "text": "A dog."}], r"no part of AMBER wholly \(captions: 1 of 1004 answered, no answer to 2\)"),
        ([{"id": "a1", "text": "A dog."}], 'row 1: AMBER wants "id"'),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(kept))
        with pytest.raises(VlmFixError, match=words_):
            amber_file.score_file(tmp_path / "bad.json", variant="pattern")
    assert cli.main(["score", "amber", str(tmp_path / "bad.json")]) == 2
    assert 'row 1: AMBER wants "id"' in capsys.readouterr().err


def test_captions_cut_to_a_share_of_their_words_are_scored_like_shorter_captions() -> None:
    words, shown = amber_data.lexicon("ours", "pattern"), amber_data.scenes()[:20]
    texts = [" ".join(f"There is a {name}." for name in (*scene.truth, *scene.hallu)) for scene in shown]
    whole = amber.score_captions(texts, shown, words)
    assert whole.at_share and whole.at_share(1) == whole.rows
    for share in (0.25, 0.6):
        cut = [" ".join(text.split()[: math.ceil(share * len(text.split()))]) for text in texts]
        assert whole.at_share(share) == amber.score_captions(cut, shown, words).rows
    short = amber.score_captions([" ".join(t.split()[: len(t.split()) // 2]) for t in texts], shown, words)
    verdict = compare(LAYOUTS["amber"], [(whole, short)])["verdict"]
    assert verdict["is"] == "better by saying less" and "same cover" in verdict["text"]


def test_parts_are_scored_apart(tmp_path, nltk_data, file):
    """One answer too few in relation: the other parts have their figures, and the reader hears what is left out."""
    told = []
    (tmp_path / "short.json").write_text(json.dumps(made_up()[:-1]))
    found = amber_file.score_file(tmp_path / "short.json", tell=told.append)
    assert found.keys() == {"captions", "existence", "attribute"}
    whole = amber_file.score_file(file)
    assert all(found[part].figures == whole[part].figures for part in found)
    assert told[1:] == ["not scored: relation: 1663 of 1664 answered, no answer to 15220"]


def test_rows_with_another_question_or_image_than_their_id_are_refused(tmp_path) -> None:
    shown, asked = amber_data.scenes(), [q for q in amber_data.questions() if q.kind == "relation"]
    captions = [{"id": scene.id, "response": "A dog.", "image": f"images/{scene.image}"} for scene in shown]
    answers = [{"id": q.id, "question": f"{q.text} Answer yes or no.", "response": "Yes"} for q in asked]
    path = tmp_path / "answers.json"

    def scored(rows):
        path.write_text(json.dumps(rows))
        return amber_file.score_file(path, variant="pattern")

    assert [*scored([*captions, *answers])] == ["captions", "relation"]
    pope = [{"id": n, "question": "Is there a dog in the image?", "response": "Yes"} for n in range(1, 1005)]
    with pytest.raises(VlmFixError, match="row 1 answers 'Is there a dog.*is an image of AMBER to describe"):
        scored(pope)
    with pytest.raises(VlmFixError, match=f"row 1 answers 'Is there a dog.*question {asked[0].id} is "):
        scored([{**answers[0], "question": "Is there a dog?"}, *answers[1:]])
    with pytest.raises(VlmFixError, match="row 1 is about COCO_val2014_000000000001.jpg, but 1 is about AMBER_1.jpg"):
        scored([{**captions[0], "image": "COCO_val2014_000000000001.jpg"}, *captions[1:]])


def test_rows_of_vlmevalkit_are_counted(tmp_path) -> None:
    kind = {"category": "discriminative-relation", "answer": "Yes", "prediction": "Yes"}
    rows = [{"index": n, "question": f"Does the dog see {n}?", **kind} for n in range(5)]
    path, told = tmp_path / "answers.json", []
    path.write_text(json.dumps(rows))
    assert amber_file.score_file(path, tell=told.append)["relation"].n == 5
    assert "note: relation: 5 answers, where AMBER asks 1664 questions" in told
    path.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(VlmFixError, match="id 0 comes twice"):
        amber_file.score_file(path)


def test_a_caption_of_null_is_left_out(tmp_path, nltk_data):
    told, shown = [], amber_data.scenes()
    rows = [{"id": scene.id, "response": "There is a dog and a car."} for scene in shown]
    rows[:500] = [{**row, "response": None} for row in rows[:500]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = amber_file.score_file(tmp_path / "a.json", tell=told.append)["captions"]
    assert found.n == 504 and found.rows[0]["image"] == shown[500].image
    assert told[1] == "note: 500 images left out of captions, as the caption is null"
    (tmp_path / "a.json").write_text(json.dumps([{**row, "response": None} for row in rows]))
    with pytest.raises(VlmFixError, match="captions: all are null"):
        amber_file.score_file(tmp_path / "a.json")


def test_misread_answers_are_told_once_for_all_parts(tmp_path, capsys) -> None:
    rows = [{"id": q.id, "response": "no."} for q in amber_data.questions()]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    assert cli.main(["score", "amber", str(tmp_path / "answers.json")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "plain word" in line]
    assert len(notes) == 1 and f"takes {len(rows)} answers" in notes[0]
