"""CHAIR: which objects does a caption mention that are not in the image?

Source: A. Rohrbach et al., Object Hallucination in Image Captioning, EMNLP 2018, arXiv:1809.02156. There are
two scorers whose numbers do not compare, each with its own truth: `nltk` (shikiw/OPERA@61426ef chair.py, the default)
and `pattern` (LisaAnne/Hallucination@6e4d33c utils/chair.py); `words.py` tells how they read a caption.

Every word that names one of COCO's 80 objects is a mention. An object outside the image's ground truth, that is its
instance categories and what its five reference captions mention, is hallucinated.

    chair_s (C_S) = captions with a hallucinated mention / captions
    chair_i (C_I) = hallucinated mentions / mentions
    recall        = objects found / ground-truth objects
    precision     = objects found / objects mentioned, each once per caption
    length        = mean number of tokens after merging (the scripts print it x 0.01)

Worked example, ground truth {dog, sports ball}: "A dog and two cats." mentions dog and cat, and cat is hallucinated:
chair_s = 1, chair_i = 1/2, recall = 1/2, precision = 1/2, length = 6.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError

from .rows import DATA, one_of, read_rows, read_text
from .stats import Metric, column_sums, harmonic, ratio
from .words import Object, Variant, caption_to_words, find_objects, nltk_ready, nodes

__all__ = [
    "METRICS",
    "Caption",
    "CaptionScore",
    "ChairResult",
    "GroundTruth",
    "Variant",
    "at_equal_length",
    "build_ground_truth",
    "caption_to_words",
    "ground_truth",
    "load_captions",
    "nltk_ready",
    "score",
    "whole_sentences",
]

GroundTruth = Mapping[int, Collection[str]]
"""Image id -> the objects in it (COCO names)."""

METRICS: dict[str, Metric] = {
    "chair_s": lambda s: ratio(s["hallucinating"], s["n"]),
    "chair_i": lambda s: ratio(s["hallucinated"], s["mentions"]),
    "recall": lambda s: ratio(s["found"], s["truth"]),
    "precision": lambda s: ratio(s["found"], s["objects"]),
    "f1": lambda s: harmonic(METRICS["precision"](s), METRICS["recall"](s)),
    "length": lambda s: ratio(s["tokens"], s["n"]),
}


class Caption(NamedTuple):
    """A generated caption."""

    image_id: int
    text: str


@dataclass(frozen=True)
class CaptionScore:
    """One caption: the objects it mentions that are in the image and those that are not, and its merged tokens."""

    image_id: int
    caption: str
    correct: list[Object]
    hallucinated: list[Object]
    tokens: int


@dataclass(frozen=True)
class ChairResult:
    """Fractions of 1 (length: tokens). `captions` and `rows` follow the input; rows are counts for paired_bootstrap."""

    variant: str
    n: int
    chair_s: float
    chair_i: float
    recall: float
    precision: float
    f1: float
    length: float
    captions: list[CaptionScore] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For results.json: everything but the per-caption lists."""
        return {"variant": self.variant, "n": self.n} | {name: getattr(self, name) for name in METRICS}


def score(captions: Iterable[Caption], truth: GroundTruth, variant: Variant = "nltk") -> ChairResult:
    """CHAIR of `captions`; each counts, also two of one image. Raises VlmFixError for an image without ground truth."""
    captions = list(captions)
    if not captions:
        raise VlmFixError("There are no captions to score.")
    unknown = [caption.image_id for caption in captions if caption.image_id not in truth]
    if unknown:
        raise VlmFixError(
            f"{len(unknown)} of {len(captions)} captions are of images without ground truth (the first is image "
            f"{unknown[0]}); give the ground truth of the data set they come from."
        )
    scored, rows = [], []
    for image_id, text in captions:
        length, objects = find_objects(text, variant)
        correct = [item for item in objects if item.node in truth[image_id]]
        wrong = [item for item in objects if item.node not in truth[image_id]]
        scored.append(CaptionScore(image_id, text, correct, wrong, length))
        rows.append(
            {
                "image": image_id,
                "n": 1,
                "hallucinating": int(bool(wrong)),
                "hallucinated": len(wrong),
                "mentions": len(objects),
                "found": len({item.node for item in correct}),
                "objects": len({item.node for item in objects}),
                "truth": len(set(truth[image_id])),
                "tokens": length,
            }
        )
    sums = column_sums(rows, [name for name in rows[0] if name != "image"])
    figures = {name: float(metric(sums)) for name, metric in METRICS.items()}
    return ChairResult(variant, len(rows), **figures, captions=scored, rows=rows)


def at_equal_length(base: ChairResult, method: ChairResult) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of both runs with every pair of captions of one image cut to the words of the shorter one.

    A longer caption names more objects, wrong ones too, so C_S and C_I grow with length. With w_i the words of caption i
    in either run and t_i = min(w_i of base, w_i of method), a mention counts if it begins within the first t_i words:

        C_I at equal length = hallucinated mentions within t_i / mentions within t_i, summed over captions

    and likewise C_S and recall. Both runs need the same captions in the same order. Source: of this project.
    """
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    if [c.image_id for c in base.captions] != [c.image_id for c in method.captions]:
        raise VlmFixError("Captions of different images cannot be cut to equal length: run both on the same images.")
    for pair in zip(
        zip(base.captions, base.rows, strict=True), zip(method.captions, method.rows, strict=True), strict=True
    ):
        shortest = min(len(scored.caption.split()) for scored, _ in pair)
        for side, (scored, row) in zip(sides, pair, strict=True):
            right, wrong = (
                [item for item in items if len(scored.caption[: item.start + 1].split()) <= shortest]
                for items in (scored.correct, scored.hallucinated)
            )
            found = {item.node for item in right}
            side.append(
                {
                    **row,
                    "hallucinating": int(bool(wrong)),
                    "hallucinated": len(wrong),
                    "mentions": len(right) + len(wrong),
                    "found": len(found),
                    "objects": len(found | {item.node for item in wrong}),
                }
            )
    return sides


def whole_sentences(text: str) -> str:
    """The caption up to its last full stop, question or exclamation mark, for captions cut at a number of tokens.

    A caption without any stays as it is: a description that names objects is not made to say nothing.

    >>> whole_sentences("A dog on a sofa. It looks at a ca")
    'A dog on a sofa.'
    """
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$|[\"')])", text)]
    return text[: ends[-1]] if ends else text


def load_captions(path: str | Path) -> list[Caption]:
    """Captions from JSON lines or a JSON array with image_id (a number or a name such as COCO_val2014_000000000123.jpg)
    and caption (or text, or answer). Warns of images that come twice; raises VlmFixError naming a bad row."""
    captions = []
    for number, row in enumerate(read_rows(path, "caption file"), 1):
        text = next((row[key] for key in ("caption", "text", "answer") if key in row), None)
        digits = re.search(r"(\d+)(\.\w+)?$", str(row.get("image_id", row.get("image", ""))))
        if not isinstance(text, str) or not digits:
            what = '"image_id" with a number' if isinstance(text, str) else '"caption" with a text'
            raise VlmFixError(f"{path}, row {number}: no {what} (its keys are {', '.join(row)}); add it.")
        captions.append(Caption(int(digits[1]), text))
    twice = [image for image, times in Counter(caption.image_id for caption in captions).items() if times > 1]
    if twice:
        text = f"{path} has several captions of {len(twice)} images, the first is {twice[0]}; each of them counts."
        warnings.warn(text, stacklevel=2)
    return captions


def ground_truth(source: str | Path = "coco", variant: Variant = "nltk") -> dict[int, frozenset[str]]:
    """The map in the package ("coco": the 123,287 images of train and val 2014, those of 2017 among them), or that of a
    JSON file {"image id": ["object", ...]}, gzip or not."""
    one_of(variant, Variant, "variant")
    path = DATA / f"chair/gt_objects_{variant}_trainval2014.json.gz" if source == "coco" else source
    try:
        return {int(image): frozenset(nodes) for image, nodes in json.loads(read_text(path, "ground truth")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, VlmFixError):
            raise
        raise VlmFixError(f'The ground truth {path} is not of the form {{"image id": ["object", ...]}}.') from None


def build_ground_truth(instances: Any, captions: Any, variant: Variant = "nltk") -> dict[int, frozenset[str]]:
    """The same map from COCO-format instances and captions (dictionaries or pycocotools COCO objects).

    Raises VlmFixError for a category that is not one of COCO's 80 or a word of the synonym list, which no caption could
    be matched with.
    """
    boxes, references = (getattr(data, "dataset", data) for data in (instances, captions))
    strange = [category["name"] for category in boxes["categories"] if category["name"] not in nodes()]
    if strange:
        raise VlmFixError(
            f"CHAIR knows COCO's 80 objects and their synonyms, not the category {strange[0]!r}; rename it."
        )
    node = {category["id"]: nodes()[category["name"]] for category in boxes["categories"]}
    truth: dict[int, set[str]] = {image["id"]: set() for image in [*boxes["images"], *references["images"]]}
    for annotation in boxes["annotations"]:
        truth[annotation["image_id"]].add(node[annotation["category_id"]])
    for annotation in references["annotations"]:
        truth[annotation["image_id"]].update(caption_to_words(annotation["caption"], variant).node_words)
    return {image: frozenset(nodes) for image, nodes in truth.items()}
