"""The images that the page offers, and what is in them: Picto scenes and photographs of COCO under CC BY 2.0.

The photographs are in `photographs/`, scaled down; `photographs/ATTRIBUTION.json` says where each comes from. Their truth is
CHAIR's, by their COCO id. An example is known by its pixels, so that its truth cannot stick to another image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.picto import questions
from vlm_fix.eval.picto.scene_types import SCENE_TYPES
from vlm_fix.eval.picto.world import with_article
from vlm_fix.eval.scorers.chair import data as chair_data
from vlm_fix.eval.scorers.chair.words import find_objects

SPLIT, SCENES = "test", 12  # the first scenes of the split in which Picto's prior holds
FOLDER = Path(__file__).parent / "photographs"


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with the name that `find` takes, a text for who cannot see it, and its source as HTML."""

    name: str
    image: Image.Image
    about: str
    credit: str

    @property
    def truth(self) -> frozenset[str]:
        """The COCO objects in the image."""
        kind, number = self.name.split(":")
        return (_coco_truth() if kind == "coco" else _scene_truth())[int(number)]


ASKS = re.compile(r"(is|are|was|were|do|does|did|has|have|can|could|will|would)\b.*\?\s*$", re.IGNORECASE | re.DOTALL)
THERE = re.compile(r"(?:is|are) there (?:an?|any) ([^?]+?)(?: in (?:the|this) \w+)?\s*\?\s*$", re.IGNORECASE)


def yes_no(prompt: str) -> bool:
    """Whether the prompt is a question to be answered with yes or no."""
    return bool(ASKS.match(prompt.strip()))


def label(example: Example | None, prompt: str) -> str:
    """ "yes" or "no", the true answer to a question about a Picto scene; "" where it is not known."""
    if example is None or not example.name.startswith("scene:"):
        return ""
    for asked in questions.about(_scenes()[int(example.name.partition(":")[2])]):
        if asked.text == prompt.strip():
            return asked.label
    about = THERE.match(prompt.strip())
    nodes = {found.node for found in find_objects(about[1], "pattern")[1]} if about else set()
    return "" if len(nodes) != 1 else "yes" if nodes <= example.truth else "no"


def asks(example: Example | None) -> list[str]:
    """Questions to try: of a scene after something that is there, after what is usual there and missing, and two more."""
    if example is None or not example.name.startswith("scene:"):
        return ["Is there a person in the image?", "Is there a dog in the image?"]
    scene = _scenes()[int(example.name.partition(":")[2])]
    missing = next(name for name in SCENE_TYPES[scene.scene_type].typical if name not in scene.names)
    made = [f"Is there {with_article(name)} in the image?" for name in (missing, scene.objects[0][0])]
    return made + [asked.text for asked in questions.about(scene)[::-3][:2]]


@cache
def scenes() -> tuple[Example, ...]:
    """Picto scenes, named "scene:0" and so on."""
    return tuple(
        Example(f"scene:{i}", s.image, f"Picto scene {i + 1}: {s.scene_type}", f"Picto, {SPLIT} scene {i}")
        for i, s in enumerate(_scenes())
    )


@cache
def _scenes() -> tuple[picto.Scene, ...]:
    return tuple(picto.scenes(SPLIT, SCENES))


@cache
def photographs() -> tuple[Example, ...]:
    """Photographs, named "coco:519208" and so on."""
    made = []
    for row in json.loads((FOLDER / "ATTRIBUTION.json").read_text()):
        credit = (
            f'COCO {row["coco_id"]}: <a href="{row["page"]}" target="_blank">photograph on Flickr</a>, '
            f'<a href="{row["license_url"]}" target="_blank">{row["license"]}</a>, {row["changes"]}'
        )
        with Image.open(FOLDER / row["file"]) as image:
            made.append(
                Example(f"coco:{row['coco_id']}", image.convert("RGB"), f"COCO photograph {row['coco_id']}", credit)
            )
    return tuple(made)


def find(name: str) -> Example:
    """The example of that name; VlmFixError lists the names for any other."""
    known = {example.name: example for example in (*scenes(), *photographs())}
    if name not in known:
        raise VlmFixError(f"There is no example {name!r}: choose from {', '.join(known)}.")
    return known[name]


def recognise(image: Image.Image) -> Example | None:
    """The example that an image shows, whatever file it came in."""
    return _by_pixels().get(_pixels(image))


@cache
def _by_pixels() -> dict[str, Example]:
    return {_pixels(example.image): example for example in (*scenes(), *photographs())}


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


@cache
def _coco_truth() -> dict[int, frozenset[str]]:
    return chair_data.ground_truth("coco", "pattern")


@cache
def _scene_truth() -> dict[int, frozenset[str]]:
    made = _scenes()
    truth = chair_data.build_ground_truth(*picto.coco_annotations(list(made)), "pattern")
    return {i: truth[scene.image_id] for i, scene in enumerate(made)}
