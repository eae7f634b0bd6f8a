"""Is what was read as the replies what the model said? Files where it may not be are refused, and --answer-key decides.

    another column speaks      a key of no known name, such as "reply", holds sentences, yes or no in most rows
    the replies are questions  each of them holds a question mark: the prompts, or replies that repeat them
    the captions are one       ten or more images, one text of several words: the prompt

>>> other_column([{"id": 1, "answer": "yes", "reply": "Yes, it is."}, {"id": 2, "answer": "no", "reply": "No"}], {"id", "answer"})
'reply'
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .plain import THOUGHT, plain

ASIDE = ("gt_", "reference", "explanation", "rationale", "reason", "thought", "metadata", "system", "error")
"""A key that begins so, or ends in one of ENDS, stands beside the reply."""
ENDS = (
    "_id",
    "_path",
    "_file",
    "_time",
    "_model",
    "_name",
    "_prompt",
    "_type",
    "_url",
    "_question",
    "_label",
    "_details",
)
SAME_IMAGES = 10
WORDS = 3


def other_column(rows: Sequence[Mapping[str, Any]], known: Collection[str]) -> str:
    """Return the first key, none of the known ones, that holds sentences or yes and no in most rows; "" if there is none."""
    for key in dict.fromkeys(key for row in rows for key in row):
        name = key.lower()
        if key and name not in known and not name.startswith(ASIDE) and not name.endswith(ENDS):
            texts = [text for row in rows if (text := _text(row.get(key)))]
            if 2 * sum(map(_speaks, texts)) > len(rows):
                return key
    return ""


def _text(value: Any) -> str:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else ""


def _speaks(text: str) -> bool:
    return len(text.split()) >= WORDS or plain(text) != "unknown"


def no_reply(replies: Sequence[str | None], images: bool) -> str:
    """Say why texts are not what a model said; "" if they may be."""
    texts = [text for text in replies if text]
    said = [THOUGHT.sub("", text) for text in texts]
    if len(texts) > 1 and all("?" in text or "？" in text for text in said):
        return f"every reply is a question, such as {texts[0][:60]!r}"
    if images and len(texts) >= SAME_IMAGES and len({*texts}) == 1 and len(texts[0].split()) >= WORDS:
        return f"all {len(texts)} captions are {texts[0][:60]!r}"
    return ""
