"""What the tabs of the page share."""

from __future__ import annotations

import functools
import html
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from .compare import Stop, Stopped

T = TypeVar("T")

CLICKS = """const CHOSEN = '[data-word], [data-head], [data-ask], [data-method]';
const send = hit => trigger('select', Object.fromEntries(Object.entries(hit.dataset).map(([k, v]) => [k, +v])));
element.addEventListener('click', event => { const hit = event.target.closest(CHOSEN); if (hit) send(hit); });
element.addEventListener('keydown', event => {
  const hit = event.target.closest('[data-word]');
  if (!hit) return;
  const all = [...element.querySelectorAll('[data-word]')], at = all.indexOf(hit);
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[event.key];
  if (to !== undefined && all[to]) { hit.tabIndex = -1; all[to].tabIndex = 0; all[to].focus(); event.preventDefault(); }
  if ((event.key === 'Enter' || event.key === ' ') && hit.tagName !== 'BUTTON') { send(hit); event.preventDefault(); }
});"""  # a click on a word, a head, a chip is an event with the numbers of its element; Tab, arrows and Enter reach them too


def notice(sentence: str) -> str:
    """A sentence for the person, read aloud by screen readers."""
    return f'<div class="notice" role="alert">{html.escape(sentence)}</div>' if sentence else ""


def bar(label: str, share: float, said: str) -> str:
    """How far work is, for eyes and screen readers, and what is being done."""
    return (
        f'<div class="progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-label="{label}" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="quiet">{html.escape(said)}</p>'
    )


def watched(work: Callable[[Callable[[T], None]], None], stop: Stop) -> Generator[T, None, None]:
    """Run `work(tell)` in a thread and yield what it tells. Raises what it raises, but for Stopped.

    Closing the iterator sets `stop`, at which `work` has to raise Stopped.
    """
    told: queue.Queue[tuple[T] | None] = queue.Queue()
    errors: list[Exception] = []

    def run() -> None:
        try:
            work(lambda news: told.put((news,)))
        except Stopped:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            told.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (news := told.get()) is not None:
            yield news[0]
    finally:
        stop.set()
    thread.join()
    if errors:
        raise errors[0]


def steps(told: Sequence[tuple[str, str]]) -> str:
    """What a tab will do, as cards, where there is nothing to show yet."""
    return f'<div class="steps">{"".join(f"<div><b>{name}</b>{text}</div>" for name, text in told)}</div>'


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


def stoppable(
    page: gr.Blocks,
    events: Sequence[Any],
    work: Callable[..., Iterator[list[Any]]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    button: gr.Button,
    stops: dict[str, Stop],
    **options: Any,
) -> None:
    """Let the events start `work`, of which a visitor runs one at a time; its Stop is there while it goes on."""

    @functools.wraps(work)
    def run(*given: Any) -> Iterator[list[Any]]:
        for i, made in enumerate(work(*given)):
            yield [*made, gr.skip() if i else gr.Button(visible=True)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    ends = gr.on(events, run, inputs, [*outputs, button], trigger_mode="once", **options, **quiet)
    ends.then(lambda: gr.Button(visible=False), None, button, queue=False, **quiet)
    stop_with(page, button, stops)


def places(page: gr.Blocks) -> Callable[[gr.Request], Path]:
    """A function from a request to its visitor's own folder, which goes with the visitor."""
    kept: dict[str, tempfile.TemporaryDirectory[str]] = {}

    def place(request: gr.Request) -> Path:
        visitor = request.session_hash or ""
        if visitor not in kept:
            kept[visitor] = tempfile.TemporaryDirectory(dir=os.environ.get("GRADIO_TEMP_DIR"))
        return Path(kept[visitor].name)

    def leave(request: gr.Request) -> None:
        if request.session_hash in kept:
            kept.pop(request.session_hash).cleanup()

    page.unload(leave)
    return place
