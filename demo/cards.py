"""One pane as HTML: the methods' name, below it how the answer stands and what went wrong, then the answer and its score."""

from __future__ import annotations

import html
import itertools

from .compare import Pane

LEGEND = (
    '<p class="legend"><mark class="grounded">in the image</mark> <mark class="hallucinated">invented</mark> '
    "<span>Click a word below to see where the model looked.</span></p>"
)
IDLE, EMPTY = "not asked yet", "Choose a method above."


def card(pane: Pane | None) -> str:
    """The pane; everything that a model or a person wrote is escaped. Words can be clicked, or reached with Tab and arrows."""
    if pane is None:
        return f'<div class="card idle"><h3>no method</h3><p class="state">{EMPTY}</p></div>'
    notes = "".join(f'<div class="note">{html.escape(note)}</div>' for note in pane.notes)
    return (
        f'<div class="card {pane.state}"><h3>{html.escape(pane.title)}</h3><p class="state">{_state(pane)}</p>{notes}'
        f"{_said(pane)}{_score(pane)}</div>"
    )


def _state(pane: Pane) -> str:
    if pane.state == "waiting":
        return "waiting for the model …"
    if pane.state == "running":
        return '<i class="spin"></i>answering …'
    if pane.state == "stopped":
        return "stopped"
    if pane.state == "failed":
        return "cannot run"
    if pane.state == "idle":
        return IDLE
    if pane.prepared:
        return f"{pane.tokens} tokens · made earlier; Compare asks again"
    speed = f" · {pane.tokens / pane.seconds:.0f} tokens/s" if pane.seconds else ""
    first = f" · first after {pane.first_token:.2f} s" if pane.first_token else ""
    peak = f"{pane.peak_mb / 1e3:.1f} GB" if pane.peak_mb >= 1e4 else f"{pane.peak_mb:.0f} MB"
    about = "of this one answer; on a CPU the memory is that of the whole process"
    return f'<span title="{about}">{pane.tokens} tokens{speed}{first} · peak memory {peak}</span>'


def _said(pane: Pane) -> str:
    said, words = "", itertools.count()
    for text, label, node in pane.words():
        if not text.strip():
            said += html.escape(text)
            continue
        number = next(words)
        mark = f'mark class="{label}" title="{html.escape(node)}: {label}; look inside"' if label else "span"
        reach = f'data-word="{number}" role="button" tabindex="{-1 if number else 0}"'
        said += f"<{mark} {reach}>{html.escape(text)}</{mark[:4]}>"
    live = " live" if pane.state == "running" else ""
    return f'<p class="said{live}" aria-live="polite">{said}</p>' if said or live else ""


def _score(pane: Pane) -> str:
    right, score = pane.right(), pane.score()
    if right is not None:
        tone, word = ("good", "right") if right else ("bad", "wrong")
        return f'<div class="rate {tone}"><b>{word}</b><small>of this scene it is {pane.label}</small></div>'
    if score is None or not score.rows[0]["mentions"]:
        return ""
    row = score.rows[0]
    return (
        f'<div class="rate {"bad" if row["hallucinated"] else "good"}"><b>{100 * score.chair_i:.0f} %</b><small>hallucinated '
        f"(CHAIR<sub>i</sub>): {row['hallucinated']} of {row['mentions']} objects named; "
        f"{row['found']} of {row['truth']} in the image found</small></div>"
    )
