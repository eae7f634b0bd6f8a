"""What the tabs of the page share."""

from __future__ import annotations

import html

from vlm_fix import list_methods
from vlm_fix.method import Baseline


def notice(sentence: str) -> str:
    """A sentence for the person, read aloud by screen readers."""
    return f'<div class="notice" role="alert">{html.escape(sentence)}</div>' if sentence else ""


def method_choices() -> list[tuple[str, str]]:
    """(label, name) of every method."""
    return [(f"{c.name} ({c.kind})", c.name) for c in list_methods() if c is not Baseline]
