"""HallusionBench's task: the 951 questions about figures.

The folders VD and VS of hallusion:DIR are in DIR or DIR/hallusion_bench. --limit samples whole sets of figures, so that
no question pair is split.
"""

from __future__ import annotations

from pathlib import Path

from vlm_fix.eval.scorers import hallusion
from vlm_fix.eval.scorers.choices import Scorer
from vlm_fix.eval.settings import Settings

from .sample import Items, Sample, complete, data_of, draw, place, question_prompt

IMAGES_FROM = "as in hallusion_bench.zip, linked on github.com/tianyi-lab/HallusionBench"


def build(folder: Path, settings: Settings) -> list[Items]:
    """Build the task. The official judge, GPT-4, is not called; the scorer vlmevalkit replaces it."""
    questions = [question for question in hallusion.questions() if question.image]
    sets = list(dict.fromkeys((q.category, q.subcategory, q.set) for q in questions))
    if settings.limit:
        kept = draw(sets, settings)
        questions = [q for q in questions if (q.category, q.subcategory, q.set) in kept]
    paths = {q.image: place(folder, q.image, ("hallusion_bench",)) for q in questions}
    complete(paths, folder, IMAGES_FROM)
    numbers = {image: number for number, image in enumerate(paths, 1)}
    samples = [
        Sample(q.id, numbers[q.image], q.image, paths[q.image], question_prompt(settings, q.text), {"label": q.label})
        for q in questions
    ]
    scorer: Scorer = "vlmevalkit" if settings.scorer == "official" else settings.scorer
    data = data_of(folder.name, questions, f"{scorer}, groups of {hallusion.SOURCE}, figures only")
    return [Items("hallusion", questions, samples, lambda a, q: hallusion.score(a, q, scorer), data)]
