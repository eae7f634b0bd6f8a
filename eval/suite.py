"""AMBER, MME and HallusionBench as tasks of `vlm-fix eval`.

    benchmark   data                     what is asked
    amber       amber:DIR, or picto      captions ("amber") and yes/no questions ("amber-qa"); AMBER_1.jpg and so on are in
                                         DIR or DIR/image
    mme         mme:DIR                  the questions of DIR, MME_Benchmark_release_version
    hallusion   hallusion:DIR            the 951 questions about figures; DIR/VD and DIR/VS are in DIR or DIR/hallusion_bench

`--limit N` draws N images with the seed: of those found for AMBER, of each task for MME; of sets of figures for
HallusionBench, whose pairs must stay whole. Without it every image must be there.

AMBER in Picto's world: truth is what is in a scene, hallu what is typical of such a scene and is not, mentions are found
as for CHAIR, and as in AMBER every question on existence is about a hallu object, so that "no" is right. Its model
writes in lower case, which the official scorer would not read: answers are read by `ours` unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_fix.errors import VlmFixError

from . import amber, amber_data, hallusion, mme, picto, pope_data, yesno
from .picto.world import SCENE_TYPES
from .result import Result
from .tasks import IMAGES, Sample
from .words import Variant, nltk_ready

if TYPE_CHECKING:
    from .runner import Settings

BENCHMARKS = ("amber", "mme", "hallusion")


@dataclasses.dataclass
class Items:
    """Anything that is asked and then judged in parts: `items` go with `samples`, `judge` gives the parts' results."""

    benchmark: str
    items: Sequence[Any]
    samples: list[Sample]
    judge: Callable[[Sequence[str | None], Sequence[Any]], dict[str, Result]]
    data: dict[str, Any]
    max_new_tokens: int = 16

    @property
    def sizes(self) -> dict[str, int]:
        """Answers per part."""
        return {part: result.n for part, result in self.judge([None] * len(self.items), self.items).items()}

    def score(self, answers: Mapping[str, str | None]) -> dict[str, Result]:
        """Result per part from answers by sample id; None is wrong, what is not in `answers` is left out."""
        asked = [item for item, s in zip(self.items, self.samples, strict=True) if s.id in answers]
        given = [answers[s.id] for s in self.samples if s.id in answers]
        return self.judge(given, asked) if asked else {}


def build(settings: Settings) -> list[Items]:
    """The tasks of one of BENCHMARKS. Raises VlmFixError for data of another benchmark, missing images or a bad prompt."""
    kind, _, where = settings.data.partition(":")
    name = settings.benchmark
    if name == "amber" and kind == "picto":
        return _picto_amber(where or "shift", settings)
    if kind != name or not where:
        source = {"amber": " (or picto)", "mme": "; its authors give the data on request", "hallusion": ""}[name]
        raise VlmFixError(f"eval {name} reads --data {name}:DIR, not {settings.data!r}: give that{source}.")
    if name != "amber" and settings.prompt and "{question}" not in settings.prompt:
        raise VlmFixError(f'--prompt for {name} must hold {{question}}, such as "{{question}} Answer yes or no."')
    return {"amber": _amber, "mme": _mme, "hallusion": _hallusion}[name](Path(where).expanduser(), settings)


def _amber(folder: Path, settings: Settings) -> list[Items]:
    paths = {scene.image: _place(folder, scene.image, ("image", "images")) for scene in amber_data.scenes()}
    kept = _drawn(list(paths), paths, settings)
    scenes = [scene for scene in amber_data.scenes() if scene.image in kept]
    questions = [question for question in amber_data.questions() if question.image in kept]
    words = amber_data.lexicon(settings.scorer, settings.variant or "nltk")
    return _amber_tasks(scenes, questions, {name: paths[name] for name in kept}, words, settings, folder.name)


def _picto_amber(split: str, settings: Settings) -> list[Items]:
    shown = picto.scenes(split, settings.limit or IMAGES, settings.seed)
    variant: Variant = settings.variant or ("nltk" if nltk_ready() else "pattern")
    scenes: list[amber_data.Scene] = []
    questions: list[amber_data.Question] = []
    for scene in shown:
        absent = [name for name in SCENE_TYPES[scene.scene_type].typical if name not in scene.names]
        there = tuple(dict.fromkeys(name for name, _ in scene.objects))
        scenes.append(amber_data.Scene(scene.image_id, scene.file_name, there, tuple(absent)))
        for name in absent:
            text = pope_data.question_text(name)
            questions.append(amber_data.Question(len(questions) + 1, scene.file_name, text, "existence", "no"))
    words = amber_data.picto_lexicon(variant)
    images = {scene.file_name: scene.image for scene in shown}
    if settings.scorer == "official":
        settings = dataclasses.replace(settings, scorer="ours")
    return _amber_tasks(scenes, questions, images, words, settings, f"picto:{split}, seed {settings.seed}")


def _amber_tasks(
    scenes: Sequence[amber_data.Scene],
    questions: Sequence[amber_data.Question],
    images: Mapping[str, Any],
    words: amber_data.Lexicon,
    settings: Settings,
    source: str,
) -> list[Items]:
    words.nouns("a dog")  # missing NLTK data must be told now
    number = {scene.image: scene.id for scene in scenes}
    caption = settings.prompt if settings.prompt and "{question}" not in settings.prompt else "Describe this image."
    described = [
        Sample(str(s.id), s.id, s.image, images[s.image], caption, {"ground_truth": [*s.truth], "hallu": [*s.hallu]})
        for s in scenes
    ]
    asked = [
        Sample(str(q.id), number[q.image], q.image, images[q.image], _prompt(settings, q.text), {"label": q.label})
        for q in questions
    ]

    def judge(answers: Sequence[str | None], items: Sequence[amber_data.Question]) -> dict[str, Result]:
        parts = {}
        for kind in ("existence", "attribute", "relation"):
            both = [(a, q) for a, q in zip(answers, items, strict=True) if q.kind == kind]
            if both:
                parts[kind] = amber.score_questions([a for a, _ in both], [q for _, q in both], settings.scorer)
        return parts | ({"questions": amber.score_questions(answers, items, settings.scorer)} if len(parts) > 1 else {})

    return [
        Items(
            "amber",
            scenes,
            described,
            lambda texts, shown: {"captions": amber.score_captions(texts, shown, words)},
            _data(source, scenes, _scorer(words.scorer, amber.SOURCE)),
            512,
        ),
        Items("amber-qa", questions, asked, judge, _data(source, questions, _scorer(settings.scorer, amber.SOURCE))),
    ]


def _mme(folder: Path, settings: Settings) -> list[Items]:
    questions = mme.load(folder)
    if settings.limit:
        tasks: dict[str, dict[str, None]] = {}
        for question in questions:
            tasks.setdefault(question.task, {})[question.image] = None
        kept = {name for images in tasks.values() for name in _sample([*images], settings)}
        questions = [question for question in questions if question.image in kept]
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in questions), 1)}
    samples = [
        Sample(
            q.id, numbers[q.image], f"{q.task}/{Path(q.image).name}", Path(q.image), _prompt(settings, q.text),
            {"label": q.label},
        )
        for q in questions
    ]  # fmt: skip
    data = _data(folder.name, [q._replace(image=Path(q.image).name) for q in questions], "")
    data["variant"] = _scorer(settings.scorer, mme.SOURCE)
    return [Items("mme", questions, samples, lambda a, q: mme.score(a, q, settings.scorer), data)]


def _hallusion(folder: Path, settings: Settings) -> list[Items]:
    questions = [question for question in hallusion.questions() if question.image]
    sets = list(dict.fromkeys((q.category, q.subcategory, q.set) for q in questions))
    if settings.limit:
        kept = _sample(sets, settings)
        questions = [q for q in questions if (q.category, q.subcategory, q.set) in kept]
    paths = {q.image: _place(folder, q.image, ("hallusion_bench",)) for q in questions}
    _complete(paths, folder)
    numbers = {image: number for number, image in enumerate(paths, 1)}
    samples = [
        Sample(q.id, numbers[q.image], q.image, paths[q.image], _prompt(settings, q.text), {"label": q.label})
        for q in questions
    ]
    # the official judge, GPT-4, cannot be asked
    scorer: yesno.Scorer = "vlmevalkit" if settings.scorer == "official" else settings.scorer
    data = _data(folder.name, questions, f"{scorer}, groups of {hallusion.SOURCE}, figures only")
    return [Items("hallusion", questions, samples, lambda a, q: hallusion.score(a, q, scorer), data)]


def _prompt(settings: Settings, text: str) -> str:
    template = settings.prompt if settings.prompt and "{question}" in settings.prompt else "{question}"
    return template.replace("{question}", text)


def _scorer(name: str, source: str) -> str:
    return f"{name}, {source}" if name.startswith("official") else name


def _data(source: str, items: Sequence[Any], scorer: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
    images = len({item.image for item in items})
    return {"source": source, "images": images, "items": len(items), "variant": scorer, "sha256": digest}


def _place(folder: Path, name: str, inside: Sequence[str]) -> Path:
    places = [folder / name, *(folder / each / name for each in inside)]
    return next((place for place in places if place.is_file()), places[0])


def _complete(paths: Mapping[str, Path], folder: Path) -> None:
    lost = [path for path in paths.values() if not path.is_file()]
    if lost:
        raise VlmFixError(
            f"{len(lost)} of {len(paths)} images are missing in {folder}, first {lost[0]}: put them there, or ask for "
            "fewer with --limit."
        )


def _sample(names: Sequence[Any], settings: Settings) -> set[Any]:
    return {*random.Random(settings.seed).sample(list(names), min(settings.limit or len(names), len(names)))}


def _drawn(names: Sequence[str], paths: Mapping[str, Path], settings: Settings) -> set[str]:
    """All, or with a limit so many of those whose files are there."""
    there = [name for name in names if paths[name].is_file()]
    if settings.limit and len(there) >= settings.limit:
        return _sample(there, settings)
    _complete({name: paths[name] for name in names[: settings.limit or len(names)]}, paths[names[0]].parent)
    return {*names}
