"""AMBER's images, questions and words, as included in the package.

Source: junyangwang0410/AMBER@534babf data/ and inference.py, which asks spaCy which words are similar. A lexicon says how
captions are read: which words are nouns, and which stand for another (relation.json).

Difference from the official figures: the script queries spaCy's en_core_web_lg at run time. Here data/amber/similar.txt
has the 87 of 87,153 pairs above .8 in en_core_web_md 3.7.1, whose 20,000 vectors are lg's; a rarer word gets the vector
of a neighbour. So 48 pairs have cosine 1, such as crocodile and zebra, and match here where lg may tell them apart.

Worked example: in AMBER's first image five typical things are missing; man is listed under person, bicycle is not.
>>> scenes()[0].hallu
('cloud', 'sun', 'bird', 'dog', 'flower')
>>> words = lexicon("official", "pattern")
>>> "man" in words.stand_for["person"], "bicycle" in words.stand_for["person"]
(True, False)
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from vlm_fix.eval.files import DATA, read_rows
from vlm_fix.eval.scorers.chair.words import Object, find_nouns, find_objects
from vlm_fix.eval.scorers.choices import Scorer, Variant, one_of

KINDS = {  # type in annotations.json -> dimension; the script counts unknown types as relations
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}


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
    """How captions are read: the function that finds nouns, word -> words that stand for it, words that are never
    judged, and pairs of similar words."""

    scorer: str
    nouns: Callable[[str], Sequence[Object]]
    stand_for: Mapping[str, Sequence[str]]
    safe: Collection[str]
    similar: Collection[tuple[str, str]]


def scenes() -> list[Scene]:
    """Return the 1004 images of AMBER in the order of their ids."""
    rows = read_rows(DATA / "amber/generative.jsonl.gz", "AMBER annotations")
    return [Scene(r["id"], r["image"], tuple(r["truth"]), tuple(r["hallu"])) for r in rows]


def questions() -> list[Question]:
    """Return the 14,216 questions of AMBER in the order of their ids."""
    rows = read_rows(DATA / "amber/discriminative.jsonl.gz", "AMBER questions")
    return [Question(r["id"], r["image"], r["query"], KINDS[r["type"]], r["truth"]) for r in rows]


def lexicon(scorer: Scorer = "official", variant: Variant = "nltk") -> Lexicon:
    """Return AMBER's words. The variant `pattern` treats every token's singular as a noun and needs no NLTK data."""
    one_of(scorer, Scorer, "scorer")
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
    """Return Picto's words: the objects that CHAIR finds, each standing only for itself."""
    return Lexicon(f"picto, {variant} words", lambda text: find_objects(text, variant)[1], {}, (), ())
