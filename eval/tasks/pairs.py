"""Pairs of captions of one image, a truthful and a hallucinated one: what directions are calibrated on.

Of Picto, the hallucinated caption is the truthful one's sentence plan with an absent object in it that its scene makes
likely. Of COCO, a JSONL file as VTI and LURE publish theirs: `image` (a file name), `value`, `h_value`, and `question` or
the caption prompt.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.picto import world

from .coco import paths_in
from .sample import CAPTION_PROMPT, Sample

TRIES = 200  # draws until a scene's prior names an absent object


@dataclasses.dataclass(frozen=True)
class Pair:
    """A caption sample, and two answers to it."""

    sample: Sample
    truthful: str
    hallucinated: str


def of_picto(samples: Sequence[Sample], seed: int) -> list[Pair]:
    """A pair for each image of these Picto samples."""
    pairs = []
    for file, sample in {s.file: s for s in samples}.items():
        split, drawn, index = Path(file).stem.removeprefix("picto_").rsplit("_", 2)
        scene = world.scene(split, int(drawn), int(index))
        rng = random.Random(f"{seed},{file}")
        present = {name for name, _ in scene.objects}
        draws: Iterator[list[str]] = (world.imagine(rng, scene.scene_type, present) for _ in range(TRIES))
        imagined = next((names for names in draws if names), [])
        if not imagined:  # nothing absent is likely there
            continue
        plan = rng.randrange(2**32)
        told = [world.caption(random.Random(plan), scene.scene_type, scene.objects, extra) for extra in ([], imagined)]
        pairs.append(Pair(dataclasses.replace(sample, prompt=CAPTION_PROMPT), *told))
    return pairs


def of_file(file: str, images: Path, limit: int, without: set[str], seed: int) -> list[Pair]:
    """At most `limit` pairs of a JSONL file, drawn with the seed, whose images are in the folder and not in `without`."""
    path, known = Path(file), paths_in(images)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [(str(d["image"]), d["value"], d["h_value"], d.get("question", CAPTION_PROMPT)) for d in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VlmFixError(
            f"--pairs {file} cannot be read ({type(error).__name__}): give a JSONL file with image, value and h_value."
        ) from None
    usable = [row for row in rows if row[0] in known and row[0] not in without]
    if not usable:
        raise VlmFixError(f"--pairs {file} names no image of {images} that is not held out; add the images it names.")
    chosen = random.Random(seed).sample(usable, min(limit, len(usable)))
    return [
        Pair(Sample(f"pair-{i}", i, name, known[name], question, {}), truthful, hallucinated)
        for i, (name, truthful, hallucinated, question) in enumerate(chosen)
    ]
