"""MME's task: the questions of mme:DIR, the folder MME_Benchmark_release_version.

--limit samples that many images of each of MME's own tasks.
"""

from __future__ import annotations

from pathlib import Path

from vlm_fix.eval.scorers import mme
from vlm_fix.eval.settings import Settings

from .sample import Items, Sample, data_of, draw, question_prompt

IMAGES_FROM = "MME_Benchmark_release_version, which its authors send on request"


def build(folder: Path, settings: Settings) -> list[Items]:
    """Build the task, with images numbered in the order of the questions."""
    questions = mme.load(folder)
    if settings.limit:
        tasks: dict[str, dict[str, None]] = {}
        for question in questions:
            tasks.setdefault(question.task, {})[question.image] = None
        kept = {name for images in tasks.values() for name in draw([*images], settings)}
        questions = [question for question in questions if question.image in kept]
    numbers = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in questions), 1)}
    samples = []
    for q in questions:
        path = Path(q.image)
        file, prompt = f"{q.task}/{path.name}", question_prompt(settings, q.text)
        samples.append(Sample(q.id, numbers[q.image], file, path, prompt, {"label": q.label}))
    named = [q._replace(image=Path(q.image).name) for q in questions]
    data = data_of(folder.name, named, settings.scorer, mme.SOURCE)
    return [Items("mme", questions, samples, lambda a, q: mme.score(a, q, settings.scorer), data)]
