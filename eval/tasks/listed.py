"""DASH-B, BEAF and Reefknot: folders with the questions in files, and the images that these name.

    dash-b:DIR     dash_benchmark_neg.json, dash_benchmark_pos.json and the folders neg/ and pos/
    beaf:DIR       beaf_qna.json, and the images beside it or in images/
    reefknot:DIR   YESNO.jsonl, Multichoice.jsonl or both, and Visual Genome's images in VG_100K, VG_100K_2 or images/

--limit samples that many images; BEAF's with all of their edited copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import beaf, dash_b, reefknot
from vlm_fix.eval.scorers.result import Result
from vlm_fix.eval.settings import Settings

from .sample import Items, Sample, complete, data_of, draw, place, question_prompt

IN_REEFKNOT = ("VG_100K", "VG_100K_2", "images")


@dataclass(frozen=True)
class Listed:
    """A benchmark with its questions in files.

    `read` yields (task, questions, path of an image by name) of a folder; --limit counts what `group` makes of questions.
    `score` returns the parts of (answers, questions, scorer); IMAGES_FROM says where the images come from.
    """

    IMAGES_FROM: str
    commit: str
    read: Callable[[Path], Iterator[tuple[str, Sequence[Any], Callable[[str], Path]]]]
    score: Callable[[Sequence[str | None], Sequence[Any], Any], dict[str, Result]]
    group: Callable[[Any], str] = lambda question: question.image

    def build(self, folder: Path, settings: Settings) -> list[Items]:
        """Build the tasks about the sampled images, all of which must be there."""
        made = []
        for task, asked, path_of in self.read(folder):
            if settings.limit:
                drawn = draw(list(dict.fromkeys(map(self.group, asked))), settings)
                asked = [q for q in asked if self.group(q) in drawn]
            paths = {q.image: path_of(q.image) for q in asked}
            complete(paths, folder, self.IMAGES_FROM)
            numbers = {image: number for number, image in enumerate(paths, 1)}
            samples = [
                Sample(
                    q.id,
                    numbers[q.image],
                    q.image,
                    paths[q.image],
                    question_prompt(settings, q.text),
                    {"label": q.label},
                )
                for q in asked
            ]
            judge = lambda answers, items: self.score(answers, items, settings.scorer)  # noqa: E731
            made.append(Items(task, asked, samples, judge, data_of(folder.name, asked, settings.scorer, self.commit)))
        return made


def _dash_b(folder: Path) -> Iterator[Any]:
    yield "dash-b", dash_b.questions(folder), lambda name: place(folder, name, ("images",))


def _beaf(folder: Path) -> Iterator[Any]:
    yield "beaf", beaf.load_questions(folder / "beaf_qna.json"), lambda name: place(folder, name, ("images",))


def _reefknot(folder: Path) -> Iterator[Any]:
    files = [path for name in ("YESNO", "Multichoice") for path in [folder / f"{name}.jsonl"] if path.is_file()]
    if not files:
        raise VlmFixError(
            f"{folder} has neither YESNO.jsonl nor Multichoice.jsonl: put them there, {Reefknot.IMAGES_FROM}."
        )
    for path in files:
        asked, _ = reefknot.load(path, answered=False)
        yield asked[0].type, asked, lambda name: place(folder, f"{name.removesuffix('.jpg')}.jpg", IN_REEFKNOT)


DashB = Listed(
    "as linked on github.com/YanNeu/DASH-B, which has the lists in images/",
    dash_b.SOURCE,
    _dash_b,
    lambda answers, asked, scorer: {"questions": dash_b.score(answers, asked, scorer)},
)
Beaf = Listed(
    "as linked on github.com/postech-ami/BEAF, which has beaf_qna.json",
    beaf.SOURCE,
    _beaf,
    lambda answers, asked, scorer: {"questions": beaf.score(answers, asked, scorer)},
    lambda question: question.before,  # with all of the edited copies
)
Reefknot = Listed(
    "of Visual Genome; the questions are on github.com/JackChen-seu/Reefknot in Dataset/",
    reefknot.SOURCE,
    _reefknot,
    reefknot.score,
)
