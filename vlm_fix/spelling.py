"""How values are written in a spec: what parts specs, runs and tuples stands in double quotes, as in JSON."""

from __future__ import annotations

import json
import re
from typing import Any

QUOTED = re.compile(r'(?:^|(?<=[=|]))\s*"(?:[^"\\]|\\.)*"(?=\s*(?:[,|+]|$))')
STACK = re.compile(r"\+(?=\s*(?:[^\s:+,=]+\.py\b|[A-Za-z_][\w-]*\s*(?:[:+,]|$)))")
"""A + before what can be a method's spec."""


def split(text: str, at: str | re.Pattern[str]) -> list[str]:
    """`text` parted at each match of a pattern that is not in quotes."""
    hidden, found, start = QUOTED.sub(lambda match: "0" * len(match[0]), text), [], 0
    for match in re.finditer(at, hidden):
        found.append(text[start : match.start()])
        start = match.end()
    return [*found, text[start:]]


def quoted(value: Any) -> str:
    """A single value as text that `unquoted` gives back as a str; numbers as they are."""
    text = str(value)
    if not isinstance(value, str):
        return text
    plain = (
        text == text.strip()
        and not text.endswith("+")
        and text.lower() not in ("", "()", "none", "auto")
        and not re.search(r'[",|\n]|\.ya?ml$', text)
    )
    return text if plain and not STACK.search(text + ",") else json.dumps(text, ensure_ascii=False)


def unquoted(text: str) -> str:
    """What stands in the quotes, if there are any."""
    try:
        return str(json.loads(text)) if text.startswith('"') else text
    except ValueError:
        return text


def spelled(value: Any) -> str:
    """A parameter's value as a spec has it."""
    return ("|".join(map(quoted, value)) or "()") if isinstance(value, tuple) else quoted(value)
