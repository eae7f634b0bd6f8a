"""POPE's task: questions about Picto's scenes, about COCO's images, or from files about any images.

A question that several splits share (all three have the same positives) is asked once and counted in each. COCO's images
get the official questions, judged by POPE's and RePOPE's labels; for other images and for Picto, questions are made from
the annotations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.choices import Scorer
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import repope
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.settings import Settings

from .coco import Folder, paths_in
from .sample import IMAGES, MAX_NEW_TOKENS, Sample, question_prompt

SPLITS = get_args(pope.Kind)


@dataclasses.dataclass
class Pope:
    """The yes/no task; `questions` are by split, and each split is scored on its own."""

    questions: dict[str, list[pope.Question]]
    samples: list[Sample]
    scorer: Scorer
    data: dict[str, Any]
    benchmark: str = "pope"
    max_new_tokens: int = MAX_NEW_TOKENS["pope"]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of questions per split."""
        return {split: len(questions) for split, questions in self.questions.items()}

    def score(self, answers: Mapping[str, str | None]) -> dict[str, pope.PopeResult]:
        """Score answers by sample id, per split. None is wrong; questions missing from `answers` are left out."""
        results = {}
        for split, questions in self.questions.items():
            asked = [q for q in questions if _id(q) in answers]
            if asked:
                given = [pope.Answer(q.question_id, answers[_id(q)]) for q in asked]
                results[split] = pope.score(asked, given, self.scorer)
        return results


def of_picto(scenes: Sequence[picto.Scene], images: int, source: str, settings: Settings) -> Pope:
    """Build the task about `images` of the scenes; those with fewer than three objects are skipped."""
    _no_repope(settings)
    instances, _ = picto.coco_annotations(scenes)
    questions = _made(instances, images, settings)
    return _task(questions, {s.file_name: (s.image_id, s.image) for s in scenes}, settings, source)


def of_folder(folder: Folder, settings: Settings) -> Pope:
    """Build the task: official questions if the folder has COCO's images, else made from its annotations."""
    limit, wanted = settings.limit or IMAGES, folder.wanted(settings.ids)
    official = {kind: pope_data.coco_questions(kind) for kind in settings.splits}
    names = list(dict.fromkeys(q.image for each in official.values() for q in each))
    have = any(folder.number_of(name) in folder.images for name in names)
    if not folder.own and not settings.build and wanted is None and have:
        names = names[:limit]
        lost = [name for name in names if folder.number_of(name) not in folder.images]
        if lost:
            raise VlmFixError(
                f"{len(lost)} of POPE's {len(names)} images are missing in {folder.path}, first {lost[0]}: put val2014 "
                "there, or list the ids you have in --ids FILE (needs annotations/instances_val2014.json)."
            )
        questions: dict[Any, list[pope.Question]] = {
            kind: [q for q in each if q.image in names] for kind, each in official.items()
        }
        if settings.labels == "both":
            checked = {kind: repope.needed(each)[1] for kind, each in questions.items()}
            questions |= {f"{kind} RePOPE": each for kind, each in checked.items()}
        elif settings.labels == "repope":
            questions = {kind: repope.needed(each)[1] for kind, each in questions.items()}
        source = f"coco, official questions, first {counted(len(names), 'image')}"
    else:
        _no_repope(settings)
        instances = folder.annotations("instances", wanted or folder.images)
        kinds: dict[int, set[int]] = {}
        for row in instances["annotations"]:
            kinds.setdefault(row["image_id"], set()).add(row["category_id"])
        n = min(limit, sum(len(each) > 2 for each in kinds.values()) or limit)  # POPE asks for three objects
        questions = _made(instances, n, settings)
        names = list(dict.fromkeys(q.image for each in questions.values() for q in each))
        source = (
            f"{folder.path.name}, questions made from annotations, {counted(len(names), 'image')}, seed {settings.seed}"
        )
    ids = {name: folder.number_of(name) for name in names}
    return _task(questions, {name: (n, folder.images[n]) for name, n in ids.items() if n is not None}, settings, source)


def of_files(folder: Path, settings: Settings) -> Pope:
    """Build the task from --questions, a split per file; aokvqa and gqa are the package's, with the splits of --split.

    A limit keeps the first images that they name. Raises VlmFixError for two splits of one name.
    """
    _no_repope(settings)
    paths = paths_in(folder)
    asked, sources = dict[str, list[Any]](), dict[str, str]()
    for file in settings.questions:
        made = {Path(file).stem: file}
        if file in pope_data.PACKAGED:  # such as aokvqa: the splits of the package
            made = {f"{file} {kind}": f"{file}:{kind}" for kind in settings.splits}
        for split, place in made.items():
            if split in sources:
                raise VlmFixError(
                    f"--questions {sources[split]} and {place} would both be the split {split!r}: give each once, and files "
                    "other names."
                )
            sources[split], asked[split] = place, pope_data.load_questions(place)
    names = list(dict.fromkeys(q.image for each in asked.values() for q in each))[: settings.limit]
    lost = [name for name in names if name not in paths]
    if lost:
        raise VlmFixError(
            f"{len(lost)} of {len(names)} images that the questions are about are missing in {folder}, first {lost[0]}: "
            "put them there."
        )
    questions = {split: [q for q in each if q.image in names] for split, each in asked.items()}
    images = {name: (number, paths[name]) for number, name in enumerate(names, 1)}
    return _task(questions, images, settings, f"{', '.join(questions)}, first {counted(len(names), 'image')}")


def _made(instances: Any, images: int, settings: Settings) -> dict[Any, list[pope.Question]]:
    """Make questions about `images` images. Absent objects are those of the other images, so few need more beside them."""
    for beside in (0, 1, 2, 4, 8, 16):
        try:
            made = {
                k: pope_data.make_questions(instances, k, images=images + beside, seed=settings.seed)
                for k in settings.splits
            }
        except VlmFixError as error:
            if "no negative is left" not in str(error) or beside == 16:
                raise
        else:
            names = list(dict.fromkeys(q.image for each in made.values() for q in each))[:images]
            return {k: [q for q in each if q.image in names] for k, each in made.items()}
    raise AssertionError("the last try raises")


def _no_repope(settings: Settings) -> None:
    if settings.labels == "repope":
        raise VlmFixError(
            "RePOPE labels POPE's own questions about COCO, and these are others: give --data coco:DIR with val2014's "
            "images, or leave out --labels repope."
        )


def _id(question: pope.Question) -> str:
    return f"{question.image}|{question.text}"


def _task(
    questions: Mapping[Any, list[pope.Question]], images: Mapping[str, Any], settings: Settings, source: str
) -> Pope:
    """`images` maps the questions' file names to (id, image or path)."""
    splits: dict[str, list[str]] = {}
    first: dict[str, pope.Question] = {}
    labels: dict[str, dict[str, str]] = {}
    for split, each in questions.items():
        for question in each:
            splits.setdefault(_id(question), []).append(split)
            first.setdefault(_id(question), question)
            labels.setdefault(_id(question), {})[split] = question.label
    samples = []
    for key, q in first.items():
        number, image = images[q.image]
        reference: dict[str, Any] = {"label": q.label, "splits": splits[key]}
        if other := {split: label for split, label in labels[key].items() if label != q.label}:
            reference["labels"] = other  # RePOPE's, where it corrects POPE's
        samples.append(Sample(key, number, q.image, image, question_prompt(settings, q.text), reference))
    data = {
        "source": source,
        "images": len({q.image for q in first.values()}),
        "questions": {split: len(each) for split, each in questions.items()},
        "sha256": {split: pope.questions_sha256(each) for split, each in questions.items()},
    }
    if settings.labels == "repope":
        data["labels"] = "POPE with RePOPE's labels"
    return Pope(dict(questions), samples, settings.scorer, data)
