"""POPE questions: read from files or the package, or made for any images with known objects.

Source: Y. Li et al., EMNLP 2023, arXiv:2305.10355; question maker RUCAIBox/POPE@3df3ba1 main.py.

Worked example: one image has a dog, a cup and a cat, another a dog, a cup and a car. The questions about the first are
"Is there a dog in the image?" (yes), then one about an absent object, which can only be the car (no).
>>> scenes = [("1.jpg", ["dog", "cup", "cat"]), ("2.jpg", ["dog", "cup", "car"])]
>>> made = make_questions(scenes, "popular", images=2, per_image=2)
>>> [(q.text, q.label) for q in made if q.image == "1.jpg"]
[('Is there a dog in the image?', 'yes'), ('Is there a car in the image?', 'no')]
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA, read_rows
from vlm_fix.eval.scorers.answers import USUAL, Keys, Tell, id_text, read
from vlm_fix.eval.scorers.choices import one_of

from .score import Answer, Kind, Question

QUESTION = '{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog?", "label": "no"}'
ANSWER = '{"question_id": 1, "text": "No."}'


PACKAGED = {"coco": "coco_pope_{}.jsonl.gz", "aokvqa": "aokvqa_pope_seem_{}.json.gz", "gqa": "gqa_pope_seem_{}.json.gz"}
"""Data set -> file in the package of each kind."""


def load_questions(path: str | Path) -> list[Question]:
    """Read a POPE question file: JSON lines or array, gzipped or not. Raises VlmFixError naming row and key.

    coco:random, aokvqa:popular, gqa:adversarial and so on are the official files in the package.
    """
    source, _, kind = str(path).partition(":")
    if source in PACKAGED and kind in get_args(Kind) and not Path(path).exists():
        path = DATA / "pope" / PACKAGED[source].format(kind)
    questions = []
    for number, row in enumerate(read_rows(path, "POPE question file", QUESTION), 1):
        for key in ("question_id", "image", "text", "label"):
            if key not in row:
                raise VlmFixError(f'{path}, row {number}: no "{key}" in its keys {", ".join(row)}; rename or add it.')
        label = str(row["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise VlmFixError(f'{path}, row {number}: label {row["label"]!r} is neither "yes" nor "no".')
        image, text = row["image"], row["text"]
        if not isinstance(image, str) or not isinstance(text, str) or id_text(row["question_id"]) is None:
            raise VlmFixError(
                f"{path}, row {number}: image and text must be texts, and question_id a number or a text."
            )
        questions.append(Question(_id(row["question_id"]), image, text, label))
    return questions


def _id(value: Any) -> Any:
    """A number as it is, a text without the ".0" of pandas."""
    return id_text(value) if isinstance(value, str | float) else value


def coco_questions(kind: Kind) -> list[Question]:
    """Return the official 3000 questions about 500 val2014 images, which are in the package."""
    return load_questions(DATA / "pope" / PACKAGED["coco"].format(one_of(kind, Kind, "kind")))


def load_answers(path: str | Path, keys: Keys = USUAL, tell: Tell = str) -> list[Answer]:
    """Read the answers to one question file; rows without an id are numbered. `answers.py` says what rows may be."""
    given = read(path, ANSWER, keys)
    tell(given.told())
    answers = []
    for row in given.rows:
        if not row.id and not row.question:
            raise VlmFixError(
                f'{path}, row {row.number}: neither "question_id" nor "question", so it fits no question: give it the id.'
            )
        answers.append(Answer(row.id or row.number, row.reply, row.question))
    return answers


def make_questions(
    instances: Any, kind: Kind = "random", images: int = 500, per_image: int = 6, seed: int = 0, quirks: bool = False
) -> list[Question]:
    """Make POPE questions by the official algorithm, on any COCO-format data.

    instances: a COCO instances dictionary, a pycocotools COCO, or a list of (image, object names in order).
    `images` images are sampled from those with at least per_image/2 objects; the same seed gives the same images for
    every kind. Questions ask about the first per_image/2 objects of an image, each followed by one about an absent
    object that was not asked before: drawn uniformly (random), the most frequent one (popular), or the one seen most
    often with the object before (adversarial). The latter two fall back to random.
    Raises VlmFixError if there are too few images or objects.

    With `quirks` the questions are exactly those of RUCAIBox/POPE@3df3ba1 main.py after random.seed(seed): random
    negatives are redrawn until one is free, the three kinds share one stream of random numbers, and before a vowel every
    "a" of the template becomes "an" ("Is there an apple in the imange?").
    """
    one_of(kind, Kind, "kind")
    half, rng = per_image // 2, random.Random(seed)
    if half < 1 or per_image % 2:
        raise VlmFixError(f"per_image={per_image}: give an even number, half of the questions are negatives.")
    pool = [(image, objects) for image, objects in _objects(instances) if len(objects) >= half]
    if len(pool) < images:
        raise VlmFixError(f"Only {len(pool)} images have {half} or more objects; ask for images={len(pool)} or fewer.")
    sample = rng.sample(pool, images)
    frequency = Counter(name for _, objects in sample for name in objects)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for _, objects in sample:
        for name in objects:
            together[name].update(other for other in objects if other != name)
    ranking = {name: [other for other, _ in counts.most_common()] for name, counts in together.items()}
    popular = [name for name, _ in frequency.most_common()]
    kinds: tuple[Kind, ...] = get_args(Kind)
    for each in (
        kinds[: kinds.index(kind) + 1] if quirks else (kind,)
    ):  # the shared random stream has passed the kinds before
        questions: list[Question] = []
        for image, objects in sample:
            free = dict.fromkeys(name for name in frequency if name not in objects)
            for positive in objects[:half]:
                ranked = {"random": [], "popular": popular, "adversarial": ranking[positive]}[each]
                negative = next((name for name in ranked if name in free), "")
                if not negative:
                    if not free:
                        raise VlmFixError(
                            f"{image} shows all but {half - 1} or fewer of the objects: no negative is left."
                        )
                    names = list(frequency if quirks else free)
                    while (negative := rng.choice(names)) not in free:
                        pass
                del free[negative]
                for name, label in ((positive, "yes"), (negative, "no")):
                    text = question_text(name)
                    if quirks and text.startswith("Is there an "):
                        text = text.replace("image", "imange")
                    questions.append(Question(len(questions) + 1, image, text, label))
    return questions


def question_text(name: str) -> str:
    """Fill in the official template, spelt as in the published files and not "imange" as the script writes."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def _objects(instances: Any) -> list[tuple[str, list[str]]]:
    """Return (file name, distinct object names) in the order of the annotations."""
    if isinstance(instances, Sequence):
        return [(image, list(dict.fromkeys(names))) for image, names in instances]
    data = getattr(instances, "dataset", instances)  # a pycocotools COCO holds the dictionary there
    names = {category["id"]: category["name"] for category in data["categories"]}
    found: dict[int, dict[str, None]] = {image["id"]: {} for image in data["images"]}
    for annotation in data["annotations"]:
        found[annotation["image_id"]][names[annotation["category_id"]]] = None
    return [(image["file_name"], list(found[image["id"]])) for image in data["images"]]
