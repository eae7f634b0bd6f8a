"""CHAIR: both variants against the numbers of the official scripts, word by word and caption by caption."""

import doctest
import json
import tarfile
from functools import cache
from pathlib import Path

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paths import DATA
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.chair import data as chair_data
from vlm_fix.eval.scorers.chair import nltk_tools, words
from vlm_fix.eval.scorers.chair import score as chair

ORACLE = DATA / "oracle"
VARIANTS = ("nltk", "pattern")
needs_data = pytest.mark.skipif(not ORACLE.exists(), reason=f"the official scripts' numbers are not in {ORACLE}")


@cache
def coco_truth(variant: words.Variant) -> chair.GroundTruth:
    return chair_data.ground_truth("coco", variant)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Each variant; for nltk with NLTK data from the pack, if they are not on this machine already."""
    before = list(nltk.data.path)
    if request.param == "nltk" and not words.nltk_ready():
        pack = DATA / "nltk_pack.tar.gz"
        if not pack.exists():
            pytest.skip(f"NLTK data are not on this machine and {pack} does not exist")
        folder = tmp_path_factory.mktemp("nltk")
        with tarfile.open(pack) as archive:
            archive.extractall(folder, filter="data")
        nltk.data.path.insert(0, str(folder / "nltk_pack"))
    yield request.param
    nltk.data.path[:] = before


@needs_data
def test_words_of_tricky_sentences_equal_the_official_functions(variant: words.Variant) -> None:
    for unit in json.loads((ORACLE / "chair_caption_to_words_unit.json").read_text()):
        assert words.caption_to_words(unit["text"], variant)._asdict() == unit[variant], unit["text"]


@needs_data
@pytest.mark.parametrize("run", ["greedy", "beam5", "ours"])
def test_opera_captions_score_as_in_the_official_scripts(run: str, variant: words.Variant) -> None:
    captions = chair_data.load_captions(DATA / "captions" / "opera_llava15" / f"{run}.jsonl")
    result = chair.score(captions, coco_truth(variant), variant)
    overall = json.loads((ORACLE / "chair_overall_opera_llava15.json").read_text())[f"opera/llava-1.5/{run}.jsonl"]
    tokens = sum(row["tokens"] for row in result.rows)
    got = {"CHAIRs": result.chair_s, "CHAIRi": result.chair_i, "Recall": result.recall, "Len": 0.01 * tokens / result.n}
    got |= {"Precision": result.precision, "F1": result.f1}
    assert {name: got[name] for name in overall[variant]} == overall[variant]
    assert result.length == tokens / 500
    if variant == "nltk":
        assert {name: got[name] for name in overall["pai"]} == overall["pai"]
    if run == "ours":  # of these the official values caption by caption are not at hand
        return
    expected = json.loads((ORACLE / f"chair_per_caption_opera_llava-1.5_{run}.json").read_text())[variant]["sentences"]
    assert len(expected) == 500
    for caption, row, official in zip(result.captions, result.rows, expected, strict=True):
        assert official == {
            "image_id": caption.image_id,
            "n_tokens": caption.tokens,
            "node_words": [o.node for o in sorted(caption.correct + caption.hallucinated, key=lambda o: o.token)],
            "hallucinated": [[o.word, o.node] for o in caption.hallucinated],
            "CHAIRs": row["hallucinating"],
            "CHAIRi": row["hallucinated"] / row["mentions"] if row["mentions"] else 0.0,
            "Recall": row["found"] / row["truth"] if row["truth"] else 0.0,
        }


@needs_data
def test_ground_truth_built_from_annotations_equals_the_packaged_map(variant: words.Variant) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    paths = [DATA / "coco" / "mini" / f"{part}_val2017.json" for part in ("instances", "captions")]
    instances, captions = (json.loads(path.read_text()) for path in paths)
    built = chair_data.build_ground_truth(instances, captions, variant)
    packaged = coco_truth(variant)
    assert len(built) == 79
    assert built == {image: packaged[image] for image in built}
    assert built == chair_data.build_ground_truth(*(coco.COCO(str(path)) for path in paths), variant)


@needs_data
def test_objects_are_found_at_their_place_in_the_caption(variant: words.Variant) -> None:
    for caption in chair_data.load_captions(DATA / "captions" / "opera_llava15" / "ours.jsonl")[:150]:
        tokens, objects = words.find_objects(caption.text, variant)
        official = words.caption_to_words(caption.text, variant)
        assert tokens == len(official.raw_words)
        assert [(o.word, o.node) for o in objects] == list(zip(official.words, official.node_words, strict=True))
        cut = words._tokens(caption.text.lower(), variant)
        for found in objects:
            piece = words._tokens(caption.text[found.start : found.end].lower(), variant)
            assert piece == cut[found.token : found.token + len(piece)]
            assert variant == "nltk" or [found.word] == words.caption_to_words(" ".join(piece), variant).words


def test_places_survive_quotes_and_newlines() -> None:
    text = 'A "stop sign"\n\nsays:  "no dogs" — and (two) Hot\tdogs.'
    _, objects = words.find_objects(text, "pattern")
    assert [(o.word, text[o.start : o.end]) for o in objects] == [
        ("stop sign", "stop sign"),
        ("dog", "dogs"),
        ("hot dog", "Hot\tdogs"),
    ]


def test_an_em_dash_does_not_cut_a_token_on_any_nltk_version() -> None:
    assert words.caption_to_words("a cat—dog on a bed", "pattern").raw_words == ["a", "cat—dog", "on", "a", "bed"]


def test_single_quotes_are_split_as_in_nltk_3_9_1() -> None:
    """Tokens by nltk.word_tokenize of 3.9.1; 3.10 takes every opening quote off its word, so that "'bear'" is an object."""
    text = "a 'bear' and 'a' cat, the 'kite's tail, dogs' toys, rock 'n' roll, it's 'it's'"
    expected = "a|'bear|'|and|'|a|'|cat|,|the|'kite|'s|tail|,|dogs|'|toys|,|rock|'n|'|roll|,|it|'s|'it's|'"
    assert nltk_tools.tokens(text, "pattern") == expected.split("|")
    assert words.caption_to_words("a 'bear' on a bed", "pattern").node_words == ["bed"]


def test_worked_examples_of_the_docstrings() -> None:
    result = chair.score([chair.Caption(1, "A dog and two cats.")], {1: ["dog", "sports ball"]}, "pattern")
    assert (result.chair_s, result.chair_i, result.recall, result.precision, result.length) == (1, 0.5, 0.5, 0.5, 6)
    assert [(o.word, o.token, o.start, o.end) for o in result.captions[0].hallucinated] == [("cat", 4, 14, 18)]
    _, objects = words.find_objects("Two hot dogs near a toilet seat", "pattern")
    assert [(o.word, o.node, o.token) for o in objects] == [("hot dog", "hot dog", 1), ("toilet", "toilet", 5)]


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        *[("women", "woman"), ("people", "person"), ("knives", "knife"), ("glasses", "glass"), ("benches", "bench")],
        *[("bus", "bu"), ("buses", "bus"), ("skis", "ski"), ("scissors", "scissors"), ("mice", "mouse"), ("s", "s")],
        *[("collies", "collies"), ("ponies", "pony"), ("dogs'", "dog's"), ("men-of-war", "man-of-war")],
    ],
)
def test_singular_as_in_pattern(plural: str, singular: str) -> None:
    assert words.singularize(plural) == singular


VOCABULARY = ["dog", "cats", "a", "hot", "toilet", "seat", "people", "table", "the", "wine", "glasses", "on", "."]
NODES = ["dog", "cat", "hot dog", "toilet", "chair", "person", "dining table", "wine glass"]
TEXT = st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join)
CAPTIONS = st.lists(st.tuples(st.integers(0, 4), TEXT), min_size=1, max_size=8)
TRUTH = st.fixed_dictionaries({i: st.sets(st.sampled_from(NODES)) for i in range(5)})


@given(CAPTIONS, TRUTH, st.sampled_from(NODES))
@settings(max_examples=80, deadline=None)
def test_score_agrees_with_a_count_over_sets(pairs: list, truth: dict, extra: str) -> None:
    captions = [chair.Caption(image, text) for image, text in pairs]
    result = chair.score(captions, truth, "pattern")
    mentioned = [(i, words.caption_to_words(text, "pattern").node_words) for i, text in pairs]
    wrong = [[node for node in nodes if node not in truth[i]] for i, nodes in mentioned]
    total = sum(len(nodes) for _, nodes in mentioned)
    assert result.chair_s == sum(map(bool, wrong)) / len(pairs)
    assert result.chair_i == (sum(map(len, wrong)) / total if total else 0)
    in_truth = sum(len(truth[i]) for i, _ in mentioned)
    assert result.recall == (sum(len(truth[i] & set(nodes)) for i, nodes in mentioned) / in_truth if in_truth else 0)
    more = chair.score(captions, {i: nodes | {extra} for i, nodes in truth.items()}, "pattern")
    assert more.chair_i <= result.chair_i
    assert more.precision >= result.precision


def test_captions_load_from_the_usual_forms(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text('[{"image_id": "COCO_val2014_000000000042.jpg", "text": "a"}, {"image_id": 7, "answer": "b"}]')
    assert chair_data.load_captions(path) == [chair.Caption(42, "a"), chair.Caption(7, "b")]
    path.write_text('{"image": "000000000042.png", "caption": "a\\u2028b"}\n\n{"image_id": 42, "caption": ""}\n')
    with pytest.warns(UserWarning, match="several captions of image 42;"):
        assert chair_data.load_captions(path) == [chair.Caption(42, "a\u2028b"), chair.Caption(42, "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"caption": "a dog"}', 'row 1: no "image_id" with a number'),
        ('{"image_id": 1, "caption": "a dog"}\n{"image_id": 2, "captoin": "x"}', 'row 2: no "caption" with a text'),
    ],
)
def test_bad_caption_files_get_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(content)
    with pytest.raises(VlmFixError, match=message):
        chair_data.load_captions(path)


def test_bad_ground_truth_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(VlmFixError, match=r"1 of 2 captions .* \(the first is image 9\)"):
        chair.score([chair.Caption(1, "a"), chair.Caption(9, "b")], {1: []}, "pattern")
    with pytest.raises(VlmFixError, match="no captions"):
        chair.score([], {1: []}, "pattern")
    with pytest.raises(VlmFixError, match="Cannot read the ground truth"):
        chair_data.ground_truth(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(VlmFixError, match="is not of the form"):
        chair_data.ground_truth(tmp_path / "list.json")
    with pytest.raises(VlmFixError, match="Unknown variant 'spacy'; choose one of nltk, pattern"):
        chair_data.ground_truth("coco", "spacy")  # type: ignore[arg-type]
    with pytest.raises(VlmFixError, match="not the category 'unicorn'; rename it"):
        chair_data.build_ground_truth({"categories": [{"id": 1, "name": "unicorn"}]}, {}, "pattern")


def test_ground_truth_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text('{"3": ["dog"], "4": []}')
    truth = chair_data.ground_truth(tmp_path / "truth.json", "pattern")
    assert truth == {3: {"dog"}, 4: set()}
    assert chair.score([chair.Caption(4, "a tree")], truth, "pattern").to_dict() == {
        "variant": "pattern", "n": 1, "chair_s": 0, "chair_i": 0, "recall": 0, "precision": 0, "f1": 0, "length": 2
    }  # fmt: skip


def test_missing_nltk_data_are_named_and_the_pattern_variant_works(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda name, **_: asked.append(name))
    nltk_tools.models.cache_clear()
    try:
        assert not words.nltk_ready()
        with pytest.raises(VlmFixError, match=r"nltk\.downloader punkt_tab .* use --variant pattern, which works now"):
            words.caption_to_words("a dog", "nltk")
        assert asked == list(nltk_tools.PACKAGES)
        assert words.caption_to_words("a dog", "pattern").node_words == ["dog"]
    finally:
        nltk_tools.models.cache_clear()


def test_a_cut_off_last_sentence_is_dropped_on_request() -> None:
    cut = "A dog (brown.) sits on a 3.5 m couch. Is it asleep? There is a cat"
    assert chair_data.whole_sentences(cut) == "A dog (brown.) sits on a 3.5 m couch. Is it asleep?"
    for whole in ("A dog and a cat", "A dog.", "", 'It says "stop."'):
        assert chair_data.whole_sentences(whole).strip('"') == whole.strip('"')
    truth = {1: {"dog"}}
    both = [
        chair.Caption(1, text)
        for text in ("A dog sits. There is a cat", chair_data.whole_sentences("A dog sits. A cat"))
    ]
    assert [chair.score([each], truth, "pattern").chair_i for each in both] == [1 / 2, 0]


def test_worked_example_of_the_ground_truth():
    run = doctest.testmod(chair_data)
    assert run.failed == 0 and run.attempted == 4
