"""AMBER: what a caption mentions, covers and invents; yes/no questions on existence, attribute and relation.

Source: J. Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation,
arXiv:2311.07397; official scorer junyangwang0410/AMBER@534babf inference.py. People noted per image the objects that are
there (truth) and typical ones that are not (hallu). A mention is a noun among the 418 words of relation.json; it fits an
object if it is it, stands under it in relation.json, or is similar to either (spaCy cosine > .8).

    chair = mentions that fit no true object / mentions        cover = true objects mentioned / true objects
    hal   = captions with such a mention / captions            cog   = hallu objects mentioned / hallu objects

Questions count "no" as positive: precision = right no / said no, recall = right no / questions whose truth is no.
AMBER score = (100 (1 - chair) + 100 F1) / 2, captions and all questions.

    scorer     captions                                              questions
    official   nouns as written ("Dog" opening a sentence is none),  the answer is exactly "Yes" or "No"
               similar words fit
    ours       nouns in lower case, relation.json alone              the first word that is yes or no, in any case
    others     as official                                           as for POPE

`printed` is the official output: percent rounded to .1, F1 of the rounded figures, small terms in the denominators.
VlmFixErrors name what does not line up.

Difference from the official figures: the script asks spaCy's en_core_web_lg while it runs, here data/amber/similar.txt
has the 87 of 87,153 pairs above .8 in en_core_web_md 3.7.1, whose 20,000 vectors are lg's; a rarer word gets that of a
neighbour. Thus 48 pairs have cosine 1, as crocodile and zebra, and fit here where lg may tell them apart.

Worked example:
>>> scene = Scene(1, "AMBER_1.jpg", ("tree", "dog"), ("cat", "bird"))
>>> text = "A dog and two cats near a bench."
>>> score_captions([text], [scene], lexicon("ours", "pattern")).figures  # 2 of dog, cat, bench do not fit
{'chair': 0.6666666666666666, 'cover': 0.5, 'hal': 1.0, 'cog': 0.5}
>>> score_captions([text], [scene], lexicon("official", "pattern")).figures["chair"]  # a cat fits the dog: cosine .82
0.3333333333333333
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError

from . import pope
from .result import Result, paired, tally
from .rows import DATA, one_of, read_rows
from .stats import Metric, harmonic, ratio
from .words import Object, Variant, find_nouns, find_objects

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
KINDS = {  # type in annotations.json -> dimension; the script counts what it does not know as a relation
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}
SOURCE = "junyangwang0410/AMBER@534babf"


class Scene(NamedTuple):
    """An image to describe."""

    id: int
    image: str
    truth: tuple[str, ...]
    hallu: tuple[str, ...]


class Question(NamedTuple):
    """A yes/no question; `kind` is existence, attribute or relation, `label` "yes" or "no"."""

    id: int
    image: str
    text: str
    kind: str
    label: str


class Lexicon(NamedTuple):
    """How captions are read: nouns of a text as nodes, word -> words that stand for it, words never judged, similar
    pairs."""

    scorer: str
    nouns: Callable[[str], Sequence[Object]]
    stand_for: Mapping[str, Sequence[str]]
    safe: Collection[str]
    similar: Collection[tuple[str, str]]


def scenes() -> list[Scene]:
    """The 1004 images of AMBER in the order of their ids."""
    rows = read_rows(DATA / "amber/generative.jsonl.gz", "AMBER annotations")
    return [Scene(r["id"], r["image"], tuple(r["truth"]), tuple(r["hallu"])) for r in rows]


def questions() -> list[Question]:
    """The 14,216 questions of AMBER in the order of their ids."""
    rows = read_rows(DATA / "amber/discriminative.jsonl.gz", "AMBER questions")
    return [Question(r["id"], r["image"], r["query"], KINDS[r["type"]], r["truth"]) for r in rows]


def lexicon(scorer: pope.Scorer = "official", variant: Variant = "nltk") -> Lexicon:
    """AMBER's words. `variant` pattern takes every token's singular for a noun and needs no NLTK data."""
    one_of(scorer, pope.Scorer, "scorer")
    ours = scorer == "ours"
    stand_for = json.loads((DATA / "amber/relation.json").read_text())
    known = {*stand_for, *(word for words in stand_for.values() for word in words)}
    lines = [] if ours else (DATA / "amber/similar.txt").read_text().splitlines()
    pairs = [(a, b) for a, b, _ in map(str.split, lines)]
    return Lexicon(
        scorer if variant == "nltk" else f"{scorer}, {variant} nouns",
        lambda text: [noun for noun in find_nouns(text.lower() if ours else text, variant) if noun.node in known],
        stand_for,
        {*(DATA / "amber/safe_words.txt").read_text().split()},
        {*pairs, *((b, a) for a, b in pairs)},
    )


def picto_lexicon(variant: Variant = "nltk") -> Lexicon:
    """Picto's words: the objects that CHAIR finds, each standing for itself alone."""
    return Lexicon(f"picto, {variant} words", lambda text: find_objects(text, variant)[1], {}, (), ())


class Mention(NamedTuple):
    """A noun, the true object that it fits, the typical but absent ones that it names (both as places in the scene's
    lists), and whether it is hallucinated."""

    noun: Object
    fits: int | None
    imagined: frozenset[int]
    wrong: bool


def mentions(caption: str, scene: Scene, words: Lexicon) -> list[Mention]:
    """What a caption mentions, in its order."""
    truth, hallu = (_listed(objects, words) for objects in (scene.truth, scene.hallu))
    found = []
    for noun in words.nouns(caption):
        name = noun.node
        if name in words.safe or name in truth:
            found.append(Mention(noun, None if name in words.safe else truth[name], frozenset(), False))
            continue
        # the script goes on after a hallu word, and a noun that is similar to a true object is forgiven
        like = {name, *(other for other in (*hallu, *truth) if (name, other) in words.similar)}
        imagined = {hallu[word] for word in (name, *[word for word in hallu if word in like][:1]) if word in hallu}
        fits = next((truth[word] for word in truth if word in like), None)
        found.append(Mention(noun, fits, frozenset(imagined), fits is None))
    return found


def score_captions(captions: Sequence[str | None], scenes: Sequence[Scene], words: Lexicon) -> Result:
    """CHAIR, Cover, Hal and Cog of one caption per scene; None is a caption that says nothing."""
    rows = []
    for caption, scene in zip(captions, scenes, strict=True):
        found = mentions(caption or "", scene, words)
        wrong = sum(mention.wrong for mention in found)
        row = {"n": 1, "hallucinating": int(wrong > 0), "hallucinated": wrong, "mentions": len(found)}
        row |= {"covered": len({m.fits for m in found} - {None}), "truth": len(scene.truth)}
        row |= {"imagined": len({place for m in found for place in m.imagined}), "hallu": len(scene.hallu)}
        rows.append({"image": scene.image, **row})
    return tally(words.scorer, rows, CAPTIONS)


def _listed(objects: Sequence[str], words: Lexicon) -> dict[str, int]:
    """Word -> which object it stands for: relation.json's words come before the objects', and the first one counts."""
    listed: dict[str, int] = {}
    for place, name in enumerate(objects):
        for word in words.stand_for.get(name, ()):
            listed.setdefault(word, place)
    for place, name in enumerate(objects):
        listed.setdefault(name, place)
    return listed


def score_questions(
    answers: Sequence[str | None], questions: Sequence[Question], scorer: pope.Scorer = "official"
) -> Result:
    """Accuracy, and precision, recall and F1 of "no"; None is an answer that failed, wrong like an unparsed one."""
    one_of(scorer, pope.Scorer, "scorer")
    rows: list[dict[str, Any]] = []
    for answer, question in zip(answers, questions, strict=True):
        said, yes = verdict(answer, question.label, scorer), question.label == "yes"
        row = {"tp": yes and said == "yes", "fp": not yes and said == "yes", "tn": not yes and said == "no"}
        row |= {"fn": yes and said == "no", "no": not yes, "yes": said == "yes", "unparsed": said == "unknown"}
        rows.append({"image": question.image, "n": 1} | {name: int(value) for name, value in row.items()})
    return tally(scorer, rows, QUESTIONS, sum(row["unparsed"] for row in rows))


def verdict(answer: str | None, label: str, scorer: pope.Scorer) -> str:
    """yes, no or unknown."""
    if scorer == "official" or answer is None:
        return {"Yes": "yes", "No": "no"}.get(answer or "", "unknown")
    return pope.verdict(answer, label, scorer)


def printed(result: Result, small: float = 0.0001) -> dict[str, float]:
    """The figures as the official script prints them; `small` is in F1's denominator, .001 there for existence."""
    s = result.sums()

    def percent(part: str, whole: float) -> float:
        return round(s[part] / (whole + 0.001) * 100, 1)

    if "truth" in s:
        hal = round(100 - (s["n"] - s["hallucinating"]) / (s["n"] + 0.001) * 100, 1)
        figures = {"CHAIR": percent("hallucinated", s["mentions"]), "Cover": percent("covered", s["truth"])}
        return figures | {"Hal": hal, "Cog": percent("imagined", s["hallu"])}
    right = round((s["tp"] + s["tn"]) / (s["n"] + 0.001) * 100, 1)
    precision, recall = percent("tn", s["tn"] + s["fn"]), percent("tn", s["no"])
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + small) * 100, 1)
    return {"Accuracy": right, "Precision": precision, "Recall": recall, "F1": f1}


def score_file(path: str | Path, scorer: pope.Scorer = "official", variant: Variant = "nltk") -> dict[str, Result]:
    """Results of an official answer file, rows with id and response, by part: captions, existence, attribute, relation
    and, where these three are there, questions. A part is scored if it has answers, and then needs all of them."""
    said: dict[int, str | None] = {}
    for number, row in enumerate(read_rows(path, "answer file"), 1):
        if not isinstance(row.get("id"), int) or not isinstance(row.get("response"), str):
            raise VlmFixError(f'{path}, row {number}: AMBER wants "id", a number, and "response", a text; add them.')
        if row["id"] in said:
            raise VlmFixError(f"{path}, row {number}: id {row['id']} comes twice; keep one answer.")
        said[row["id"]] = row["response"]
    found = {}
    every: list[Question] = []
    if captioned := {id: text for id, text in said.items() if id <= 1004}:
        shown = scenes()
        texts = paired(shown, captioned, "AMBER caption")
        found["captions"] = score_captions(texts, shown, lexicon(scorer, variant))
    asked = questions()
    kind_of = {question.id: question.kind for question in asked}
    for kind in ("existence", "attribute", "relation"):
        mine = [question for question in asked if question.kind == kind]
        if replies := {id: text for id, text in said.items() if id > 1004 and kind_of.get(id, kind) == kind}:
            found[kind] = score_questions(paired(mine, replies, f"AMBER {kind}"), mine, scorer)
            every += mine
    if len(every) == len(asked):
        found["questions"] = score_questions([said[question.id] for question in every], every, scorer)
    return found


def whole(captions: Result, questions: Result) -> Result:
    """The AMBER score as a fraction; its rows are the counts of both parts, so that a bootstrap of images draws the
    caption and the questions of an image together."""
    none = dict.fromkeys([*captions.rows[0], *questions.rows[0]], 0)
    return tally(captions.scorer, [none | row for row in (*captions.rows, *questions.rows)], WHOLE)


def amber_score(found: Mapping[str, Result]) -> float:
    """(100 (1 - chair) + 100 F1) / 2 of the parts captions and questions, 0 to 100."""
    return 100 * whole(found["captions"], found["questions"]).figures["score"]
