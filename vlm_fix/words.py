"""Which tokens of a prompt are its question, and which of them belong to content words: that needs a tokenizer and NLTK."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.session import Session
from vlm_fix.wing import engine_of

END_MARKS = ("vision_end_token_id", "image_end_token_id", "image_end_id", "eoi_token_id", "eoi_token_index")
LINE = [29871, 13]  # Llama's vocabulary: the line end after an image of LLaVA-1.5,
ASSISTANT = [319, 1799, 9047, 13566, 29901]  # and " ASSISTANT:"
TEMPLATE = "template tokens before and after the question; None: found in the ids, 0|0: none"
LONGEST = 8  # tokens from the end of a turn to the answer; the end of an earlier turn lies farther back

CONTENT = ("NN", "VB", "JJ", "RB", "CD")  # Penn tags of nouns, verbs, adjectives, adverbs and numbers begin so
AUXILIARIES = {
    *("be", "am", "is", "are", "was", "were", "been", "being", "do", "does", "did", "have", "has", "had"),
    *("'s", "'re", "'m", "'ve", "n't", "not"),
}


def template_columns(session: Session, around: tuple[int, ...] | None = None) -> torch.Tensor:
    """[B, n] booleans: columns of `session` that hold the chat template before and after the question.

    The question is the text after a prompt's last image. around: how many of its first and last tokens are template; None:
    what `around_question` finds. None where that is all of the text, nor where ids are not known (a caller's own loop).
    """
    call = session.call
    ids = call.inputs.get("input_ids")
    if ids is None:
        return torch.zeros(session.types.shape, dtype=torch.bool, device=session.types.device)
    tokens, config = engine_of(call.model).tokens, call.model.config
    configs: tuple[Any, ...] = (getattr(call.model, "generation_config", None), config, config.get_text_config())
    ends = ids_of(c.eos_token_id for c in configs if getattr(c, "eos_token_id", None) is not None)
    marks = ids_of(i for name in END_MARKS if (i := getattr(config, name, None)) is not None)
    template = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    for row, image in zip(range(len(ids)), torch.isin(ids, tokens.to(ids.device)), strict=True):
        first = int(image.nonzero()[-1]) + 1 if bool(image.any()) else ids.shape[1]
        head, tail = around or around_question(ids[row, first:].tolist(), ends, marks)
        if first + head < ids.shape[1] - tail:
            template[row, first : first + head] = True
            template[row, ids.shape[1] - tail :] = True
    return session.on_columns(template)


def check_template(name: str, around: tuple[int, ...] | None) -> None:
    """Raises VlmFixError unless `around`, of the method `name`, is None or two counts."""
    if around is not None and (len(around) != 2 or min(around) < 0):
        raise VlmFixError(f"{name}: template takes two counts, of tokens before and after the question: template=2|5.")


def ids_of(values: Iterable[int | Sequence[int]]) -> set[int]:
    """Token ids, given one by one or in lists."""
    return {i for value in values for i in ([value] if isinstance(value, int) else value)}


def around_question(text: list[int], ends: set[int], marks: set[int]) -> tuple[int, int]:
    """How many tokens of the template come first and last in `text`, the ids after an image.

    First: the marks that end an image. Last: all from the end of a turn (one of `ends`, the model's end-of-sequence ids)
    among the last 8 on, as `<|im_end|>`, `<end_of_turn>` and `<|eot_id|>`. Also the line end and " ASSISTANT:" of LLaVA-1.5
    in Llama's vocabulary. Other templates are not known: 0. Where the end of a turn closes answers alone (Pixtral's
    `</s>[INST] Why? [/INST]`), a later question of a few tokens is taken for template: give the numbers there.
    """
    head = len(LINE) if text[: len(LINE)] == LINE else len(list(itertools.takewhile(marks.__contains__, text)))
    tail = next((i for i, token in enumerate(reversed(text[-LONGEST:]), 1) if token in ends), 0)
    return head, tail or len(ASSISTANT) * (text[-len(ASSISTANT) :] == ASSISTANT)


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
def tokenizer_of(name: str, what: str = "content words need") -> Any:
    """The tokenizer that was saved beside a model; VlmFixError, which begins with `what`, if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as e:
        raise VlmFixError(
            f"{what} the model's tokenizer, and {name or 'a model without a name'!r} holds none; load the model "
            f"with from_pretrained from a folder with its tokenizer{', or use all words' * what.startswith('content')}."
        ) from e


@functools.lru_cache(maxsize=256)
def content_tokens(tokenizer: Any, ids: tuple[int, ...]) -> tuple[bool, ...]:
    """For each token: is it in a noun, verb (be, do and have excepted), adjective, adverb or number?"""
    try:
        from nltk import pos_tag
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:
        raise VlmFixError("content words need NLTK: pip install 'vlm-fix[eval]'") from None
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
