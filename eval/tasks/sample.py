"""Samples, the general task `Items`, and helpers that find, sample and hash their data.

A sample is one image with one prompt. `Items` is the task of benchmarks whose scorer judges answers in parts; POPE and
CHAIR have their own classes. All tasks have benchmark, samples, data, sizes, max_new_tokens and score(answers by sample
id) -> {part: result}; a result has n, rows (counts with their image) and to_dict(). An answer of None is a sample that
failed: an answer to a question counts as wrong, a caption is left out, since an empty one would have no hallucination.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.result import Result
from vlm_fix.eval.settings import Settings
from vlm_fix.images import read_image

CAPTION_PROMPT = "Please describe this image in detail."
IMAGES = 500  # the size of POPE and CHAIR as published
MAX_NEW_TOKENS = {"pope": 16, "chair": 512}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image and one prompt; `reference` has the label or ground-truth objects that the answer is judged by."""

    id: str
    image_id: int
    file: str
    image: Image.Image | Path
    prompt: str
    reference: dict[str, Any]

    @property
    def yes_no(self) -> bool:
        """Whether the answer is to be yes or no."""
        return str(self.reference.get("label")).lower() in ("yes", "no")

    def describe(self) -> dict[str, Any]:
        """Return the sample's part of a line in samples.jsonl."""
        return {"id": self.id, "image_id": self.image_id, "image": self.file, "prompt": self.prompt, **self.reference}


@dataclasses.dataclass
class Items:
    """A task judged in parts: `items` correspond to `samples`, and `judge` returns the result of each part."""

    benchmark: str
    items: Sequence[Any]
    samples: list[Sample]
    judge: Callable[[Sequence[str | None], Sequence[Any]], dict[str, Result]]
    data: dict[str, Any]
    max_new_tokens: int = 16

    @property
    def sizes(self) -> dict[str, int]:
        """Number of answers per part."""
        return {part: result.n for part, result in self.judge([""] * len(self.items), self.items).items()}

    def score(self, answers: Mapping[str, str | None]) -> dict[str, Result]:
        """Score answers by sample id, per part. None is one that failed; samples missing from `answers` are left out."""
        asked = [item for item, s in zip(self.items, self.samples, strict=True) if s.id in answers]
        given = [answers[s.id] for s in self.samples if s.id in answers]
        return self.judge(given, asked) if asked else {}


def load_image(sample: Sample) -> Image.Image:
    """Return the sample's image in RGB. Raises VlmFixError naming a file that cannot be read."""
    if isinstance(sample.image, Image.Image):
        return sample.image
    return read_image(sample.image, "replace the file or leave its id out with --ids.", upright=False)


def question_prompt(settings: Settings, text: str) -> str:
    """Fill the question into --prompt, unless that is a prompt for captions."""
    template = settings.prompt if settings.prompt and "{question}" in settings.prompt else "{question}"
    return template.replace("{question}", text)


def caption_prompt(settings: Settings, usual: str = CAPTION_PROMPT) -> str:
    """Return --prompt, unless that is a template for questions."""
    return settings.prompt if settings.prompt and "{question}" not in settings.prompt else usual


def digest(data: Any) -> str:
    """Return the sha256 of any JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def data_of(source: str, items: Sequence[Any], scorer: str, commit: str = "") -> dict[str, Any]:
    """Describe the data of `Items` for config.json; the official scorer is named with its `commit`."""
    named = f"{scorer}, {commit}" if commit and scorer.startswith("official") else scorer
    images = len({item.image for item in items})
    return {"source": source, "images": images, "items": len(items), "variant": named, "sha256": digest(items)}


def place(folder: Path, name: str, inside: Sequence[str]) -> Path:
    """Find a file in the folder or in one of its subfolders `inside`; the path in the folder if it is in none.

    Raises VlmFixError for a name that leads out of the folder: names come from files of questions, which others wrote.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise VlmFixError(f"the questions in {folder} name an image outside of it, {name!r}: mend or remove that line.")
    places = [folder / name, *(folder / each / name for each in inside)]
    return next((path for path in places if path.is_file()), places[0])


def complete(paths: Mapping[str, Path], folder: Path, source: str) -> None:
    """Raise VlmFixError if a file is missing; `source` says where the files come from."""
    lost = [path for path in paths.values() if not path.is_file()]
    if lost:
        raise VlmFixError(
            f"{len(lost)} of {len(paths)} images are missing in {folder}, first {lost[0]}: put them there, {source}, or ask "
            "for fewer with --limit."
        )


def draw(names: Sequence[Any], settings: Settings) -> set[Any]:
    """Sample --limit of the names with the seed; without a limit, return all."""
    return {*random.Random(settings.seed).sample(list(names), min(settings.limit or len(names), len(names)))}
