"""CHAIR's task: captions of Picto's scenes or of a folder of images.

COCO's images are judged by the ground truth in the package, other images by the annotations in their folder.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.chair import data as chair_data
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.chair.words import caption_to_words, nltk_ready
from vlm_fix.eval.scorers.choices import Variant
from vlm_fix.eval.settings import Settings

from .coco import Folder
from .sample import IMAGES, MAX_NEW_TOKENS, Sample, caption_prompt, digest


@dataclasses.dataclass
class Chair:
    """The caption task; `truth` maps image ids to the objects that are there."""

    truth: dict[int, list[str]]
    samples: list[Sample]
    variant: Variant
    data: dict[str, Any]
    drop_incomplete: bool = False
    benchmark: str = "chair"
    max_new_tokens: int = MAX_NEW_TOKENS["chair"]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of captions, under the name of the only split."""
        return {"captions": len(self.samples)}

    def score(self, answers: Mapping[str, str | None]) -> dict[str, chair.ChairResult]:
        """Score captions by sample id, under the name "captions"; one that failed (None) is left out."""
        texts = [(s.image_id, text) for s in self.samples if (text := answers.get(s.id)) is not None]
        cut = chair_data.whole_sentences if self.drop_incomplete else str
        captions = [chair.Caption(image_id, cut(text)) for image_id, text in texts]
        return {"captions": chair.score(captions, self.truth, self.variant)} if captions else {}


def of_picto(scenes: Sequence[picto.Scene], source: str, settings: Settings) -> Chair:
    """Build the task of describing every scene; the default variant needs no download."""
    variant: Variant = settings.variant or ("nltk" if nltk_ready() else "pattern")
    truth = chair_data.build_ground_truth(*picto.coco_annotations(scenes), variant)
    return _task({s.file_name: (s.image_id, s.image) for s in scenes}, truth, variant, settings, source)


def of_folder(folder: Folder, settings: Settings) -> Chair:
    """Build the task of describing the images in --ids, or `limit` images sampled with the seed."""
    variant: Variant = settings.variant or "nltk"
    limit, wanted = settings.limit or IMAGES, folder.wanted(settings.ids)
    ids = wanted or sorted(folder.images)
    if wanted is None and len(ids) > limit:
        ids = sorted(random.Random(settings.seed).sample(ids, limit))
    ids = ids[:limit]
    truth: Mapping[int, Any] = {} if folder.own else chair_data.ground_truth("coco", variant)
    if any(number not in truth for number in ids):
        instances, captions = (folder.annotations(kind, ids) for kind in ("instances", "captions"))
        truth = chair_data.build_ground_truth(instances, captions, variant)
        bare = [number for number in ids if number not in truth]
        if bare:
            raise VlmFixError(
                f"image {bare[0]} has no annotation in {folder.path}: add it to instances_*.json or leave the id out "
                "with --ids."
            )
    images = {folder.images[number].name: (number, folder.images[number]) for number in ids}
    return _task(
        images, truth, variant, settings, f"{folder.path.name}, {counted(len(ids), 'image')}, seed {settings.seed}"
    )


def _task(
    images: Mapping[str, Any], truth: Mapping[int, Any], variant: Variant, settings: Settings, source: str
) -> Chair:
    """`images` maps file names to (id, image or path)."""
    caption_to_words("a dog", variant)  # report missing NLTK data now, not after generation
    prompt = caption_prompt(settings)
    mine = {image_id: sorted(truth[image_id]) for image_id, _ in images.values()}
    samples = [
        Sample(str(image_id), image_id, file, image, prompt, {"ground_truth": mine[image_id]})
        for file, (image_id, image) in images.items()
    ]
    data = {"source": source, "images": len(samples), "variant": variant, "sha256": digest(mine)}
    if settings.drop_incomplete:
        data["captions"] = "a cut-off last sentence dropped"
    return Chair(mine, samples, variant, data, settings.drop_incomplete)
