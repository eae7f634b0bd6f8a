"""Yes/no questions about number, place and size in a Picto scene, with answers from its truth: AMBER's other dimensions.

    attribute  "Are there two dogs in the image?", "Is the cup in the left half of the image?"
    relation   "Is the cup larger than the dog?", "Is the cup to the left of the dog?"

A fair coin decides for each whether it asks for what is so or for the opposite (a number: one more or one less), so half of
the labels are yes. Questions about one object are about the only one of its kind; what lies within an eighth of the middle,
or whose box is less than one and a half times as large, is not asked about. The same scene always gives the same questions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from . import world

CLEAR = 1 / 8  #: of the side: how far from the middle, or from each other, centres must be
LARGER = 1.5  #: times the area
EACH = 2  #: questions of a form in a scene, at most


class Asked(NamedTuple):
    """A question: AMBER's dimension (attribute or relation), the text, and "yes" or "no"."""

    kind: str
    text: str
    label: str


def about(scene: world.Scene) -> list[Asked]:
    """Return the questions about a scene: at most two each of number, place, size and direction."""
    rng = random.Random(f"questions/{scene.file_name}")
    counts = Counter(name for name, _ in scene.objects)
    side = scene.image.width
    only = {name: box for name, box in scene.objects if counts[name] == 1}
    centres = {name: (x + w / 2, y + h / 2) for name, (x, y, w, h) in only.items()}
    pairs = [tuple(rng.sample(pair, 2)) for pair in combinations(sorted(only), 2)]
    forms: list[list[tuple[str, str, str]]] = [  # (what is so, the opposite, kind)
        [_number(rng, name, count) for name, count in sorted(counts.items())],
        [place for name in sorted(only) for place in _places(name, *centres[name], side)],
        [size for a, b in pairs for size in _sizes(a, b, only[a], only[b])],
        [where for a, b in pairs for where in _directions(a, b, centres[a], centres[b], side)],
    ]
    asked = []
    for form in forms:
        for true, false, kind in rng.sample(form, min(EACH, len(form))):
            yes = rng.random() < 0.5
            asked.append(Asked(kind, true if yes else false, "yes" if yes else "no"))
    return asked


def _is(name: str) -> str:
    return f"{'Are' if name in ('skis', 'scissors') else 'Is'} the {name}"


def _number(rng: random.Random, name: str, count: int) -> tuple[str, str, str]:
    other = rng.choice([n for n in (count - 1, count + 1) if 0 < n <= 12])
    so, opposite = (
        f"{'Is there only' if n == 1 else 'Are there'} {world.counted(name, n)} in the image?" for n in (count, other)
    )
    return so, opposite, "attribute"


def _places(name: str, x: float, y: float, side: int) -> Iterator[tuple[str, str, str]]:
    for at, low, high in ((x, "left", "right"), (y, "upper", "lower")):
        if abs(at - side / 2) >= CLEAR * side:
            halves = (low, high) if at < side / 2 else (high, low)
            so, opposite = (f"{_is(name)} in the {half} half of the image?" for half in halves)
            yield so, opposite, "attribute"


def _sizes(a: str, b: str, box_a: list[int], box_b: list[int]) -> Iterator[tuple[str, str, str]]:
    first, second = box_a[2] * box_a[3], box_b[2] * box_b[3]
    if max(first, second) >= LARGER * min(first, second):
        words = ("larger", "smaller") if first > second else ("smaller", "larger")
        so, opposite = (f"{_is(a)} {word} than the {b}?" for word in words)
        yield so, opposite, "relation"


def _directions(
    a: str, b: str, at_a: tuple[float, float], at_b: tuple[float, float], side: int
) -> Iterator[tuple[str, str, str]]:
    if abs(at_a[0] - at_b[0]) >= CLEAR * side:
        words = ("left", "right") if at_a[0] < at_b[0] else ("right", "left")
        so, opposite = (f"{_is(a)} to the {word} of the {b}?" for word in words)
        yield so, opposite, "relation"
