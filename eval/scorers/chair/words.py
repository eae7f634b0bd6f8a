"""CHAIR's reading of a caption: tokens, reduced words, merged pairs, and which of them name one of COCO's 80 objects.

    variant   code                                     words are reduced by
    nltk      shikiw/OPERA@61426ef chair.py            POS tag and WordNet lemma; needs NLTK data
    pattern   LisaAnne/Hallucination@6e4d33c           the singularize rules of CLiPS pattern; needs no data

Worked example: "Two hot dogs near a toilet seat" gives the tokens two, hot, dogs, near, a, toilet, seat; the last three
words reduce to themselves, dogs to dog; "hot dog" merges into one word and "toilet seat" into toilet; the objects are
hot dog (token 1) and toilet (token 5).
"""

import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from io import StringIO
from typing import Any, Literal, NamedTuple

import nltk
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.rows import DATA, one_of

Variant = Literal["nltk", "pattern"]

NLTK_PACKAGES = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")
# Those of Punkt's English abbreviations that a caption may hold; in lower-case text its other tables hardly matter.
ABBREVIATIONS = (
    "mr mrs ms messrs dr prof ph.d jr sr gen col lt maj sen rep reps st ave ft mg yr vs v inc co corp ltd bros "
    "a.m p.m u.s u.s.a u.k u.n d.c n.y l.a jan feb aug sept oct nov dec tues wed fri"
)


class Words(NamedTuple):
    """What the official caption_to_words returns: object words, their nodes, their token indices, all merged tokens."""

    words: list[str]
    node_words: list[str]
    idxs: list[int]
    raw_words: list[str]


class Object(NamedTuple):
    """A word that names an object: its node, the index of its first token, and its place caption[start:end]."""

    word: str
    node: str
    token: int
    start: int
    end: int


def caption_to_words(caption: str, variant: Variant = "nltk") -> Words:
    """The official function; one quirk included: a "seat" dropped beside a "toilet" makes the later idxs too low."""
    merged, kept = _merge(_reduced(_tokens(caption.lower(), variant), variant))
    words = [word for _, _, word in kept]
    places = [place for place, word in enumerate(words) if word in nodes()]
    found = [words[place] for place in places]
    return Words(found, [nodes()[word] for word in found], [merged[p][0] for p in places], [w for _, _, w in merged])


def find_objects(caption: str, variant: Variant = "nltk") -> tuple[int, list[Object]]:
    """Length in merged tokens, and the same objects as `caption_to_words` with their true places in the caption."""
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
    """Nouns of a text, in the case they are written in, with their lemmas as nodes; for `pattern`, which has no tagger,
    every token with its singular."""
    tokens = _tokens(text, variant)
    if variant == "pattern":
        nodes = [singularize(token) for token in tokens]
    else:
        nodes = [_lemma(token, "N") if tag.startswith("NN") else "" for token, tag in _nltk()[1].tag(tokens)]
    spans = _spans(text, tokens)
    return [Object(tokens[i], node, i, *spans[i]) for i, node in enumerate(nodes) if node]


def nltk_ready() -> bool:
    """Whether the nltk variant's data are on this machine (nothing is fetched)."""
    try:
        _nltk_models()
    except LookupError:
        return False
    return True


@lru_cache(maxsize=1 << 16)
def singularize(word: str) -> str:
    """Singular of a lower-case English noun as the CLiPS pattern library has it, wrong ones included (bus -> bu).

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
        return word  # for -ie too: pattern leaves "collies" as it is
    for plural, singular in tables["irregular"].items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return next((rule.sub(singular, word) for rule, singular in tables["rules"] if rule.search(word)), word)


@cache
def nodes() -> dict[str, str]:
    """Synonym -> COCO object. Split as the scripts do, so that " motor bike" keeps its space and never matches."""
    lines = [line.strip().split(", ") for line in (DATA / "chair/synonyms.txt").read_text().splitlines()]
    return {word: line[0] for line in lines for word in line}


class _WordTokenizer(NLTKWordTokenizer):
    """The words of nltk.word_tokenize up to 3.9.1 on any version: 3.10 also splits at the em dash and its like."""

    PUNCTUATION = [rule for rule in NLTKWordTokenizer.PUNCTUATION if "2012" not in rule[0].pattern]


def _tokens(text: str, variant: Variant) -> list[str]:
    one_of(variant, Variant, "variant")
    sentences = _plain_punkt() if variant == "pattern" else _nltk()[0]
    return [token for sentence in sentences.tokenize(text) for token in _WordTokenizer().tokenize(sentence)]


def _spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of each token."""
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
    return [_lemma(token, tag[:1]) for token, tag in _nltk()[1].tag(tokens)]


def _merge(words: Sequence[str]) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]]]:
    """(first token, last token, word) with pairs merged; and the same without the seats of a caption with a toilet."""
    merged, i = [], 0
    while i < len(words):
        pair = _double_words().get(" ".join(words[i : i + 2]))
        merged.append((i, i + 1, pair) if pair else (i, i, words[i]))
        i += 2 if pair else 1
    toilet = any(word == "toilet" for _, _, word in merged)
    return merged, [item for item in merged if not (toilet and item[2] == "seat")]


@cache
def _double_words() -> dict[str, str]:
    """Pair of words -> what it counts as; "home plate" and "train track" are there to be no object."""
    lines = (DATA / "chair/double_words.txt").read_text().splitlines()
    return dict(line.split(", ") for line in lines)


@cache
def _singular_tables() -> dict[str, Any]:
    tables = json.loads((DATA / "chair/singular.json").read_text())
    tables["ie"] = tuple(word + "s" for word in tables["ie"])
    tables["rules"] = [(re.compile(pattern), singular) for pattern, singular in tables["rules"]]
    return tables


@cache
def _plain_punkt() -> PunktSentenceTokenizer:
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)


@cache
def _nltk_models() -> tuple[Any, Any]:
    """NLTK's sentence splitter and tagger, with WordNet loaded; LookupError where data are missing."""
    nltk.corpus.wordnet.ensure_loaded()
    return nltk.tokenize.PunktTokenizer("english"), nltk.tag.PerceptronTagger()


def _nltk() -> tuple[Any, Any]:
    if not nltk_ready():
        for package in NLTK_PACKAGES:
            nltk.download(package, quiet=True, print_error_to=StringIO())
        if not nltk_ready():
            raise VlmFixError(
                "The nltk variant needs NLTK data that are neither on this machine nor could be fetched: run "
                f"`python -m nltk.downloader {' '.join(NLTK_PACKAGES)}`, or use --variant pattern, which works now."
            )
    return _nltk_models()


@lru_cache(maxsize=1 << 16)
def _lemma(word: str, tag: str) -> str:
    return nltk.stem.WordNetLemmatizer().lemmatize(word, {"J": "a", "V": "v", "R": "r"}.get(tag, "n"))
