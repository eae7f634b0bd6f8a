"""A referring task: which of two objects is in this box? Both are in the scene, so only what is pointed at can tell.

Each question names two kinds of object of which the scene shows one each, and a box around one of them. The model is asked
after both, "Is there a cup in the image?", and the kind whose log-odds of yes to no are higher is its choice. Every pair is
asked both ways, with the box around the one and around the other: a model that does not see the box chooses the same both
times and is right in exactly half of the questions. Picto's models know yes/no questions and captions: they can refer in this
form.

The scorer is a comparison of two numbers; intervals are paired bootstraps over scenes (`eval.stats`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from PIL import Image

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import stats
from vlm_fix.eval.prompts import encode

from . import world

MARGIN = 0.1  #: of a box, added to each of its sides by the crop
EACH = 1  #: pairs of one scene


class Pointed(NamedTuple):
    """A question: the scene's number, its image, the box as shares of it, what is in the box, and the other kind."""

    scene: int
    image: Image.Image
    box: tuple[float, ...]
    inside: str
    other: str


def questions(count: int, split: str = "test", seed: int = 0) -> list[Pointed]:
    """The questions about `count` scenes that show two kinds of object of which there is one each."""
    found, index = list[Pointed](), 0
    scenes = 0
    while scenes < count and index < 20 * count + 100:
        scene = world.scene(split, seed, index)
        index += 1
        names = Counter(name for name, _ in scene.objects)
        only = {name: box for name, box in scene.objects if names[name] == 1}
        pairs = list(combinations(sorted(only), 2))
        if not pairs:
            continue
        scenes += 1
        for pair in random.Random(f"refer/{scene.file_name}").sample(pairs, min(EACH, len(pairs))):
            for inside, other in (pair, pair[::-1]):
                x, y, w, h = only[inside]
                width, height = scene.image.size
                box = (x / width, y / height, (x + w) / width, (y + h) / height)
                found.append(Pointed(scenes, scene.image, box, inside, other))
    if scenes < count:
        raise VlmFixError(f"only {scenes} of {index} scenes show two kinds of object once each: ask for fewer.")
    return found


def cropped(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The box with a margin, as an image of the whole one's size."""
    width, height = image.size
    dx, dy = MARGIN * (box[2] - box[0]), MARGIN * (box[3] - box[1])
    left, top, right, bottom = max(0, box[0] - dx), max(0, box[1] - dy), min(1, box[2] + dx), min(1, box[3] + dy)
    cut = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    return cut.resize(image.size, Image.Resampling.BICUBIC)


class Asker:
    """Asks a model yes/no questions; answers are log-odds of yes to no at the first token."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.yes, self.no = (
            sorted(
                {
                    processor.tokenizer(form, add_special_tokens=False)["input_ids"][0]
                    for form in (w, w.lower(), f" {w}", f" {w.lower()}")
                }
            )
            for w in ("Yes", "No")
        )
        self.both = sorted({*self.yes} & {*self.no})

    def odds(self, image: Image.Image, names: Sequence[str]) -> list[float]:
        """Of "Is there a NAME in the image?" for each name."""
        asked = [f"Is there {world.with_article(name)} in the image?" for name in names]
        inputs = encode(self.model, self.processor, [image] * len(asked), asked)
        out = self.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        p = out.scores[0].float().log_softmax(dim=-1)
        yes, no = (p[:, [t for t in side if t not in self.both]].logsumexp(dim=-1) for side in (self.yes, self.no))
        return (yes - no).nan_to_num(nan=0.0).clamp(-50, 50).tolist()  # a contrast may have cut both off


def measure(
    model: Any, processor: Any, asked: Sequence[Pointed], specs: Sequence[str], tick: Callable[[], Any] = lambda: None
) -> dict[str, list[dict[str, Any]]]:
    """Way -> a row a question {"image": scene, "right": 0 or 1}: "none", "crop", and each spec with the question's box."""
    asker, rows = Asker(model, processor), dict[str, list[dict[str, Any]]]()
    for q in asked:
        names, box = (q.inside, q.other), "|".join(f"{share:.4f}" for share in q.box)
        for way in ("none", "crop", *specs):
            if way in ("none", "crop"):
                inside, other = asker.odds(q.image if way == "none" else cropped(q.image, q.box), names)
            else:
                with vlm_fix.wrapped(model, f"{way}{',' if ':' in way else ':'}box={box}"):
                    inside, other = asker.odds(q.image, names)
            right = 1.0 if inside > other else 0.5 if inside == other else 0.0
            rows.setdefault(way, []).append({"image": q.scene, "right": right, "asked": 1.0})
            tick()
    return rows


def accuracies(rows: dict[str, list[dict[str, Any]]], seed: int = 0) -> list[dict[str, Any]]:
    """Per way: accuracy, its difference from "none" and from "crop", each with a 95 % interval over scenes."""
    metric = {"accuracy": lambda sums: stats.ratio(sums["right"], sums["asked"])}
    made = []
    for way, own in rows.items():
        row: dict[str, Any] = {"way": way, "n": len(own), "accuracy": sum(r["right"] for r in own) / len(own)}
        for base in ("none", "crop"):
            found = stats.paired_bootstrap(metric, rows[base], own, seed=seed)["accuracy"]
            row[base] = {"delta": found.delta, "low": found.low, "high": found.high}
        made.append(row)
    return made
