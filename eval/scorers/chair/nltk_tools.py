"""NLTK's sentence splitter, word tokenizer, tagger and lemmatizer, set up to behave alike on every version of NLTK."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from io import StringIO
from typing import Any

import nltk
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

from vlm_fix.errors import VlmFixError

PACKAGES = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")
# The abbreviations of Punkt's English model that occur in captions; its other tables hardly matter for lower-case text.
ABBREVIATIONS = (
    "mr mrs ms messrs dr prof ph.d jr sr gen col lt maj sen rep reps st ave ft mg yr vs v inc co corp ltd bros "
    "a.m p.m u.s u.s.a u.k u.n d.c n.y l.a jan feb aug sept oct nov dec tues wed fri"
)


class _WordTokenizer(NLTKWordTokenizer):
    """nltk.word_tokenize as of 3.9.1 on any version. 3.10 also splits at em dashes, and off the quote of "'bear'"."""

    # the last rule tells an opening single quote; in 3.9.1 it acts before a word of one letter alone
    STARTING_QUOTES = [
        *NLTKWordTokenizer.STARTING_QUOTES[:-1],
        (re.compile(r"(?i)(\')(?!re|ve|ll|m|t|s|d|n)(\w)\b", re.U), r"\1 \2"),
    ]

    PUNCTUATION = [rule for rule in NLTKWordTokenizer.PUNCTUATION if "2012" not in rule[0].pattern]


def tokens(text: str, variant: str) -> list[str]:
    """Split a text into words. The variant `pattern` needs no data: its sentence splitter only knows ABBREVIATIONS."""
    sentences = _plain_punkt() if variant == "pattern" else _loaded()[0]
    return [token for sentence in sentences.tokenize(text) for token in _WordTokenizer().tokenize(sentence)]


def tag(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return (word, part of speech)."""
    return _loaded()[1].tag(words)


@lru_cache(maxsize=1 << 16)
def lemma(word: str, part_of_speech: str) -> str:
    """Return WordNet's base form; the part of speech is the first letter of its tag."""
    kind = {"J": "a", "V": "v", "R": "r"}.get(part_of_speech, "n")
    return nltk.stem.WordNetLemmatizer().lemmatize(word, kind)


def ready() -> bool:
    """Whether the data are installed (nothing is downloaded)."""
    try:
        models()
    except LookupError:
        return False
    return True


@cache
def models() -> tuple[Any, Any]:
    """Load sentence splitter and tagger, and WordNet. Raises LookupError if data are missing."""
    nltk.corpus.wordnet.ensure_loaded()
    return nltk.tokenize.PunktTokenizer("english"), nltk.tag.PerceptronTagger()


def _loaded() -> tuple[Any, Any]:
    """`models`, downloading missing data once."""
    if not ready():
        for package in PACKAGES:
            nltk.download(package, quiet=True, print_error_to=StringIO())
        if not ready():
            raise VlmFixError(
                "The nltk variant needs NLTK data that are neither on this machine nor could be fetched: run "
                f"`python -m nltk.downloader {' '.join(PACKAGES)}`, or use --variant pattern, which works now."
            )
    return models()


@cache
def _plain_punkt() -> PunktSentenceTokenizer:
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)
