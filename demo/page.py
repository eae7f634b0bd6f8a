"""What the tabs of the page share."""

from __future__ import annotations

import html

from vlm_fix import list_methods
from vlm_fix.method import Baseline

CLICKS = """element.addEventListener('click', event => {
  const hit = event.target.closest('[data-word], [data-head]');
  if (hit) trigger('select', Object.fromEntries(Object.entries(hit.dataset).map(([key, value]) => [key, +value])));
});"""  # a click on a word or a head is an event with the numbers that its element carries


def notice(sentence: str) -> str:
    """A sentence for the person, read aloud by screen readers."""
    return f'<div class="notice" role="alert">{html.escape(sentence)}</div>' if sentence else ""


def method_choices() -> list[tuple[str, str]]:
    """(label, name) of every method."""
    return [(f"{c.name} ({c.kind})", c.name) for c in list_methods() if c is not Baseline]
