"""What every task is made of: samples, and what makes, draws and hashes them.

A sample is one image with one prompt. `Items` is the task of a benchmark whose scorer judges answers in parts; POPE and
CHAIR have tasks of their own. All have benchmark, samples, data, sizes, max_new_tokens and score(answers by sample id) ->
{part: result}, whose result has n, rows (counts with their image) and to_dict(). An answer of None is a sample that
failed: it stays in the score, as wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.result import Result

if TYPE_CHECKING:
    from vlm_fix.eval.run.runner import Settings

CAPTION_PROMPT = "Please describe this image in detail."
IMAGES = 500  # the size of POPE and CHAIR as published
MAX_NEW_TOKENS = {"pope": 16, "chair": 512}


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


def question_prompt(settings: Settings, text: str) -> str:
    """The question in the template of --prompt, which may be one for captions."""
    template = settings.prompt if settings.prompt and "{question}" in settings.prompt else "{question}"
    return template.replace("{question}", text)


def caption_prompt(settings: Settings, usual: str = CAPTION_PROMPT) -> str:
    """--prompt, unless that is a template for questions."""
    return settings.prompt if settings.prompt and "{question}" not in settings.prompt else usual


def digest(data: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def data_of(source: str, items: Sequence[Any], scorer: str, commit: str = "") -> dict[str, Any]:
    """The data of `Items` for config.json; the official scorer goes with its `commit`."""
    named = f"{scorer}, {commit}" if commit and scorer.startswith("official") else scorer
    images = len({item.image for item in items})
    return {"source": source, "images": images, "items": len(items), "variant": named, "sha256": digest(items)}


def place(folder: Path, name: str, inside: Sequence[str]) -> Path:
    """The file in the folder or one of the folders `inside` it; the first place where it is nowhere."""
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
    """--limit of the names, drawn with the seed; all without a limit."""
    return {*random.Random(settings.seed).sample(list(names), min(settings.limit or len(names), len(names)))}
