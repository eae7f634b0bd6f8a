"""CHAIR: which objects does a caption mention that are not in the image?

Source: A. Rohrbach et al., Object Hallucination in Image Captioning, EMNLP 2018, arXiv:1809.02156. There are two
variants with their own ground truth, whose numbers are not comparable: `nltk` (shikiw/OPERA@61426ef chair.py, the
default) and `pattern` (LisaAnne/Hallucination@6e4d33c utils/chair.py). `words.py` says how they read a caption, `data.py`
where captions and ground truth come from.

Every word that names one of COCO's 80 objects is a mention. It is hallucinated if the object is not in the image's ground
truth: its instance categories and what its five reference captions mention.

    chair_s (C_S) = captions with a hallucinated mention / captions
    chair_i (C_I) = hallucinated mentions / mentions
    recall        = objects found / ground-truth objects
    precision     = objects found / objects mentioned, each once per caption
    length        = mean number of tokens after merging (the scripts print it x 0.01)

Worked example, ground truth {dog, sports ball}: "A dog and two cats." mentions dog and cat, and cat is hallucinated:
chair_s = 1, chair_i = 1/2, recall = 1/2, precision = 1/2, length = 6.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.choices import Variant
from vlm_fix.eval.stats import Metric, column_sums, harmonic, ratio

from .words import Object, find_objects

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
    """One caption: the mentioned objects that are in the image, those that are not, and its number of merged tokens."""

    image_id: int
    caption: str
    correct: list[Object]
    hallucinated: list[Object]
    tokens: int


@dataclass(frozen=True)
class ChairResult:
    """Fractions of 1 (length: tokens). `captions` and `rows` (counts for paired_bootstrap) are in input order."""

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
        """Return what results.json holds: everything but the per-caption lists."""
        return {"variant": self.variant, "n": self.n} | {name: getattr(self, name) for name in METRICS}


def score(captions: Iterable[Caption], truth: GroundTruth, variant: Variant = "nltk") -> ChairResult:
    """Score `captions`, also several of one image. Raises VlmFixError for an image without ground truth."""
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
    """Return the rows of both runs with each pair of captions cut to the number of words of the shorter one.

    Longer captions name more objects, wrong ones too, so C_S and C_I grow with length. With w_i the words of caption i in
    either run and t_i = min(w_i of base, w_i of method), a mention counts if it begins within the first t_i words:

        C_I at equal length = hallucinated mentions within t_i / mentions within t_i, summed over captions

    and likewise C_S and recall. Both runs need captions of the same images in the same order. Source: this project.
    """
    if [c.image_id for c in base.captions] != [c.image_id for c in method.captions]:
        raise VlmFixError("Captions of different images cannot be cut to equal length: run both on the same images.")
    both = zip(base.captions, method.captions, strict=True)
    shortest = [min(len(caption.caption.split()) for caption in pair) for pair in both]
    return _cut(base, shortest), _cut(method, shortest)


def at_share(result: ChairResult, share: float) -> list[dict[str, Any]]:
    """Return the rows with each caption cut to the first `share` (0 to 1) of its words, rounded up."""
    return _cut(result, [math.ceil(share * len(scored.caption.split())) for scored in result.captions])


def _cut(result: ChairResult, words: Iterable[int]) -> list[dict[str, Any]]:
    """Return the rows with each caption cut to that many words: a mention counts if it begins within them."""
    rows = []
    for scored, row, kept in zip(result.captions, result.rows, words, strict=True):
        right, wrong = (
            [item for item in items if len(scored.caption[: item.start + 1].split()) <= kept]
            for items in (scored.correct, scored.hallucinated)
        )
        found = {item.node for item in right}
        rows.append(
            {
                **row,
                "hallucinating": int(bool(wrong)),
                "hallucinated": len(wrong),
                "mentions": len(right) + len(wrong),
                "found": len(found),
                "objects": len(found | {item.node for item in wrong}),
            }
        )
    return rows
