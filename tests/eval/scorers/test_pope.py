"""POPE: every scorer against the numbers of the official scripts on real answers, and the question maker's rules."""

import doctest
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paths import DATA
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.scorers.registry import BENCHMARKS
from vlm_fix.eval.stats import column_sums

ORACLE = DATA / "oracle" / "pope_oracle.json"
needs_data = pytest.mark.skipif(not ORACLE.exists(), reason=f"the official scripts' numbers are not at {ORACLE}")

SCRIPTS = {
    "official": "official_RUCAIBox_evaluate.py",
    "opera": "OPERA_PAI_recorder",
    "vcd": "VCD_eval_pope.py",
    "lmms": "lmms_eval_0.7.3",
    "vlmevalkit": "VLMEvalKit_exact_matching",
}
KINDS = ("random", "popular", "adversarial")
TEXTS = st.one_of(
    st.sampled_from(["Yes", "yes.", "No", "NO", "No, it is not.", "I cannot tell", "It isn't there", "", "Yes. No."]),
    st.text(max_size=20),
)


@needs_data
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scorer", SCRIPTS)
def test_scores_of_real_answers_equal_the_official_scripts(kind: str, scorer: str) -> None:
    expected = json.loads(ORACLE.read_text())["files"][f"answers_shield_llava15/coco_{kind}.jsonl"][SCRIPTS[scorer]]
    answers = pope_data.load_answers(DATA / "pope" / "answers_llava15" / f"coco_{kind}.jsonl")
    questions = pope_data.coco_questions(kind)
    got = {name.lower(): value for name, value in pope.score(questions, answers, scorer).to_dict().items()}
    verdicts = [yesno.verdict(a.text, q.label, scorer) for q, a in zip(questions, answers, strict=True)]
    got["n_unknown"] = verdicts.count("unknown")
    assert {name: got[name.lower()] for name in expected} == expected


@needs_data
def test_every_reply_is_read_as_the_official_scripts_read_it() -> None:
    for row in json.loads(ORACLE.read_text())["string_table"]:
        for scorer in SCRIPTS:
            for label in ("yes", "no"):
                expected = row[f"vcd_when_gt_{label}" if scorer == "vcd" else scorer].lower()
                said = yesno.verdict(row["text"], label, scorer)
                assert said == expected.replace("neither", "unknown"), (row["text"], scorer, label)


@needs_data
def test_the_packaged_questions_are_the_official_files() -> None:
    for kind in KINDS:
        assert pope_data.coco_questions(kind) == pope_data.load_questions(DATA / "pope" / f"coco_pope_{kind}.json")
    hashed = pope.questions_sha256(pope_data.coco_questions("random"))
    assert hashed == "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994"  # sha256sum of the file
    assert len(pope_data.load_questions(DATA / "pope" / "aokvqa_pope_seem_random.json")) == 3000  # a JSON array


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), TEXTS), min_size=1, max_size=30), st.randoms())
@settings(max_examples=60, deadline=None)
def test_scores_are_consistent_and_ignore_the_order_of_the_answers(pairs: list[tuple[str, str]], rng) -> None:
    questions = [pope.Question(i, f"{i // 6}.jpg", "Is there a dog in the image?", p[0]) for i, p in enumerate(pairs)]
    answers = [pope.Answer(i, text) for i, (_, text) in enumerate(pairs)]
    shuffled = rng.sample(answers, len(answers))
    for scorer in SCRIPTS:
        result = pope.score(questions, answers, scorer)
        assert result == pope.score(questions, shuffled, scorer)
        assert result.accuracy == sum(result.correct) / len(pairs)
        sums = column_sums(result.rows, ["n", "tp", "fp", "tn", "fn", "yes"])
        assert {name: metric(sums) for name, metric in pope.METRICS.items()} == {
            name: getattr(result, name) for name in pope.METRICS
        }
        if scorer in ("official", "opera", "vcd"):  # these turn every reply into yes or no
            assert result.tp + result.fp + result.tn + result.fn == result.n
            assert result.yes_ratio == (result.tp + result.fp) / result.n


def test_unparsed_counts_replies_without_a_yes_or_no_word() -> None:
    replies = ["Yes", "no!", "There isn't.", "A dog.", "", "I cannot tell", "Nobody knows", "It is not there"]
    questions = [pope.Question(i, "a.jpg", "Is there a dog in the image?", "yes") for i in range(len(replies))]
    result = pope.score(questions, [pope.Answer(i, text) for i, text in enumerate(replies)])
    assert result.unparsed == 4


NAMES = [f"thing{i}" for i in range(12)] + ["apple", "orange"]
INSTANCES = st.lists(st.lists(st.sampled_from(NAMES), max_size=6, unique=True), min_size=3, max_size=12).map(
    lambda lists: [(f"{i}.jpg", names) for i, names in enumerate([NAMES[:4], NAMES[4:8], NAMES[8:], *lists])]
)


def expected_negative(kind: str, images: list[list[str]], positive: str, taken: set[str]) -> str | None:
    """The paper's rule by counting from scratch, ties to the object seen first; None where it is drawn at random."""
    if kind == "random":
        return None
    counts = Counter(name for names in images if kind == "popular" or positive in names for name in names)
    return max((name for name in counts if name not in taken), key=counts.__getitem__, default=None)


@given(INSTANCES, st.sampled_from(KINDS), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_made_questions_follow_the_official_rules(instances: list, kind: str, seed: int) -> None:
    objects = {image: names for image, names in instances if len(names) >= 3}
    questions = pope_data.make_questions(instances, kind, images=len(objects), seed=seed)
    assert questions == pope_data.make_questions(instances, kind, images=len(objects), seed=seed)
    assert [q.question_id for q in questions] == list(range(1, 6 * len(objects) + 1))
    assert [q.label for q in questions] == ["yes", "no"] * 3 * len(objects)
    images = list(dict.fromkeys(q.image for q in questions))
    assert sorted(images) == sorted(objects)
    for image in images:
        asked = [re.sub(r"Is there an? (.+) in the image\?", r"\1", q.text) for q in questions if q.image == image]
        assert len(set(asked)) == 6
        assert asked[::2] == objects[image][:3]
        assert not set(asked[1::2]) & set(objects[image])
        for positive, negative, place in zip(asked[::2], asked[1::2], (1, 3, 5), strict=True):
            taken = set(objects[image]) | set(asked[:place])
            expected = expected_negative(kind, [objects[i] for i in images], positive, taken)
            assert expected in (None, negative)


def test_one_seed_samples_the_same_images_for_every_kind() -> None:
    instances = [(f"{i}.jpg", [f"thing{(i + j) % 20}" for j in range(4)]) for i in range(40)]
    made = {kind: pope_data.make_questions(instances, kind, images=40, seed=3) for kind in KINDS}
    assert len({tuple(q.image for q in questions) for questions in made.values()}) == 1
    assert made["random"] != pope_data.make_questions(instances, "random", images=40, seed=4)
    drawn = Counter(
        q.text for seed in range(50) for q in pope_data.make_questions(instances, images=40, seed=seed)[1::2]
    )
    assert len(drawn) == 20  # 6000 uniform negatives: 300 of each of the 20 objects, standard deviation about 17
    assert all(200 < times < 400 for times in drawn.values())


def test_coco_dictionaries_and_pycocotools_give_the_same_questions() -> None:
    coco = pytest.importorskip("pycocotools.coco")
    rows = [(i, c) for i in range(4) for c in (1, 2, 2, 3 + i % 2, 5 + i)]
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
        "categories": [{"id": c, "name": f"{c}object" if c > 2 else ("apple", "dog")[c - 1]} for c in range(1, 10)],
        "annotations": [{"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(rows)],
    }
    loaded = coco.COCO()
    loaded.dataset = data
    questions = pope_data.make_questions(data, images=4)
    assert questions == pope_data.make_questions(loaded, images=4)
    first = [q.text for q in questions if q.image == "1.jpg" and q.label == "yes"]
    assert first == [f"Is there {name} in the image?" for name in ("an apple", "a dog", "a 4object")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{broken", "neither JSON lines nor a JSON array"),
        ('{"question_id": 1, "imange": "a.jpg", "text": "?", "label": "no"}', 'no "image"'),
        ('{"question_id": 1, "image": "a.jpg", "text": "?", "label": "maybe"}', "'maybe'"),
        ("[1, 2]", "one JSON object per row"),
    ],
)
def test_bad_question_files_get_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(VlmFixError, match=words) as error:
        pope_data.load_questions(path)
    assert "\n" not in str(error.value)


def test_bad_answers_get_one_sentence(tmp_path: Path) -> None:
    questions = [pope.Question(i, "a.jpg", "Is there a dog in the image?", "yes") for i in (1, 2)]
    with pytest.raises(VlmFixError, match="Cannot read the answer file"):
        pope_data.load_answers(tmp_path / "nothing.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"question_id": 1, "says": "Yes"}')
    with pytest.raises(VlmFixError, match='row 1: no "text" or "answer"'):
        pope_data.load_answers(tmp_path / "bad.jsonl")
    with pytest.raises(VlmFixError, match="no answers"):
        pope.score(questions, [])
    with pytest.raises(VlmFixError, match="2 questions, 1 answers, first mismatch at question_id 2"):
        pope.score(questions, [pope.Answer(1, "Yes")])
    with pytest.raises(VlmFixError, match="first mismatch at question_id 3"):
        pope.score(questions, [pope.Answer(i, "Yes") for i in (1, 2, 3)])
    with pytest.raises(VlmFixError, match="its answer is to 'Is there a cat in the image"):
        pope.score(questions, [pope.Answer(i, "Yes", "Is there a cat in the image?") for i in (1, 2)])
    with pytest.raises(VlmFixError, match="Unknown scorer 'nope'; choose one of official"):
        pope.score(questions, [pope.Answer(i, "Yes") for i in (1, 2)], "nope")  # type: ignore[arg-type]


def test_too_few_images_or_objects_get_one_sentence() -> None:
    with pytest.raises(VlmFixError, match="Only 1 images have 3 or more objects; ask for images=1 or fewer"):
        pope_data.make_questions([("a.jpg", ["cat", "dog", "cup"]), ("b.jpg", ["cat"])], images=2)
    with pytest.raises(VlmFixError, match="no negative is left"):
        pope_data.make_questions([("a.jpg", ["cat", "dog", "cup"])], images=1)


@pytest.mark.parametrize("module", [yesno, pope_data])
def test_worked_examples(module):
    run = doctest.testmod(module)
    assert run.failed == 0 and run.attempted >= 3


def test_an_answer_that_comes_twice_is_named(tmp_path: Path) -> None:
    asked = [pope.Question(n, f"{n}.jpg", f"Is there a dog, {n}?", "no") for n in range(3)]
    with pytest.raises(VlmFixError, match="2 have the question_id '1'; keep one"):
        pope.score(asked, [pope.Answer(n, "No") for n in (0, 1, 2, 1)])
    rows = [
        {"index": n, "question": "Is it?", "answer": "No", "category": "random", "prediction": "No"} for n in (1, 2, 1)
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(VlmFixError, match="row 3: the question '1' of random comes twice"):
        BENCHMARKS["pope"].results(str(file))


def test_the_split_that_lacks_an_answer_is_named(tmp_path: Path) -> None:
    asked = pope_data.coco_questions("popular")
    rows = [{"question_id": q.question_id, "prompt": q.text, "text": "No", "image": q.image} for q in asked]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["question_id"] != 17))
    with pytest.raises(VlmFixError, match="the split popular, but none to 1 of its 3000 questions.* question_id 17;"):
        BENCHMARKS["pope"].results(str(file))
