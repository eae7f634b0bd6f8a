"""DASH-B, BEAF and Reefknot: folders with the questions in files, and the images that these name.

    dash-b:DIR     dash_benchmark_neg.json, dash_benchmark_pos.json and the folders neg/ and pos/
    beaf:DIR       beaf_qna.json, and the images beside it or in images/
    reefknot:DIR   YESNO.jsonl, Multichoice.jsonl or both, and Visual Genome's images in VG_100K, VG_100K_2 or images/

--limit samples that many images; BEAF's with all of their edited copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import beaf, dash_b, reefknot
from vlm_fix.eval.scorers.result import Result
from vlm_fix.eval.settings import Settings

from .sample import Items, Sample, complete, data_of, draw, place, question_prompt


class DashB:
    """DASH-B's task: 2682 questions, one image each."""

    IMAGES_FROM = "as linked on github.com/YanNeu/DASH-B, which has the lists in images/"

    @staticmethod
    def build(folder: Path, settings: Settings) -> list[Items]:
        asked = dash_b.questions(folder)
        paths = {q.image: place(folder, q.image, ("images",)) for q in asked}
        kept = _kept(asked, lambda q: q.image, paths, folder, settings, DashB.IMAGES_FROM)
        return [
            _items(
                "dash-b",
                kept,
                paths,
                settings,
                dash_b.SOURCE,
                folder,
                lambda a, q: {"questions": dash_b.score(a, q, settings.scorer)},
            )
        ]


class Beaf:
    """BEAF's task: every question before and after an object is removed."""

    IMAGES_FROM = "as linked on github.com/postech-ami/BEAF, which has beaf_qna.json"

    @staticmethod
    def build(folder: Path, settings: Settings) -> list[Items]:
        asked = beaf.load_questions(folder / "beaf_qna.json")
        paths = {q.image: place(folder, q.image, ("images",)) for q in asked}
        kept = _kept(asked, lambda q: q.before, paths, folder, settings, Beaf.IMAGES_FROM)
        return [
            _items(
                "beaf",
                kept,
                paths,
                settings,
                beaf.SOURCE,
                folder,
                lambda a, q: {"questions": beaf.score(a, q, settings.scorer)},
            )
        ]


class Reefknot:
    """Reefknot's tasks: yes/no questions and choices, whichever file is there."""

    IMAGES_FROM = "of Visual Genome; the questions are on github.com/JackChen-seu/Reefknot in Dataset/"

    @staticmethod
    def build(folder: Path, settings: Settings) -> list[Items]:
        files = [path for name in ("YESNO", "Multichoice") for path in [folder / f"{name}.jsonl"] if path.is_file()]
        if not files:
            raise VlmFixError(
                f"{folder} has neither YESNO.jsonl nor Multichoice.jsonl: put them there, {Reefknot.IMAGES_FROM}."
            )
        tasks = []
        for path in files:
            asked, _ = reefknot.load(path, answered=False)
            inside = ("VG_100K", "VG_100K_2", "images")
            paths = {q.image: place(folder, f"{q.image.removesuffix('.jpg')}.jpg", inside) for q in asked}
            kept = _kept(asked, lambda q: q.image, paths, folder, settings, Reefknot.IMAGES_FROM)
            judge = lambda a, q: reefknot.score(a, q, settings.scorer)  # noqa: E731
            tasks.append(_items(kept[0].type, kept, paths, settings, reefknot.SOURCE, folder, judge))
        return tasks


def _kept(
    asked: Sequence[Any],
    group: Callable[[Any], str],
    paths: Mapping[str, Path],
    folder: Path,
    settings: Settings,
    source: str,
) -> list[Any]:
    """Return the questions about the sampled images, all of which must be there."""
    names = list(dict.fromkeys(map(group, asked)))
    if settings.limit:
        drawn = draw(names, settings)
        asked = [q for q in asked if group(q) in drawn]
    complete({q.image: paths[q.image] for q in asked}, folder, source)
    return [*asked]


def _items(
    task: str,
    asked: Sequence[Any],
    paths: Mapping[str, Path],
    settings: Settings,
    commit: str,
    folder: Path,
    judge: Callable[[Sequence[str | None], Sequence[Any]], dict[str, Result]],
) -> Items:
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in asked), 1)}
    samples = [
        Sample(q.id, numbers[q.image], q.image, paths[q.image], question_prompt(settings, q.text), {"label": q.label})
        for q in asked
    ]
    return Items(task, asked, samples, judge, data_of(folder.name, asked, settings.scorer, commit))
