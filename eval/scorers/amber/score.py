"""AMBER: what a caption mentions, covers and invents; yes/no questions about existence, attribute and relation.

Source: J. Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation,
arXiv:2311.07397; official scorer junyangwang0410/AMBER@534babf inference.py. Annotators listed for each image the
objects that are there (truth) and typical ones that are not (hallu). A mention is a noun among the 418 words of
relation.json; it fits an object if it is the same word, is listed under it in relation.json, or is similar to either
(spaCy cosine > .8).

    chair = mentions that fit no true object / mentions        cover = true objects mentioned / true objects
    hal   = captions with such a mention / captions            cog   = hallu objects mentioned / hallu objects

Questions count "no" as positive: precision = right no / answers of no, recall = right no / questions with label no.
AMBER score = (100 (1 - chair) + 100 F1) / 2, over captions and all questions.

    scorer     captions                                              questions
    official   nouns as written (a leading "Dog" is not a noun),     the answer is exactly "Yes" or "No"
               similar words fit
    ours       nouns in lower case, only relation.json               the first word that is yes or no, in any case
    others     as official                                           as for POPE

`official.py` scores official answer files.

Worked example:
>>> from .data import lexicon
>>> scene = Scene(1, "AMBER_1.jpg", ("tree", "dog"), ("cat", "bird"))
>>> text = "A dog and two cats near a bench."
>>> score_captions([text], [scene], lexicon("ours", "pattern")).figures  # 2 of dog, cat, bench do not fit
{'chair': 0.6666666666666666, 'cover': 0.5, 'hal': 1.0, 'cog': 0.5}
>>> score_captions([text], [scene], lexicon("official", "pattern")).figures["chair"]  # a cat fits the dog: cosine .82
0.3333333333333333
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.chair.words import Object
from vlm_fix.eval.scorers.choices import Scorer, one_of
from vlm_fix.eval.scorers.result import Result, tally
from vlm_fix.eval.stats import Metric, harmonic, ratio

from .data import Lexicon, Question, Scene

CAPTIONS: dict[str, Metric] = {
    "chair": lambda s: ratio(s["hallucinated"], s["mentions"]),
    "cover": lambda s: ratio(s["covered"], s["truth"]),
    "hal": lambda s: ratio(s["hallucinating"], s["n"]),
    "cog": lambda s: ratio(s["imagined"], s["hallu"]),
}
QUESTIONS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["n"]),
    "precision": lambda s: ratio(s["tn"], s["tn"] + s["fn"]),
    "recall": lambda s: ratio(s["tn"], s["no"]),
    "f1": lambda s: harmonic(QUESTIONS["precision"](s), QUESTIONS["recall"](s)),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}
WHOLE: dict[str, Metric] = {"score": lambda s: (1 - CAPTIONS["chair"](s) + QUESTIONS["f1"](s)) / 2}
SOURCE = "junyangwang0410/AMBER@534babf"


class Mention(NamedTuple):
    """A noun, the true object that it fits, the typical but absent ones that it names (both as indices into the scene's
    lists), and whether it is hallucinated."""

    noun: Object
    fits: int | None
    imagined: frozenset[int]
    wrong: bool


def mentions(caption: str, scene: Scene, words: Lexicon) -> list[Mention]:
    """Return what a caption mentions, in order."""
    truth, hallu = (_listed(objects, words) for objects in (scene.truth, scene.hallu))
    found = []
    for noun in words.nouns(caption):
        name = noun.node
        if name in words.safe or name in truth:
            found.append(Mention(noun, None if name in words.safe else truth[name], frozenset(), False))
            continue
        # like the script: a hallu word does not end the search, and a noun similar to a true object is forgiven
        like = {name, *(other for other in (*hallu, *truth) if (name, other) in words.similar)}
        imagined = {hallu[word] for word in (name, *[word for word in hallu if word in like][:1]) if word in hallu}
        fits = next((truth[word] for word in truth if word in like), None)
        found.append(Mention(noun, fits, frozenset(imagined), fits is None))
    return found


def score_captions(captions: Sequence[str], scenes: Sequence[Scene], words: Lexicon) -> Result:
    """Compute CHAIR, Cover, Hal and Cog of one caption per scene."""
    found = [mentions(text, scene, words) for text, scene in zip(captions, scenes, strict=True)]

    def at_share(share: float) -> list[dict[str, Any]]:
        rows = []
        for text, scene, its in zip(captions, scenes, found, strict=True):
            kept = math.ceil(share * len(text.split()))
            rows.append(_row([m for m in its if len(text[: m.noun.start + 1].split()) <= kept], scene, kept))
        return rows

    return dataclasses.replace(tally(words.scorer, at_share(1), CAPTIONS), at_share=at_share)


def _row(found: Sequence[Mention], scene: Scene, tokens: int) -> dict[str, Any]:
    """The counts of one caption; `tokens` are its words."""
    wrong = sum(mention.wrong for mention in found)
    row = {"n": 1, "hallucinating": int(wrong > 0), "hallucinated": wrong, "mentions": len(found), "tokens": tokens}
    row |= {"covered": len({m.fits for m in found} - {None}), "truth": len(scene.truth)}
    row |= {"imagined": len({place for m in found for place in m.imagined}), "hallu": len(scene.hallu)}
    return {"image": scene.image, **row}


def _listed(objects: Sequence[str], words: Lexicon) -> dict[str, int]:
    """Word -> index of the object it stands for; words of relation.json take precedence, and the first match counts."""
    listed: dict[str, int] = {}
    for place, name in enumerate(objects):
        for word in words.stand_for.get(name, ()):
            listed.setdefault(word, place)
    for place, name in enumerate(objects):
        listed.setdefault(name, place)
    return listed


def score_questions(
    answers: Sequence[str | None], questions: Sequence[Question], scorer: Scorer = "official"
) -> Result:
    """Compute accuracy, and precision, recall and F1 of "no". None is an answer that failed: wrong, like unparsed ones."""
    one_of(scorer, Scorer, "scorer")
    rows: list[dict[str, Any]] = []
    verdicts = [verdict(answer, question.label, scorer) for answer, question in zip(answers, questions, strict=True)]
    for said, question in zip(verdicts, questions, strict=True):
        yes = question.label == "yes"
        row = {"tp": yes and said == "yes", "fp": not yes and said == "yes", "tn": not yes and said == "no"}
        row |= {
            "fn": yes and said == "no",
            "no": not yes,
            "positive": yes,
            "yes": said == "yes",
            "unparsed": said == "unknown",
        }
        rows.append({"image": question.image, "n": 1} | {name: int(value) for name, value in row.items()})
    return tally(scorer, rows, QUESTIONS, yesno.misread(answers, verdicts), [q.text for q in questions])


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown."""
    if scorer == "official":
        return {"Yes": "yes", "No": "no"}.get(answer or "", "unknown")
    return yesno.verdict(answer, label, scorer)


def whole(captions: Result, questions: Result) -> Result:
    """Compute the AMBER score as a fraction.

    Its rows are the counts of both parts, so that the bootstrap draws the caption and the questions of an image together.
    """
    none = dict.fromkeys([*captions.rows[0], *questions.rows[0]], 0)
    return tally(captions.scorer, [none | row for row in (*captions.rows, *questions.rows)], WHOLE)


def amber_score(found: Mapping[str, Result]) -> float:
    """Compute (100 (1 - chair) + 100 F1) / 2 from the parts captions and questions, 0 to 100."""
    return 100 * whole(found["captions"], found["questions"]).figures["score"]
