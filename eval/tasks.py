"""What is asked: POPE and CHAIR as lists of samples, over Picto or a folder of COCO images.

A POPE question that several splits share (the three splits ask the same positives) is asked once and counted in each.
Picto's questions come from the official algorithm over the scenes' own annotations. COCO images use the official
question files and the ground truth that the package carries; where a folder holds other images, its annotations.

`suite.py` builds the tasks of the other benchmarks.

Every task has benchmark, samples, data, sizes, max_new_tokens and score(answers by sample id) -> {split: result}, whose
result has n, rows (counts with their image) and to_dict(). An answer of None is a sample that failed: it stays in the
score, as wrong. `report.LAYOUTS` says how a benchmark is compared and shown.

Layout of coco:DIR: images in DIR, DIR/val2014 or DIR/images; annotations, if any, in DIR/annotations or DIR as
instances_*.json and captions_*.json. POPE's question files of other data sets (`--questions`) need the images alone, by
name. Images with COCO's own names (000000000042.jpg, COCO_val2014_000000000042.jpg)
go by their number; images with other names need annotations that tell their ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from PIL import Image

from vlm_fix.errors import VlmFixError

from . import chair, chair_data, picto, pope, pope_data, words, yesno

if TYPE_CHECKING:
    from .runner import Settings
    from .suite import Items

CAPTION_PROMPT = "Please describe this image in detail."
IMAGES = 500  # the size of both benchmarks as published
MAX_NEW_TOKENS = {"pope": 16, "chair": 512}
POPE_SPLITS = get_args(pope.Kind)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image and one prompt; `reference` holds what the answer is held against (label or ground-truth objects)."""

    id: str
    image_id: int
    file: str
    image: Image.Image | Path
    prompt: str
    reference: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Its part of a line in samples.jsonl."""
        return {"id": self.id, "image_id": self.image_id, "image": self.file, "prompt": self.prompt, **self.reference}


@dataclasses.dataclass
class Pope:
    """Yes/no questions; `questions` by split, scored per split."""

    questions: dict[str, list[pope.Question]]
    samples: list[Sample]
    scorer: yesno.Scorer
    data: dict[str, Any]
    benchmark: str = "pope"
    max_new_tokens: int = MAX_NEW_TOKENS["pope"]

    @property
    def sizes(self) -> dict[str, int]:
        """Questions per split."""
        return {split: len(questions) for split, questions in self.questions.items()}

    def score(self, answers: Mapping[str, str | None]) -> dict[str, pope.PopeResult]:
        """Result per split from answers by sample id; None is wrong, questions that are not in `answers` are left out."""
        results = {}
        for split, questions in self.questions.items():
            asked = [q for q in questions if _pope_id(q) in answers]
            if asked:
                given = [pope.Answer(q.question_id, answers[_pope_id(q)]) for q in asked]
                results[split] = pope.score(asked, given, self.scorer)
        return results


@dataclasses.dataclass
class Chair:
    """Captions; `truth` maps image ids to the objects that are there."""

    truth: dict[int, list[str]]
    samples: list[Sample]
    variant: words.Variant
    data: dict[str, Any]
    drop_incomplete: bool = False
    benchmark: str = "chair"
    max_new_tokens: int = MAX_NEW_TOKENS["chair"]

    @property
    def sizes(self) -> dict[str, int]:
        """Captions, under the one split's name."""
        return {"captions": len(self.samples)}

    def score(self, answers: Mapping[str, str | None]) -> dict[str, chair.ChairResult]:
        """Result under the name "captions" from captions by sample id; None is a caption that says nothing."""
        texts = [(s.image_id, answers[s.id] or "") for s in self.samples if s.id in answers]
        cut = chair_data.whole_sentences if self.drop_incomplete else str
        captions = [chair.Caption(image_id, cut(text)) for image_id, text in texts]
        return {"captions": chair.score(captions, self.truth, self.variant)} if captions else {}


Task: TypeAlias = "Pope | Chair | Items"


def load_image(sample: Sample) -> Image.Image:
    """The sample's image in RGB; a file that cannot be read is a VlmFixError that names it."""
    if isinstance(sample.image, Image.Image):
        return sample.image
    try:
        with Image.open(sample.image) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise VlmFixError(
            f"{sample.image} cannot be read as an image ({type(error).__name__}): replace the file or leave its id out "
            "with --ids."
        ) from error


def build(settings: Settings) -> list[Task]:
    """The tasks that the settings ask for; every missing file is reported here, before a model is loaded."""
    from . import suite  # which needs Sample from here

    if settings.benchmark in suite.BENCHMARKS:
        return [*suite.build(settings)]
    kind, _, where = settings.data.partition(":")
    wanted = ("pope", "chair") if settings.benchmark == "all" else (settings.benchmark,)
    if settings.prompt and settings.benchmark == "pope" and "{question}" not in settings.prompt:
        raise VlmFixError('--prompt for POPE must hold {question}, for example "{question} Please answer in one word."')
    unknown = [split for split in settings.splits if split not in POPE_SPLITS]
    if unknown or not settings.splits:
        raise VlmFixError(f"--split {','.join(unknown)!r} is unknown: choose from {', '.join(POPE_SPLITS)}.")
    if settings.questions and (kind != "coco" or not where or settings.benchmark != "pope"):
        raise VlmFixError("--questions needs --data coco:DIR with the images, and is for pope alone.")
    if settings.questions:
        return [_from_files(Path(where).expanduser(), settings)]
    if kind == "picto":
        make = _picto(where or "shift", settings)
    elif kind == "coco" and where:
        make = _coco(Path(where).expanduser(), settings)
    else:
        raise VlmFixError(f"--data {settings.data!r} is unknown: give picto, picto:SPLIT or coco:DIR.")
    return [make[benchmark]() for benchmark in wanted]


# ------------------------------------------------------------------------------------------------------------ samples


def _pope_id(question: pope.Question) -> str:
    return f"{question.image}|{question.text}"


def _pope(
    questions: Mapping[Any, list[pope.Question]], images: Mapping[str, Any], settings: Settings, source: str
) -> Pope:
    """`images` maps the questions' file names to (id, image or path)."""
    splits: dict[str, list[str]] = {}
    first: dict[str, pope.Question] = {}
    for split, each in questions.items():
        for question in each:
            splits.setdefault(_pope_id(question), []).append(split)
            first.setdefault(_pope_id(question), question)
    template = settings.prompt if settings.prompt and "{question}" in settings.prompt else "{question}"
    samples = [
        Sample(
            key,
            images[q.image][0],
            q.image,
            images[q.image][1],
            template.replace("{question}", q.text),
            {"label": q.label, "splits": splits[key]},
        )
        for key, q in first.items()
    ]
    data = {
        "source": source,
        "images": len({q.image for q in first.values()}),
        "questions": {split: len(each) for split, each in questions.items()},
        "sha256": {split: pope.questions_sha256(each) for split, each in questions.items()},
    }
    return Pope(dict(questions), samples, settings.scorer, data)


def _chair(
    images: Mapping[str, Any], truth: Mapping[int, Any], variant: words.Variant, settings: Settings, source: str
) -> Chair:
    words.caption_to_words("a dog", variant)  # missing NLTK data must be told now, not after the captions are made
    prompt = settings.prompt if settings.prompt and "{question}" not in settings.prompt else CAPTION_PROMPT
    mine = {image_id: sorted(truth[image_id]) for image_id, _ in images.values()}
    samples = [
        Sample(str(image_id), image_id, file, image, prompt, {"ground_truth": mine[image_id]})
        for file, (image_id, image) in images.items()
    ]
    data = {"source": source, "images": len(samples), "variant": variant, "sha256": _hash(mine)}
    if settings.drop_incomplete:
        data["captions"] = "a cut-off last sentence dropped"
    return Chair(mine, samples, variant, data, settings.drop_incomplete)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _picto(split: str, settings: Settings) -> dict[str, Any]:
    n = settings.limit or IMAGES
    # POPE leaves out scenes with fewer than three kinds of objects, so it looks at more of them
    scenes = picto.scenes(split, n + n // 2 + 8, settings.seed)
    source = f"picto:{split}, {n} scenes, seed {settings.seed}"

    def make_pope() -> Pope:
        instances, _ = picto.coco_annotations(scenes)
        questions = {
            kind: pope_data.make_questions(instances, kind, images=n, seed=settings.seed) for kind in settings.splits
        }
        return _pope(questions, {s.file_name: (s.image_id, s.image) for s in scenes}, settings, source)

    def make_chair() -> Chair:
        # the default variant must work on a machine that never downloads anything
        variant: words.Variant = settings.variant or ("nltk" if words.nltk_ready() else "pattern")
        truth = chair_data.build_ground_truth(*picto.coco_annotations(scenes[:n]), variant)
        return _chair({s.file_name: (s.image_id, s.image) for s in scenes[:n]}, truth, variant, settings, source)

    return {"pope": make_pope, "chair": make_chair}


# --------------------------------------------------------------------------------------------------------------- coco


COCO_NAME = re.compile(r"(?:COCO_(?:train|val)20\d\d_)?(\d{12})")


def _coco(folder: Path, settings: Settings) -> dict[str, Any]:
    found, own = _find_images(folder)
    named = {path.name: number for number, path in found.items()}

    def number_of(name: str) -> int | None:
        match = COCO_NAME.fullmatch(Path(name).stem)
        return named.get(name, int(match[1]) if match and not own else None)

    wanted = _wanted(Path(settings.ids), folder, found, number_of) if settings.ids else None
    limit = settings.limit or IMAGES

    def make_pope() -> Pope:
        official = {kind: pope_data.coco_questions(kind) for kind in settings.splits}
        names = list(dict.fromkeys(q.image for each in official.values() for q in each))
        if not own and not settings.build and wanted is None and any(number_of(name) in found for name in names):
            names = names[:limit]
            lost = [name for name in names if number_of(name) not in found]
            if lost:
                raise VlmFixError(
                    f"{len(lost)} of POPE's {len(names)} images are missing in {folder}, first {lost[0]}: put val2014 "
                    "there, or list the ids you have in --ids FILE (needs annotations/instances_val2014.json)."
                )
            questions = {kind: [q for q in each if q.image in names] for kind, each in official.items()}
            source = f"coco, official questions, first {len(names)} images"
        else:
            instances = _restrict(_annotations(folder, "instances"), set(wanted or found))
            kinds: dict[int, set[int]] = {}
            for row in instances["annotations"]:
                kinds.setdefault(row["image_id"], set()).add(row["category_id"])
            n = min(limit, sum(len(each) > 2 for each in kinds.values()) or limit)  # POPE asks for three objects
            questions = {
                kind: pope_data.make_questions(instances, kind, images=n, seed=settings.seed)
                for kind in settings.splits
            }
            names = list(dict.fromkeys(q.image for each in questions.values() for q in each))
            source = f"{folder.name}, questions made from annotations, {len(names)} images, seed {settings.seed}"
        ids = {name: number_of(name) for name in names}
        return _pope(questions, {name: (n, found[n]) for name, n in ids.items() if n is not None}, settings, source)

    def make_chair() -> Chair:
        variant: words.Variant = settings.variant or "nltk"
        ids = wanted or sorted(found)
        if wanted is None and len(ids) > limit:
            ids = sorted(random.Random(settings.seed).sample(ids, limit))
        ids = ids[:limit]
        truth: Mapping[int, Any] = {} if own else chair_data.ground_truth("coco", variant)
        if any(number not in truth for number in ids):
            instances, captions = (_restrict(_annotations(folder, k), set(ids)) for k in ("instances", "captions"))
            truth = chair_data.build_ground_truth(instances, captions, variant)
            bare = [number for number in ids if number not in truth]
            if bare:
                raise VlmFixError(
                    f"image {bare[0]} has no annotation in {folder}: add it to instances_*.json or leave the id out "
                    "with --ids."
                )
        images = {found[number].name: (number, found[number]) for number in ids}
        return _chair(images, truth, variant, settings, f"{folder.name}, {len(ids)} images, seed {settings.seed}")

    return {"pope": make_pope, "chair": make_chair}


def _from_files(folder: Path, settings: Settings) -> Pope:
    """The questions of --questions, a split per file; with a limit those about the first images that they name."""
    paths, asked = _paths(folder), {Path(file).stem: pope_data.load_questions(file) for file in settings.questions}
    names = list(dict.fromkeys(q.image for each in asked.values() for q in each))[: settings.limit]
    lost = [name for name in names if name not in paths]
    if lost:
        raise VlmFixError(
            f"{len(lost)} of {len(names)} images that the questions are about are missing in {folder}, first {lost[0]}: "
            "put them there."
        )
    questions = {split: [q for q in each if q.image in names] for split, each in asked.items()}
    images = {name: (number, paths[name]) for number, name in enumerate(names, 1)}
    return _pope(questions, images, settings, f"{', '.join(questions)}, first {len(names)} images")


def _paths(folder: Path) -> dict[str, Path]:
    """File name -> path of the images of a folder."""
    if not folder.is_dir():
        raise VlmFixError(f"{folder} is not a folder: give coco:DIR with the images in DIR or DIR/val2014.")
    paths: dict[str, Path] = {}
    for place in (folder / "val2014", folder / "images", folder):
        for path in sorted(place.glob("*")) if place.is_dir() else []:
            if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
                paths.setdefault(path.name, path)
    if not paths:
        raise VlmFixError(f"{folder} holds no images: put val2014's jpg files there or in {folder / 'val2014'}.")
    return paths


def _find_images(folder: Path) -> tuple[dict[int, Path], bool]:
    """(path by image id, whether the images are the folder's own and not COCO's)."""
    paths = _paths(folder)
    coco = {int(match[1]): path for path in paths.values() if (match := COCO_NAME.fullmatch(path.stem))}
    if coco:
        return coco, False
    images = _annotations(folder, "instances")["images"]
    own = {image["id"]: paths[image["file_name"]] for image in images if image["file_name"] in paths}
    if not own:
        raise VlmFixError(f"no image in {folder} is named as its instances_*.json says: mend file_name there.")
    return own, True


def _wanted(path: Path, folder: Path, found: Mapping[int, Path], number_of: Callable[[str], int | None]) -> list[int]:
    """Image ids of a file, one a line: numbers or file names."""
    if not path.is_file():
        raise VlmFixError(f"--ids {path} does not exist: give a text file with one image id a line.")
    lines = list(dict.fromkeys(line.strip() for line in path.read_text().splitlines() if line.strip()))
    if not lines:
        raise VlmFixError(f"--ids {path} is empty: give one image id (a number or a file name) a line.")
    ids = [int(line) if line.isdigit() else number_of(line) for line in lines]
    lost = [line for line, number in zip(lines, ids, strict=True) if number not in found]
    if lost:
        raise VlmFixError(
            f"{len(lost)} of {len(lines)} ids in {path} (first {lost[0]}) have no image in {folder}: add the files or "
            "take the ids out."
        )
    return [number for number in ids if number is not None]


def _annotations(folder: Path, kind: str) -> dict[str, Any]:
    """instances_*.json or captions_*.json of the folder."""
    places = [folder / "annotations" / f"{kind}_val2014.json"]
    places += [*sorted((folder / "annotations").glob(f"{kind}_*.json")), *sorted(folder.glob(f"{kind}_*.json"))]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise VlmFixError(
            f"{places[0]} is missing: these images are not covered by the questions and ground truth of the package, "
            "so put COCO's annotation file there."
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise VlmFixError(f"{path} is not JSON (line {error.lineno}): fetch the annotation file again.") from error


def _restrict(annotations: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The same dictionary for these images alone."""
    images = [image for image in annotations["images"] if image["id"] in ids]
    rows = [row for row in annotations["annotations"] if row["image_id"] in ids]
    return {**annotations, "images": images, "annotations": rows}
