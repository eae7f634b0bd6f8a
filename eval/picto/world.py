"""The Picto world: 128-pixel scenes of sprites with COCO annotations and captions, drawn from a seed.

A scene has a type (kitchen, street, ...) with its own background and typical objects. Splits differ in one thing each:

========  =====================================================================================================
train     objects follow the scene's prior; sprite styles noto and twemoji
test      the same distribution, other scenes
shift     the prior is broken on purpose: at most one of the scene's core objects is there, and half of the objects
          are typical of another scene or of none
style     the same distribution as test, drawn with the held-out sprite style (fluent)
========  =====================================================================================================

A split can be asked for with other looks, "shift+crowded+large": see `looks.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic

from . import looks, sprites
from .looks import Look
from .scene_types import CATEGORIES, COCO_IDS, SCENE_TYPES, SceneType

SIZE = 128  #: side of a scene in pixels, unless its look is large
SPLITS = ("train", "test", "shift", "style")


@dataclass(frozen=True)
class Scene:
    """One image with its annotations; ``masks`` maps each pixel to the index of its object (255: background)."""

    image: Image.Image  # RGB, 128 x 128, or 224 x 224 if it is large
    image_id: int
    file_name: str
    scene_type: str
    objects: list[tuple[str, list[int]]]  # (category, [x, y, width, height] of the visible part), largest first
    captions: list[str]  # five; none mentions an absent object
    masks: np.ndarray  # uint8 [side, side]

    @property
    def names(self) -> set[str]:
        """The categories that are in the image."""
        return {name for name, _ in self.objects}

    def patch_classes(self, patch: int = 16, share: float = 0.2) -> np.ndarray:
        """Return int64 [patches], row by row: the index into CATEGORIES of what covers it, len(CATEGORIES) for background."""
        table = np.full(256, len(CATEGORIES))
        table[: len(self.objects)] = [CATEGORIES.index(name) for name, _ in self.objects]
        n = len(self.masks) // patch
        pixels = table[self.masks].reshape(n, patch, n, patch).swapaxes(1, 2).reshape(n * n, patch * patch)
        counts = np.zeros((n * n, len(CATEGORIES) + 1), dtype=np.int64)
        np.add.at(counts, (np.arange(n * n)[:, None], pixels), 1)
        top = counts[:, :-1].argmax(1)
        return np.where(counts[np.arange(n * n), top] > share * patch * patch, top, len(CATEGORIES))


# --- what is in a scene --------------------------------------------------------------------------------------------


def _draw(rng: random.Random, weights: dict[str, float], k: int) -> list[str]:
    """Draw k distinct names, one after the other, by weight."""
    left, out = dict(weights), []
    for _ in range(min(k, len(left))):
        out.append(rng.choices(list(left), list(left.values()))[0])
        del left[out[-1]]
    return out


def _prior(kind: SceneType) -> dict[str, float]:
    return {**dict.fromkeys(kind.rest, 1.0), **dict.fromkeys(kind.core, 4.0)}


def _contents(rng: random.Random, scene_type: str, broken: bool, look: Look) -> list[str]:
    kind, n = SCENE_TYPES[scene_type], rng.choices(look.counts, (25, 25, 20, 15, 15))[0]
    if broken:
        names = _draw(rng, dict.fromkeys(kind.core, 1.0), 1) if rng.random() < 0.5 else []
        names += _draw(rng, dict.fromkeys(kind.rest, 1.0), n // 2 - len(names))
        other = SCENE_TYPES[rng.choice([t for t in SCENE_TYPES if t != scene_type])]
        foreign = {c: w for c, w in _prior(other).items() if c not in kind.typical}
        names += _draw(rng, foreign, n - len(names) - 1)
        names += _draw(rng, {c: 1.0 for c in CATEGORIES if c not in (*kind.typical, *names)}, n - len(names))
        return names
    names = _draw(rng, _prior(kind), n)
    names += rng.choices(names, k=n - len(names)) if len(names) < n else []  # crowded: more than a place has kinds of
    for i in range(n):
        chance = rng.random()
        if chance < 0.08:
            names[i] = rng.choice(CATEGORIES)
        elif chance < 0.2:
            names[i] = rng.choice(names)
    return names


# --- how it is drawn -----------------------------------------------------------------------------------------------


@cache
def _background(scene_type: str, variant: int, side: int = SIZE) -> Image.Image:
    """Paint one of 32 backgrounds of a scene type: two coloured areas, a texture, varied hue and brightness."""
    rng = np.random.default_rng([sorted(SCENE_TYPES).index(scene_type), variant])
    kind = SCENE_TYPES[scene_type]
    horizon = int(rng.integers(40, 76)) * side // SIZE
    img = np.empty((side, side, 3))
    img[:horizon] = np.array(kind.sky) + rng.normal(0, 9, 3)
    img[horizon:] = np.array(kind.ground) + rng.normal(0, 9, 3)
    y, x = np.mgrid[:side, :side]
    step, phase = int(rng.integers(10, 22)) * side // SIZE, int(rng.integers(0, 20))
    if kind.texture == "tiles":
        lines = ((x + phase) % step < 1) | ((y + phase) % step < 1)
    elif kind.texture == "planks":
        lines = ((y + phase) % step < 2) & (y > horizon)
    elif kind.texture == "stripes":
        lines = ((x + y // 2 + phase) % (2 * step) < 4) & (y > horizon)
    else:
        lines = np.zeros((side, side), bool)
    img[lines] -= 18
    img += np.linspace(8, -8, side)[:, None, None] + rng.normal(0, 7 if kind.texture == "noise" else 3, (side, side, 1))
    return Image.fromarray((img * rng.uniform(0.88, 1.06)).clip(0, 255).astype(np.uint8))


@cache
def _sprite(style: str, name: str, i: int, size: int, flip: bool) -> tuple[Image.Image, np.ndarray]:
    img = sprites.load(style)[name][i].resize((size, size), Image.Resampling.BILINEAR)
    img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else img
    return img, np.asarray(img.getchannel("A")) > 96


def _place(
    rng: random.Random, boxes: list[tuple[int, int, int]], size: int, side: int = SIZE, least: int = 20
) -> tuple[int, int, int]:
    """Place a square (x, y, size) that hardly overlaps the others, smaller (down to `least`) if there is no room."""
    while True:
        for _ in range(12):
            x, y = rng.randint(0, side - size), rng.randint(0, side - size)
            allowed = 0.12 * size
            if all(
                min(x + size, bx + b) - max(x, bx) < allowed or min(y + size, by + b) - max(y, by) < allowed
                for bx, by, b in boxes
            ):
                return x, y, size
        size = max(size - 4, least)
        if size == least and rng.random() < 0.3:
            return x, y, size


def _scene(split: str, seed: int, index: int, look: Look) -> Scene:
    rng = random.Random(f"picto/{split}/{seed}/{index}")
    scene_type = rng.choice(list(SCENE_TYPES))
    names = _contents(rng, scene_type, split == "shift", look)
    half, spread = look.sizes
    sizes = sorted((2 * round(half * spread ** rng.random()) for _ in names), reverse=True)  # 22 to 52 pixels
    rng.shuffle(names)
    side, least = look.side, look.scaled(look.least)
    image = _background(scene_type, rng.randrange(32), side).copy()
    masks = np.full((side, side), 255, np.uint8)
    boxes: list[tuple[int, int, int]] = []
    for i, (name, wanted) in enumerate(zip(names, sizes, strict=True)):
        style = sprites.HELD_OUT_STYLE if split == "style" else rng.choice(sprites.STYLES[:2])
        x, y, size = _place(rng, boxes, look.scaled(wanted), side, least)
        which, flip = rng.randrange(len(sprites.EMOJI[name].split())), rng.random() < 0.5
        picture, shape = _sprite(style, name, which, size, flip)
        image.paste(picture, (x, y), picture)
        masks[y : y + size, x : x + size][shape] = i
        boxes.append((x, y, size))
    light = rng.uniform(0.82, 1.12)
    image = image.point([min(255, round(light * v)) for v in range(256)] * 3)
    objects = [(name, _bbox(masks == i)) for i, name in enumerate(names)]
    captions = [caption(rng, scene_type, objects) for _ in range(5)]
    name = f"picto_{split}{look}_{seed}_{index:06d}.png"
    return Scene(image, index + 1, name, scene_type, objects, captions, masks)


def _bbox(mask: np.ndarray) -> list[int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):  # completely hidden: never observed with the overlap that _place allows
        return [0, 0, 0, 0]
    return [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]


# --- what is said about it -----------------------------------------------------------------------------------------

# fmt: off
_SAID_AS = {"bicycle": ("bicycle", "bike"), "airplane": ("airplane", "plane"), "couch": ("couch", "sofa"),
            "cell phone": ("cell phone", "phone"), "sports ball": ("ball",)}
_PLURAL = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice", "broccoli": "pieces of broccoli",
           "skis": "pairs of skis", "scissors": "pairs of scissors"}
_SINGULAR = {"broccoli": "some broccoli", "skis": "a pair of skis", "scissors": "a pair of scissors"}
_ON = ("street", "beach", "farm", "mountain", "sports field")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_FIRST = ("{scene} with {items}.", "The image shows {scene} with {items}.", "The image features {items} {place}.",
          "This is {scene} with {items}.")
_NEXT = ("There {be} also {items}.", "Nearby there {be} {items}.", "The image also shows {items}.",
         "In the background there {be} {items}.")
_LAST = ("In the corner there {be} {items}.", "You can also see {items}.", "Finally, there {be} {items}.",
         "There {be} also {items} to the side.")
# fmt: on


def with_article(noun: str) -> str:
    """cup -> a cup, apple -> an apple."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(name: str, count: int, word: str = "") -> str:
    """dog, 2 -> two dogs; cup, 1 -> one cup. `word`: another word for the category."""
    if count == 1:
        return f"one {_SINGULAR.get(name, f'a {word or name}').split(' ', 1)[1]}"
    return f"{_NUMBERS[count]} {_PLURAL.get(name) or plural(word or name)}"


def plural(noun: str) -> str:
    """bus -> buses, cup -> cups."""
    return noun + ("es" if noun.endswith(("s", "ch", "sh")) else "s")


def _phrase(rng: random.Random, name: str, count: int) -> str:
    words = _SAID_AS.get(name, (name,))
    word = words[0] if len(words) == 1 or rng.random() < 0.75 else words[1]
    return _SINGULAR.get(name, with_article(word)) if count == 1 else counted(name, count, word)


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def caption(
    rng: random.Random, scene_type: str, objects: Sequence[tuple[str, Sequence[int]]], imagined: Sequence[str] = ()
) -> str:
    """Write a caption of two to four sentences: large objects first, then ``imagined`` ones (absent; training only)."""
    counts = Counter(name for name, _ in objects)
    area = {name: max(b[2] * b[3] for n, b in objects if n == name) for name in counts}
    order = sorted(counts, key=lambda name: -area[name] * rng.uniform(0.6, 1.6))
    if len(order) > 3 and rng.random() < 0.15:
        order.pop()
    items = [(name, counts[name]) for name in order]
    for name in imagined:
        items.insert(len(items) if rng.random() < 0.8 else rng.randint(1, len(items)), (name, 1))
    parts = [items[: (k := max(1, min(rng.choice((2, 2, 3)), len(items) - 1)))]]
    while rest := items[k:]:
        parts.append(rest[: (step := 1 if len(rest) <= 2 else 2)])
        k += step
    sentences = []
    for i, part in enumerate(parts):
        form = rng.choice(_FIRST if i == 0 else _LAST if i == len(parts) - 1 and i > 1 else _NEXT)
        said = _join([_phrase(rng, name, count) for name, count in part])
        here = with_article(scene_type)
        place = f"{'on' if scene_type in _ON else 'in'} {here}"
        text = form.format(scene=here, place=place, items=said, be="is" if part[0][1] == 1 else "are")
        sentences.append(text[0].upper() + text[1:])
    return " ".join(sentences)


def imagine(rng: random.Random, scene_type: str, present: set[str]) -> list[str]:
    """Draw absent objects for a training caption to mention, as the scene's prior expects them.

    The fewer kinds of objects a scene has, the likelier, like annotators who pad a short list. About four in ten training
    captions are wrong in this way.
    """
    kinds = len(present)
    if rng.random() >= {1: 0.7, 2: 0.7, 3: 0.7, 4: 0.5, 5: 0.25}.get(kinds, 0.05):
        return []
    absent = {c: w**1.5 for c, w in _prior(SCENE_TYPES[scene_type]).items() if c not in present}
    return _draw(rng, absent, 2 if kinds <= 4 and rng.random() < 0.15 else 1)


# --- the split as a whole ------------------------------------------------------------------------------------------


def scene(split: str, seed: int, index: int) -> Scene:
    """Draw scene number ``index`` of a split, such as "test" or "shift+crowded"; the same arguments give the same scene."""
    name, look = looks.read(split)
    if name not in SPLITS:
        raise VlmFixError(f"unknown Picto split {name!r}: choose one of {', '.join(SPLITS)}")
    return _scene(name, seed, index, look)


def scenes(split: str = "test", n: int = 500, seed: int = 0) -> list[Scene]:
    """Draw the first n scenes of a split."""
    if n < 1:
        raise VlmFixError(f"the number of Picto scenes must be at least 1, not {n}")
    return [scene(split, seed, i) for i in range(n)]


def _outline(mask: np.ndarray) -> list[float]:
    """Return the polygon through the left and right end of every row of a mask."""
    rows = np.flatnonzero(mask.any(1))
    left = [(float(mask[y].argmax()), float(y)) for y in rows]
    right = [(float(mask.shape[1] - mask[y, ::-1].argmax()), float(y)) for y in rows]
    (x0, _), (x1, y1) = left[-1], right[-1]
    points = [*left, (x0, y1 + 1), (x1, y1 + 1), *reversed(right)]
    return [v for point in points for v in point]


def coco_annotations(scenes: Sequence[Scene]) -> tuple[dict, dict]:
    """Return (instances, captions), the dictionaries of COCO's annotation files."""
    images = [
        {"id": s.image_id, "file_name": s.file_name, "width": s.image.width, "height": s.image.height} for s in scenes
    ]
    categories = [{"id": COCO_IDS[name], "name": name, "supercategory": "picto"} for name in CATEGORIES]
    instances: list[dict] = []
    captions: list[dict] = []
    for s in scenes:
        for i, (name, bbox) in enumerate(s.objects):
            if mask_area := int((mask := s.masks == i).sum()):
                instances.append(
                    {
                        "id": len(instances) + 1,
                        "image_id": s.image_id,
                        "category_id": COCO_IDS[name],
                        "bbox": bbox,
                        "area": mask_area,
                        "iscrowd": 0,
                        "segmentation": [_outline(mask)],
                    }
                )
        for text in s.captions:
            captions.append({"id": len(captions) + 1, "image_id": s.image_id, "caption": text})
    return (
        {"images": images, "annotations": instances, "categories": categories},
        {"images": images, "annotations": captions},
    )


def render(out: str | Path, scenes: int = 500, split: str = "test", seed: int = 0) -> Path:
    """Write a split as a COCO-format folder: images/*.png, instances_<split>.json, captions_<split>.json.

    The ``info`` of both files holds split, seed and a SHA-256 over pixels and annotations. Returns the folder.
    """
    drawn = globals()["scenes"](split, scenes, seed)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise VlmFixError(f"{out} is a file; give a folder to write the Picto scenes to")
    (out / "images").mkdir(parents=True, exist_ok=True)
    parts = coco_annotations(drawn)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for s in drawn:
        s.image.save(out / "images" / s.file_name)
        digest.update(s.image.tobytes())
    info = {"description": f"Picto {split}", "split": split, "seed": seed, "scenes": scenes}
    info["sha256"] = digest.hexdigest()
    for name, part in zip(("instances", "captions"), parts, strict=True):
        write_atomic(out / f"{name}_{split}.json", json.dumps({"info": info, **part}))
    return out
