"""OPOPE: POPE's questions answered by captions, so that models which only describe can be compared.

Source: Z. Chen et al., HALC: Object Hallucination Reduction via Adaptive Focal-Contrast Decoding, ICML 2024,
arXiv:2403.00425; official scorer BillChan226/HALC@5feca62 eval/opope_eval.py. The answer to a question is yes if the
caption of its image mentions the object.

    accuracy, precision, recall as for POPE       f1 = F with beta 1       f_beta = F with beta 0.2, which weighs precision:
    F = (1 + beta^2) precision recall / (beta^2 precision + recall), since a caption need not name all that is there

    scorer     the caption mentions the object if
    official   one of the object's words is in it, also within a word ("car" in "carrot", "dining" for "dining table")
    ours       CHAIR finds the object in it, by its synonyms and in the plural (--variant as for CHAIR)

Questions about images without a caption are left out, with a warning, as the script makes questions of captioned images.

Worked example:
>>> question = Question(1, "COCO_val2014_000000000001.jpg", "Is there a car in the image?", "no")
>>> [mentions("Carrots and a scarf.", object_of(question), scorer, "pattern") for scorer in ("official", "ours")]
[True, False]
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.stats import Metric, ratio

from .answers import Keys
from .benchmark import KEYS, YES_NO_COLUMNS, Argument, Benchmark, Layout, YesNo, plain_caption, variant_option
from .chair.data import load_captions
from .chair.words import caption_to_words, nodes
from .choices import Variant
from .pope.data import load_questions
from .pope.score import Question
from .replies import METRICS as YES_NO
from .replies import counts
from .result import Result, tally

SOURCE = "BillChan226/HALC@5feca62"
BETA = 0.2
METRICS: dict[str, Metric] = {
    **YES_NO,
    "f_beta": lambda s: _f_beta(YES_NO["precision"](s), YES_NO["recall"](s)),
}
SCORERS = ("official", "ours")


def _f_beta(precision: Any, recall: Any) -> Any:
    return ratio((1 + BETA**2) * precision * recall, BETA**2 * precision + recall)


def object_of(question: Question) -> str:
    """Return the object that POPE's question is about; a question that is only an object, as HALC writes them, is itself."""
    match = re.fullmatch(r"Is there (?:an?|the) (.+?) in the im(?:age|ange)\?.*", question.text.strip())
    if not match and "?" in question.text:
        raise VlmFixError(f"No object can be read from the question {question.text!r}: OPOPE takes POPE's questions.")
    return match[1] if match else question.text.strip()


def mentions(caption: str, name: str, scorer: str, variant: Variant) -> bool:
    """Return whether the caption mentions the object, as `scorer` reads it."""
    if scorer == "official":
        return any(word in caption for word in name.split(" "))
    if name not in nodes():
        raise VlmFixError(f"CHAIR does not know the object {name!r}: --scorer official reads it by its letters.")
    return nodes()[name] in _found(caption, variant)


@functools.lru_cache(maxsize=16)
def _found(caption: str, variant: Variant) -> frozenset[str]:
    """The objects of a caption, kept for the next questions about it."""
    return frozenset(caption_to_words(caption, variant).node_words)


def score(
    captions: Mapping[int, str], questions: Sequence[Question], scorer: str = "official", variant: Variant = "nltk"
) -> Result:
    """Score captions by image id against questions about these images."""
    rows = []
    for question in questions:
        said = mentions(captions[image_id(question)], object_of(question), scorer, variant)
        rows.append(counts(question.image, question.label, "yes" if said else "no"))
    return tally(scorer, rows, METRICS, asked=[question.text for question in questions])


def image_id(question: Question) -> int:
    """Return the number of a COCO image."""
    match = re.search(r"(\d{12})(?:\.\w+)?$", question.image)
    if not match:
        raise VlmFixError(f"{question.image} is no COCO name with 12 digits: OPOPE needs the ids of the images.")
    return int(match[1])


def results(
    questions: str,
    captions: str,
    scorer: str = "official",
    variant: Variant | None = None,
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Callable[[str], Any] = str,
) -> dict[str, dict[str, Result]]:
    """Score a caption file against a POPE question file."""
    if variant and scorer == "official":
        raise VlmFixError("--variant has no effect with --scorer official, which reads letters: give --scorer ours.")
    found = load_captions(captions, Keys(answer_key, id_key), tell)
    texts = {caption.image_id: caption.text for caption in found}
    if len(texts) < len(found):
        raise VlmFixError(f"{captions} has several captions of an image: OPOPE takes one of each.")
    every = load_questions(questions)
    asked = [question for question in every if image_id(question) in texts]
    if not asked:
        raise VlmFixError(f"{captions} describes none of the images that {questions} asks about.")
    if len(asked) < len(every):
        warnings.warn(
            f"{len(every) - len(asked)} of {len(every)} questions are about images that {captions} does not describe: left out.",
            stacklevel=2,
        )
    return {"opope": {"questions": score(texts, asked, scorer, variant or "nltk")}}


BENCHMARK = Benchmark(
    name="opope",
    title="OPOPE",
    source_commit=SOURCE,
    commits={"official": SOURCE},
    score_what="score captions with POPE's questions",
    arguments=(
        Argument("questions", {"metavar": "QUESTIONS", "help": "POPE question file"}),
        Argument("captions", {"metavar": "CAPTIONS", "help": "JSON lines or array: image_id, caption"}),
        Argument(
            "--scorer", {"choices": SCORERS, "default": "official", "help": "by letters, or as CHAIR (%(default)s)"}
        ),
        variant_option("of --scorer ours (nltk)"),
        *KEYS,
    ),
    results=results,
    answers="captions",
    asked=False,
    layouts={
        "opope": Layout(
            columns={"accuracy": "accuracy", "f_beta": "F.2", **YES_NO_COLUMNS},
            metrics=METRICS,
            compared=("accuracy", "precision", "f_beta", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=plain_caption("OPOPE"),
            answers=YesNo(lambda answer, _, __: answer or "unknown"),
            leaderboard={"accuracy": ""},
        )
    },
)
