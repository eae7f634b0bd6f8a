"""How CHAIR reads a caption: tokens, base forms, merged pairs, and which of them name one of COCO's 80 objects.

    variant   code                                     base forms by
    nltk      shikiw/OPERA@61426ef chair.py            POS tag and WordNet lemma; needs NLTK data
    pattern   LisaAnne/Hallucination@6e4d33c           the singularize rules of CLiPS pattern; needs no data

Worked example: "Two hot dogs near a toilet seat" has the tokens two, hot, dogs, near, a, toilet, seat. The base form of
dogs is dog; "hot dog" merges into one word and "toilet seat" into toilet. The objects are hot dog (token 1) and toilet
(token 5).
"""

import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from vlm_fix.eval.files import DATA
from vlm_fix.eval.scorers.choices import Variant, one_of

COMMITS = {"nltk": "shikiw/OPERA@61426ef", "pattern": "LisaAnne/Hallucination@6e4d33c"}
"""The code that each variant follows."""


class Words(NamedTuple):
    """The result of the official caption_to_words: object words, their nodes and token indices, all merged tokens."""

    words: list[str]
    node_words: list[str]
    idxs: list[int]
    raw_words: list[str]


class Object(NamedTuple):
    """A word that names an object: its node (COCO's name), the index of its first token, and caption[start:end]."""

    word: str
    node: str
    token: int
    start: int
    end: int


def caption_to_words(caption: str, variant: Variant = "nltk") -> Words:
    """The official function, quirk included: after a "seat" dropped because of a "toilet", idxs are too low."""
    merged, kept = _merge(_reduced(_tokens(caption.lower(), variant), variant))
    words = [word for _, _, word in kept]
    places = [place for place, word in enumerate(words) if word in nodes()]
    found = [words[place] for place in places]
    return Words(found, [nodes()[word] for word in found], [merged[p][0] for p in places], [w for _, _, w in merged])


def find_objects(caption: str, variant: Variant = "nltk") -> tuple[int, list[Object]]:
    """Return the number of merged tokens, and the objects of `caption_to_words` with their true positions."""
    text = caption.lower()
    tokens = _tokens(text, variant)
    spans = _spans(text, tokens)
    merged, kept = _merge(_reduced(tokens, variant))
    return len(merged), [
        Object(word, nodes()[word], first, spans[first][0], spans[last][1])
        for first, last, word in kept
        if word in nodes()
    ]


def find_nouns(text: str, variant: Variant = "nltk") -> list[Object]:
    """Return the nouns of a text, in their original case, with their lemmas as nodes.

    The variant `pattern` has no tagger and returns every token, with its singular.
    """
    tokens = _tokens(text, variant)
    if variant == "pattern":
        nodes = [singularize(token) for token in tokens]
    else:
        nodes = [_nltk().lemma(word, "N") if tag.startswith("NN") else "" for word, tag in _nltk().tag(tokens)]
    spans = _spans(text, tokens)
    return [Object(tokens[i], node, i, *spans[i]) for i, node in enumerate(nodes) if node]


def nltk_ready() -> bool:
    """Whether the data of the nltk variant are installed (nothing is downloaded)."""
    return _nltk().ready()


@lru_cache(maxsize=1 << 16)
def singularize(word: str) -> str:
    """Return the singular of a lower-case noun according to the CLiPS pattern library, errors included (bus -> bu).

    The tables are those of pattern.en (clips/pattern@d25511f, BSD-3-Clause, (c) University of Antwerp), which adapted
    them from B. Ferrer Martinez's Inflector; both notices are in data/chair/LICENSE-pattern.txt.
    """
    tables = _singular_tables()
    first, *rest = word.split("-")
    if rest and rest[0] in tables["prepositions"]:  # men-of-war
        return "-".join([singularize(first), *rest])
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    if any(whole.endswith(word) for whole in tables["unchanged"]) or word.endswith(tables["ie"]):
        return word  # also for -ie: pattern leaves "collies" unchanged
    for plural, singular in tables["irregular"].items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return next((rule.sub(singular, word) for rule, singular in tables["rules"] if rule.search(word)), word)


@cache
def nodes() -> dict[str, str]:
    """Synonym -> COCO object. Split like the official scripts: " motor bike" keeps its space and never matches."""
    lines = [line.strip().split(", ") for line in (DATA / "chair/synonyms.txt").read_text().splitlines()]
    return {word: line[0] for line in lines for word in line}


def _nltk() -> Any:
    """`nltk_tools.py`, imported at the first caption: NLTK is slow to load, and optional."""
    from . import nltk_tools

    return nltk_tools


def _tokens(text: str, variant: Variant) -> list[str]:
    return _nltk().tokens(text, one_of(variant, Variant, "variant"))


def _spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Return (start, end) of each token."""
    spans, at = [], 0
    for token in tokens:
        while text[at : at + 1].isspace():
            at += 1
        start, at = at, at + (len(token) if text.startswith(token, at) else 1)  # the tokenizer writes " as `` or ''
        spans.append((start, at))
    return spans


def _reduced(tokens: list[str], variant: Variant) -> list[str]:
    if variant == "pattern":
        return [singularize(token) for token in tokens]
    return [_nltk().lemma(token, tag[:1]) for token, tag in _nltk().tag(tokens)]


def _merge(words: Sequence[str]) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]]]:
    """Return (first token, last token, word) with pairs merged; and the same without the "seat" of a "toilet seat"."""
    merged, i = [], 0
    while i < len(words):
        pair = _double_words().get(" ".join(words[i : i + 2]))
        merged.append((i, i + 1, pair) if pair else (i, i, words[i]))
        i += 2 if pair else 1
    toilet = any(word == "toilet" for _, _, word in merged)
    return merged, [item for item in merged if not (toilet and item[2] == "seat")]


@cache
def _double_words() -> dict[str, str]:
    """Pair of words -> what it counts as; "home plate" and "train track" are listed so as not to be objects."""
    lines = (DATA / "chair/double_words.txt").read_text().splitlines()
    return dict(line.split(", ") for line in lines)


@cache
def _singular_tables() -> dict[str, Any]:
    tables = json.loads((DATA / "chair/singular.json").read_text())
    tables["ie"] = tuple(word + "s" for word in tables["ie"])
    tables["rules"] = [(re.compile(pattern), singular) for pattern, singular in tables["rules"]]
    return tables
