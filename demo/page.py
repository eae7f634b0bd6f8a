"""What the tabs of the page share."""

from __future__ import annotations

import html

import gradio as gr

from vlm_fix import list_methods
from vlm_fix.method import Baseline

from .compare import Stop

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


def stop_with(page: gr.Blocks, button: gr.Button, stops: dict[str, Stop]) -> None:
    """The button, and leaving the page, stop what the visitor runs; stops: session -> what is running."""

    def halt(request: gr.Request) -> None:
        if request.session_hash in stops:
            stops[request.session_hash].set()

    def leave(request: gr.Request) -> None:
        halt(request)
        stops.pop(request.session_hash or "", None)

    button.click(halt, queue=False, api_visibility="private")
    page.unload(leave)
