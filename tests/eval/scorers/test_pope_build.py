"""POPE questions made from annotations: equal to the official script's to the letter, and to its published files' rules."""

import json
import random
from collections import Counter

import pytest
from rich.console import Console

from tests.support.paths import DATA
from vlm_fix import cli
from vlm_fix.eval import picto, tasks
from vlm_fix.eval.run import runner
from vlm_fix.eval.run.runner import Settings
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import score as pope

KINDS = ("random", "popular", "adversarial")
POPE = DATA / "pope"
NAMES = [
    *[
        "apple",
        "bench",
        "cat",
        "dog",
        "elephant",
        "fork",
        "giraffe",
        "hat",
        "igloo",
        "jar",
        "kite",
        "lamp",
        "mug",
        "nut",
        "oven",
        "pan",
        "quilt",
    ]
]
NAMES += ["rug", "sofa", "umbrella"]


def segments() -> list[tuple[str, list[str]]]:
    """80 images of one to seven of 20 objects; a few objects come only together, so that the fall-back is needed."""
    rng = random.Random(5)
    lone = [(f"{i}.jpg", ["apple", "umbrella", "igloo"]) for i in range(8)]
    return lone + [(f"{i}.jpg", rng.sample(NAMES[1:-1], rng.randrange(1, 8))) for i in range(8, 80)]


OFFICIAL = {
    (0, "random"): "9d40d383efe5e31d5ca5dc9bb8d10978c36fbcc43599385a6e4f3d0a75d9bbf6",
    (0, "popular"): "3ebe4903dfc504c7fcba5b9a62a5bf9e6d68fbe6797476fe97723c02bbaf967e",
    (0, "adversarial"): "da171eff8dee5b5d9f8da8fc6d1cce162660f0ef4c7bfd783d045ce9f8246da6",
    (7, "random"): "7777d1c6f4dba42b8166aa9971c34a9745135485d9c8f53b73228824593aeaa0",
    (7, "popular"): "de681992c7b407255f8c4352c2268dbc8fa9a0636f54a876f9f82aa61b453db0",
    (7, "adversarial"): "7b0a1695e4da3f186dcd89177c58a1668fb01099fffd4a7101dad60011598818",
}


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_those_of_the_official_script(kind, seed):
    """sha256 of the files that main.py of RUCAIBox/POPE@3df3ba1 writes after random.seed(seed), 40 images."""
    made = pope_data.make_questions(segments(), kind, images=40, seed=seed, quirks=True)
    assert pope.questions_sha256(made) == OFFICIAL[seed, kind]
    assert any("an apple in the imange?" in question.text for question in made)


def test_without_quirks_only_random_draws_and_the_typo_differ():
    for kind in KINDS:
        quirky, plain = (pope_data.make_questions(segments(), kind, images=40, seed=0, quirks=q) for q in (True, False))
        same = [a.text.replace("imange", "image") == b.text for a, b in zip(quirky, plain, strict=True)]
        assert [a.label for a in quirky] == [b.label for b in plain] and all(same[::2])  # the same images and positives
        assert kind != "popular" or all(same)  # popular never had to fall back here


@pytest.mark.parametrize("source", ["coco", "aokvqa", "gqa"])
def test_published_files_have_the_properties_of_the_algorithm(source):
    """Balance, images, and how concentrated the negatives are; aokvqa and gqa are read too, where they are at hand."""
    files = {k: POPE / (f"coco_pope_{k}.json" if source == "coco" else f"{source}_pope_seem_{k}.json") for k in KINDS}
    if source == "coco":
        asked = {kind: pope_data.coco_questions(kind) for kind in KINDS}
    elif all(path.exists() for path in files.values()):
        asked = {kind: pope_data.load_questions(path) for kind, path in files.items()}
    else:
        pytest.skip(f"the question files of {source} are not in {POPE}")
    negatives = {}
    for kind, questions in asked.items():
        assert len(questions) == 3000 and Counter(q.label for q in questions) == {"yes": 1500, "no": 1500}
        assert set(Counter(q.image for q in questions).values()) == {6}
        yes = {(q.image, q.text) for q in questions if q.label == "yes"}
        assert not yes & {(q.image, q.text) for q in questions if q.label == "no"}
        negatives[kind] = Counter(q.text for q in questions if q.label == "no")
    assert len(negatives["popular"]) < 15 < 50 < len(negatives["adversarial"]) < len(negatives["random"])
    if source == "coco":  # 80 objects, three draws per image: 1500 / 80 = 19 each
        assert len(negatives["random"]) == 80 and max(negatives["random"].values()) == 29
        assert len({tuple((q.image, q.text) for q in each if q.label == "yes") for each in asked.values()}) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Picto scenes as a COCO folder."""
    return picto.render(tmp_path_factory.mktemp("coco") / "picto", scenes=20, split="test")


def test_build_asks_new_questions_about_coco_images(tmp_path):
    """Images with COCO's own names: the official questions, unless --build asks for questions from the annotations."""
    official = list(dict.fromkeys(q.image for q in pope_data.coco_questions("random")))[:3]
    scenes = picto.scenes("test", 8, 0)
    scenes = [scene for scene in scenes if len(scene.names) >= 3][:3]
    assert len(scenes) == 3
    instances, _ = picto.coco_annotations(scenes)
    for scene, image, name in zip(scenes, instances["images"], official, strict=True):
        scene.image.save(tmp_path / name)
        old, image["file_name"], image["id"] = image["id"], name, int(name[-16:-4])
        for row in instances["annotations"]:
            row["image_id"] = image["id"] if row["image_id"] == old else row["image_id"]
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    given = Settings(benchmark="pope", data=f"coco:{tmp_path}", limit=3)
    (asked,) = tasks.build(given)
    assert asked.questions["random"] == [q for q in pope_data.coco_questions("random") if q.image in official]
    (built,) = tasks.build(Settings(benchmark="pope", data=f"coco:{tmp_path}", limit=3, build=True, seed=2))
    for kind in KINDS:
        assert built.questions[kind] == pope_data.make_questions(instances, kind, images=3, seed=2)


def test_question_files_are_asked_about_the_images_of_a_folder(folder, tmp_path, capsys):
    instances, _ = picto.coco_annotations(picto.scenes("test", 20, 0))
    for kind in ("random", "popular"):
        rows = [vars(q) for q in pope_data.make_questions(instances, kind, images=6, seed=0)]
        (tmp_path / f"gqa_{kind}.json").write_text(json.dumps(rows))
    files = tuple(str(tmp_path / f"gqa_{kind}.json") for kind in ("random", "popular"))
    given = Settings(benchmark="pope", data=f"coco:{folder}", questions=files, limit=4, max_new_tokens=4)
    results = runner.evaluate(given, tmp_path / "out", console=Console(quiet=True))
    scores = results["runs"]["baseline"]["pope"]
    assert {split: each["n"] for split, each in scores.items()} == {"gqa_random": 24, "gqa_popular": 24}
    assert scores["gqa_random"]["accuracy"] > 0.6
    (tmp_path / "gqa_random.json").write_text(
        json.dumps([{"question_id": 1, "image": "none.jpg", "text": "?", "label": "no"}])
    )
    command = ["eval", "pope", "--data", f"coco:{folder}", "--questions", files[0], "--output", str(tmp_path / "o")]
    assert cli.main(command) == 2
    assert "1 of 1 images that the questions are about are missing" in capsys.readouterr().err
    assert cli.main(["eval", "pope", "--questions", files[0]]) == 2
    assert "--questions needs --data coco:DIR" in capsys.readouterr().err
