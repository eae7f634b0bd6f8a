"""AMBER's tasks: captions ("amber") and yes/no questions ("amber-qa") about AMBER's images or Picto's scenes.

The images of amber:DIR, AMBER_1.jpg and so on, are in DIR or DIR/image; --limit samples from those found.

In Picto, truth is what is in a scene, hallu what is typical of the scene and absent, and mentions are found as for CHAIR.
As in AMBER, every question about existence is about a hallu object, so that "no" is right. picto:SPLIT+attributes adds
questions about number, place, size and direction (`picto/questions.py`), about half of them with the answer yes; the bundled
models were trained on none of these. picto-llava answers in lower case, which the official scorer does not accept, so `ours`
replaces it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.eval import picto
from vlm_fix.eval.picto import questions as picto_questions
from vlm_fix.eval.picto.scene_types import SCENE_TYPES
from vlm_fix.eval.scorers.amber import data as amber_data
from vlm_fix.eval.scorers.amber import score as amber
from vlm_fix.eval.scorers.chair.words import nltk_ready
from vlm_fix.eval.scorers.choices import Variant
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.result import Result
from vlm_fix.eval.settings import Settings

from .sample import IMAGES, Items, Sample, caption_prompt, complete, data_of, draw, place, question_prompt

ATTRIBUTES = "+attributes"
IMAGES_FROM = "as linked on github.com/junyangwang0410/AMBER"


def build(folder: Path, settings: Settings) -> list[Items]:
    """Build both tasks about the images of a folder; without a limit every image must be there."""
    paths = {scene.image: place(folder, scene.image, ("image", "images")) for scene in amber_data.scenes()}
    there = [name for name, path in paths.items() if path.is_file()]
    if settings.limit and len(there) >= settings.limit:
        kept = draw(there, settings)
    else:
        wanted = list(paths)[: settings.limit]
        complete({name: paths[name] for name in wanted}, paths[wanted[0]].parent, IMAGES_FROM)
        kept = {*wanted}
    scenes = [scene for scene in amber_data.scenes() if scene.image in kept]
    questions = [question for question in amber_data.questions() if question.image in kept]
    lexicon = amber_data.lexicon(settings.scorer, settings.variant or "nltk")
    return _tasks(scenes, questions, {name: paths[name] for name in kept}, lexicon, settings, folder.name)


def of_picto(split: str, settings: Settings) -> list[Items]:
    """Build both tasks about Picto's scenes; "+attributes" behind the split also asks about more than existence."""
    source = f"picto:{split}, seed {settings.seed}"
    split, more = split.replace(ATTRIBUTES, ""), ATTRIBUTES in split
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
        for kind, text, label in picto_questions.about(scene) if more else ():
            questions.append(amber_data.Question(len(questions) + 1, scene.file_name, text, kind, label))
    images = {scene.file_name: scene.image for scene in shown}
    if settings.scorer == "official":
        settings = dataclasses.replace(settings, scorer="ours")
    return _tasks(scenes, questions, images, amber_data.picto_lexicon(variant), settings, source)


def _tasks(
    scenes: Sequence[amber_data.Scene],
    questions: Sequence[amber_data.Question],
    images: Mapping[str, Any],
    lexicon: amber_data.Lexicon,
    settings: Settings,
    source: str,
) -> list[Items]:
    lexicon.nouns("a dog")  # report missing NLTK data before the model runs
    number = {scene.image: scene.id for scene in scenes}
    prompt = caption_prompt(settings, "Describe this image.")
    described = [
        Sample(str(s.id), s.id, s.image, images[s.image], prompt, {"ground_truth": [*s.truth], "hallu": [*s.hallu]})
        for s in scenes
    ]
    asked = [
        Sample(
            str(q.id), number[q.image], q.image, images[q.image], question_prompt(settings, q.text), {"label": q.label}
        )
        for q in questions
    ]
    scorer = settings.scorer

    def judge_captions(texts: Sequence[str | None], shown: Sequence[amber_data.Scene]) -> dict[str, Result]:
        told = [(text, scene) for text, scene in zip(texts, shown, strict=True) if text is not None]
        if not told:
            return {}
        return {"captions": amber.score_captions([text for text, _ in told], [scene for _, scene in told], lexicon)}

    def judge(answers: Sequence[str | None], items: Sequence[amber_data.Question]) -> dict[str, Result]:
        parts = {}
        for kind in ("existence", "attribute", "relation"):
            both = [(a, q) for a, q in zip(answers, items, strict=True) if q.kind == kind]
            if both:
                parts[kind] = amber.score_questions([a for a, _ in both], [q for _, q in both], scorer)
        return parts | ({"questions": amber.score_questions(answers, items, scorer)} if len(parts) > 1 else {})

    return [
        Items(
            "amber",
            scenes,
            described,
            judge_captions,
            data_of(source, scenes, lexicon.scorer, amber.SOURCE),
            512,
        ),
        Items("amber-qa", questions, asked, judge, data_of(source, questions, scorer, amber.SOURCE)),
    ]
