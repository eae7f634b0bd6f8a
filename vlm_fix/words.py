"""Which tokens of a prompt belong to content words: needs the model's tokenizer and NLTK's part-of-speech tagger."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.session import Session
from vlm_fix.wing import engine_of

CONTENT = ("NN", "VB", "JJ", "RB", "CD")  # Penn tags of nouns, verbs, adjectives, adverbs and numbers begin so
AUXILIARIES = {
    *("be", "am", "is", "are", "was", "were", "been", "being", "do", "does", "did", "have", "has", "had"),
    *("'s", "'re", "'m", "'ve", "n't", "not"),
}


def content_columns(session: Session) -> torch.Tensor:
    """[B, n] booleans: columns of `session` whose token is in a content word of the text after its prompt's last image.

    Raises VlmFixError where the tokenizer, NLTK or its tagger's data are missing.
    """
    call = session.call
    engine, ids = engine_of(call.model), call.inputs["input_ids"]
    tokenizer = tokenizer_of(getattr(call.model, "name_or_path", "") or "")
    content = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    for row, image in zip(range(len(ids)), torch.isin(ids, engine.tokens.to(ids.device)), strict=True):
        first = int(image.nonzero()[-1]) + 1 if bool(image.any()) else ids.shape[1]
        content[row, first:] = torch.tensor(content_tokens(tokenizer, tuple(ids[row, first:].tolist())))
    return session.on_columns(content)


@functools.lru_cache(maxsize=4)
def tokenizer_of(name: str) -> Any:
    """The tokenizer that was saved beside a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise VlmFixError(
            f"content words need the model's tokenizer, and {name or 'a model without a name'!r} holds none; load the model "
            "with from_pretrained from a folder with its tokenizer, or use all words."
        ) from e


@functools.lru_cache(maxsize=256)
def content_tokens(tokenizer: Any, ids: tuple[int, ...]) -> tuple[bool, ...]:
    """For each token: is it in a noun, verb (be, do and have excepted), adjective, adverb or number?"""
    try:
        from nltk import pos_tag
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:
        raise VlmFixError('content words need NLTK: pip install ".[eval]" in the clone of vlm-fix.') from None
    texts = [tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False) for i in range(len(ids) + 1)]
    text = texts[-1]
    spans = list(NLTKWordTokenizer().span_tokenize(text))
    try:
        tagged = pos_tag([text[a:b] for a, b in spans])
    except LookupError:
        raise VlmFixError(
            "content words need the data of NLTK's tagger: python -m nltk.downloader averaged_perceptron_tagger_eng."
        ) from None
    kept = [
        span
        for span, (word, tag) in zip(spans, tagged, strict=True)
        if tag.startswith(CONTENT) and word.lower() not in AUXILIARIES
    ]
    result = []
    for before, after in itertools.pairwise(texts):  # a token is what it adds to the text
        start, end = len(before), len(after)
        start += len(after[start:end]) - len(after[start:end].lstrip())
        result.append(any(a < end and start < b for a, b in kept))
    return tuple(result)
