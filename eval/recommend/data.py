"""The images that a search asks about: Picto's, a folder with COCO annotations, or rows of one's own.

    picto:SPLIT   POPE's adversarial questions and a caption of each scene, rendered as they are needed
    coco:DIR      POPE's adversarial questions (with RePOPE's labels where they are POPE's own) and a caption of the same images
    FILE[,FILE]   rows with `image`, a path from the file's folder, and either `question` and `label` (yes or no), or `objects`,
                  the COCO objects in the image, of which a caption is asked

Images are shuffled with the seed; the first half is for the search and for calibration, the second for the proof.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.files import counted, read_rows
from vlm_fix.eval.scorers.chair.words import find_objects, nltk_ready, nodes
from vlm_fix.eval.scorers.choices import Variant
from vlm_fix.eval.scorers.pope.score import Question
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks.chair import Chair
from vlm_fix.eval.tasks.pope import Pope
from vlm_fix.eval.tasks.sample import CAPTION_PROMPT, MAX_NEW_TOKENS, Sample, digest

LIMIT = 600
EXAMPLE = '{"image": "a.jpg", "question": "Is there a dog in the image?", "label": "yes"}'
LEAST = 8  # images


@dataclasses.dataclass
class Data:
    """Questions and captions by image; `search` and `proof` name images."""

    pope: Pope | None
    chair: Chair | None
    source: str
    search: list[str]
    proof: list[str]

    @classmethod
    def of(cls, pope: Pope | None, chair: Chair | None, source: str, seed: int) -> Data:
        """Split the images in two. Raises VlmFixError if there are too few, or questions of one answer alone."""
        both = [sample for task in (pope, chair) if task for sample in task.samples]
        images = sorted({sample.file for sample in both})
        if len(images) < LEAST:
            raise VlmFixError(
                f"{source} has {len(images)} images: give at least {LEAST}, and some hundred for a proof."
            )
        labels = {sample.reference["label"] for sample in pope.samples} if pope else set()
        if len(labels) == 1:
            raise VlmFixError(
                f"{source}: every question's answer is {labels.pop()}; give questions with yes and with no."
            )
        random.Random(seed).shuffle(images)
        half = (len(images) + 1) // 2
        return cls(pope, chair, source, images[:half], images[half:])

    @property
    def parts(self) -> list[str]:
        """What is asked: captions, questions or both."""
        return [name for name, task in (("captions", self.chair), ("questions", self.pope)) if task and task.samples]

    def about(self) -> dict[str, Any]:
        """Source, sizes and a hash of what is asked."""
        asked = [
            [s.id, s.file, s.prompt, s.reference] for task in (self.pope, self.chair) if task for s in task.samples
        ]
        return {
            "source": self.source,
            "search": len(self.search),
            "proof": len(self.proof),
            "questions": len(self.pope.samples) if self.pope else 0,
            "captions": len(self.chair.samples) if self.chair else 0,
            "sha256": digest(asked),
        }

    def for_calibration(self) -> Pope | None:
        """The questions about the images of the search."""
        if self.pope is None:
            return None
        kept = [sample for sample in self.pope.samples if sample.file in {*self.search}]
        return dataclasses.replace(self.pope, samples=kept)


def load(data: Any, limit: int | None, seed: int, max_new_tokens: int | None = None) -> Data:
    """`data` is one of the texts above, or rows as a FILE has them. Raises VlmFixError for anything else."""
    if not isinstance(data, str):
        return of_rows(list(data), Path(), "samples of the caller", seed, limit)
    kind, _, where = data.partition(":")
    settings = Settings(
        benchmark="all",
        data=data,
        limit=limit or LIMIT,
        seed=seed,
        splits=("adversarial",),
        variant=None if nltk_ready() else "pattern",
        max_new_tokens=max_new_tokens,
    )
    if kind == "picto":
        pope, chair = tasks.build(settings)
    elif kind == "coco" and where:
        pope, chair = _of_folder(settings)
    else:
        return _of_files([Path(file.strip()).expanduser() for file in data.split(",")], seed, limit)
    assert isinstance(pope, Pope) and isinstance(chair, Chair)
    return Data.of(pope, chair, pope.data["source"], seed)


def _of_folder(settings: Settings) -> tuple[Any, Any]:
    try:
        (pope,) = tasks.build(dataclasses.replace(settings, benchmark="pope", labels="repope"))
    except VlmFixError:  # not POPE's own questions
        (pope,) = tasks.build(dataclasses.replace(settings, benchmark="pope"))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(dict.fromkeys(sample.file for sample in pope.samples)))
        file.flush()
        (chair,) = tasks.build(dataclasses.replace(settings, benchmark="chair", ids=file.name))
    return pope, chair


def _of_files(paths: Sequence[Path], seed: int, limit: int | None) -> Data:
    lost = [path for path in paths if not path.is_file()]
    if lost:
        raise VlmFixError(
            f"--data {lost[0]} is no file: give picto:SPLIT, coco:DIR or files with rows such as {EXAMPLE}."
        )
    rows = []
    for path in paths:
        for place, row in enumerate(read_rows(path, "data", EXAMPLE), 1):
            if not isinstance(row.get("image"), str) or not row["image"]:
                raise VlmFixError(f"row {place} of {path.name} has no image: write rows such as {EXAMPLE}.")
            rows.append({**row, "image": path.parent / row["image"]})
    return of_rows(rows, Path(), ", ".join(path.name for path in paths), seed, limit)


def of_rows(rows: Sequence[Mapping[str, Any]], folder: Path, source: str, seed: int, limit: int | None) -> Data:
    """Questions and captions of rows; an image that several rows name is one image, and a question to it is asked once.

    Raises VlmFixError for a row without an image or of none of the two forms, an image that is no file, and a question that has
    both answers. How many repeated questions were left out is in the source.
    """
    variant: Variant = "nltk" if nltk_ready() else "pattern"
    numbers: dict[Any, int] = {}
    questions: dict[str, Question] = {}
    again = 0
    asked: list[Sample] = []
    described: list[Sample] = []
    truth: dict[int, list[str]] = {}
    for place, row in enumerate(rows, 1):
        image = row.get("image")
        if not isinstance(image, str | Path | Image.Image):
            raise VlmFixError(f"row {place} of {source} has no image: write rows such as {EXAMPLE}.")
        key = id(image) if isinstance(image, Image.Image) else str(image)
        number = numbers.setdefault(key, len(numbers) + 1)
        if limit is not None and number > limit:
            continue
        file = f"image {number}" if isinstance(image, Image.Image) else str(image)
        picture = image.convert("RGB") if isinstance(image, Image.Image) else folder / image
        if "objects" in row:
            truth[number] = _nodes(row["objects"], variant, f"row {place} of {source}")
            described.append(
                Sample(str(number), number, file, picture, CAPTION_PROMPT, {"ground_truth": truth[number]})
            )
            continue
        text, label = row.get("question"), str(row.get("label", row.get("answer", ""))).strip().lower()
        if not text or label not in ("yes", "no"):
            raise VlmFixError(
                f"row {place} of {source} has neither objects nor a question with the label yes or no: see {EXAMPLE}."
            )
        question = Question(f"{number}|{text}", file, str(text), label)
        name = str(question.question_id)
        if known := questions.get(name):
            if known.label != label:
                raise VlmFixError(
                    f"row {place} of {source} asks {text!r} again with the other answer ({label}): keep one."
                )
            again += 1
            continue
        questions[name] = question
        asked.append(Sample(f"{file}|{text}", number, file, picture, str(text), {"label": label}))
    paths = {s.image for s in (*asked, *described) if isinstance(s.image, Path)}
    if lost := sorted(str(path) for path in paths if not path.is_file()):
        raise VlmFixError(
            f"{len(lost)} of the {len(paths)} images of {source} are no files, first {lost[0]}: put them there."
        )
    if again:
        source += f" ({counted(again, 'repeated question')} left out)"
    told = {"source": source, "sha256": digest([str(q) for q in questions.values()])}
    pope = Pope({"rows": [*questions.values()]}, asked, "official", told)
    chair = Chair(truth, described, variant, {"source": source}, max_new_tokens=MAX_NEW_TOKENS["chair"])
    return Data.of(pope if asked else None, chair if described else None, source, seed)


def _nodes(objects: Any, variant: Variant, where: str) -> list[str]:
    """COCO's names of objects; a text may name several with commas."""
    names = (
        [name.strip() for name in objects.split(",")] if isinstance(objects, str) else [str(name) for name in objects]
    )
    found: list[str] = []
    for name in filter(None, names):
        known = nodes().get(name.lower())  # a name as it is; "bus" is no plural
        these = {known} if known else {thing.node for thing in find_objects(name, variant)[1]}
        if len(these) != 1:
            raise VlmFixError(
                f"{where}: {name!r} is none of COCO's 80 objects, which is all that CHAIR reads in captions: leave it out."
            )
        found += these
    return sorted({*found})
