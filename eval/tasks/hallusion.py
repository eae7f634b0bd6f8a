"""HallusionBench in `vlm-fix eval`: the 951 questions about figures; DIR/VD and DIR/VS of hallusion:DIR are in DIR or in
DIR/hallusion_bench. --limit draws sets of figures, whose pairs must stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_fix.eval.scorers import hallusion, yesno

from .sample import Items, Sample, complete, data_of, draw, place, question_prompt

if TYPE_CHECKING:
    from vlm_fix.eval.run.runner import Settings

IMAGES_FROM = "as in hallusion_bench.zip, linked on github.com/tianyi-lab/HallusionBench"


def build(folder: Path, settings: Settings) -> list[Items]:
    """The task. The official judge, GPT-4, cannot be asked: vlmevalkit stands in for it."""
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
    scorer: yesno.Scorer = "vlmevalkit" if settings.scorer == "official" else settings.scorer
    data = data_of(folder.name, questions, f"{scorer}, groups of {hallusion.SOURCE}, figures only")
    return [Items("hallusion", questions, samples, lambda a, q: hallusion.score(a, q, scorer), data)]
