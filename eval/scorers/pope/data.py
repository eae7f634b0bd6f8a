"""POPE questions: from files, from the package, or made for any images whose objects are known.

Source: Y. Li et al., EMNLP 2023, arXiv:2305.10355; question maker RUCAIBox/POPE@3df3ba1 main.py.

Worked example: of two images the first has a dog, a cup and a cat, the second a dog, a cup and a car. Asked about the
first: "Is there a dog in the image?" (yes), then an object that is not there, which can only be the car (no).
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
from vlm_fix.eval.scorers.rows import DATA, one_of, read_rows

from .score import Answer, Kind, Question

QUESTION = '{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog?", "label": "no"}'
ANSWER = '{"question_id": 1, "text": "No."}'


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a POPE file: JSON lines or a JSON array, gzip or not. Raises VlmFixError naming line and key."""
    questions = []
    for number, row in enumerate(read_rows(path, "POPE question file", QUESTION), 1):
        for key in ("question_id", "image", "text", "label"):
            if key not in row:
                raise VlmFixError(f'{path}, row {number}: no "{key}" in its keys {", ".join(row)}; rename or add it.')
        label = str(row["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise VlmFixError(f'{path}, row {number}: label {row["label"]!r} is neither "yes" nor "no".')
        questions.append(Question(row["question_id"], row["image"], row["text"], label))
    return questions


def coco_questions(kind: Kind) -> list[Question]:
    """The official 3000 questions about 500 val2014 images that come with the package."""
    return load_questions(DATA / f"pope/coco_pope_{one_of(kind, Kind, 'kind')}.jsonl.gz")


def load_answers(path: str | Path) -> list[Answer]:
    """Answers as LLaVA writes them (question_id, prompt, text) or POPE (question, answer; numbered by line then)."""
    answers = []
    for number, row in enumerate(read_rows(path, "answer file", ANSWER), 1):
        text = row.get("text", row.get("answer"))
        prompt = row.get("prompt", row.get("question", ""))
        if not isinstance(text, str):
            raise VlmFixError(f'{path}, row {number}: no "text" or "answer" with the reply (found: {", ".join(row)}).')
        if "question_id" not in row and not prompt:
            raise VlmFixError(f'{path}, row {number}: neither "question_id" nor "question", so it fits no question.')
        answers.append(Answer(row.get("question_id", number), text, prompt))
    return answers


def make_questions(
    instances: Any, kind: Kind = "random", images: int = 500, per_image: int = 6, seed: int = 0, quirks: bool = False
) -> list[Question]:
    """POPE questions by the official algorithm, on any COCO-format data.

    instances: a COCO instances dictionary, a pycocotools COCO, or a list of (image, object names in order).
    Images with at least per_image/2 objects are kept and `images` of them sampled (one seed gives the same images for
    every kind). Each gets its first per_image/2 objects, and after each a negative, not in the image and not asked
    before: drawn uniformly (random), the most frequent (popular), or the one seen most often with that positive
    (adversarial); the latter two fall back to random. Raises VlmFixError when there are too few images or objects.

    With `quirks` the questions are those of RUCAIBox/POPE@3df3ba1 main.py after random.seed(seed), to the letter: random
    negatives are redrawn until one is free, one stream of random numbers runs through the three kinds, and before a
    vowel the template's every "a" becomes "an" ("Is there an apple in the imange?").
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
    for each in kinds[: kinds.index(kind) + 1] if quirks else (kind,):  # the stream has passed the kinds before
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
    """The official template with its article; as in the published files, not "imange" as the script would write."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def _objects(instances: Any) -> list[tuple[str, list[str]]]:
    """(file name, its object names without repeats, in the order of the annotations)."""
    if isinstance(instances, Sequence):
        return [(image, list(dict.fromkeys(names))) for image, names in instances]
    data = getattr(instances, "dataset", instances)  # a pycocotools COCO holds the dictionary there
    names = {category["id"]: category["name"] for category in data["categories"]}
    found: dict[int, dict[str, None]] = {image["id"]: {} for image in data["images"]}
    for annotation in data["annotations"]:
        found[annotation["image_id"]][names[annotation["category_id"]]] = None
    return [(image["file_name"], list(found[image["id"]])) for image in data["images"]]
