"""The views of `vlm-fix inspect` in the Look inside tab, as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable

from vlm_fix.observation import page

from . import inside
from .drawn import figure
from .inside import View

ATTENTION = "Attention"


def layers(view: View, chosen: int) -> str:
    """What each layer would say at each token of the answer."""
    assert view.found is not None
    return "".join(page.lens(view.found, view.names, _answer(view)))


def flows(view: View, chosen: int) -> str:
    """Rollout and saliency of a word, on the image, and what else the word hangs on."""
    found, word = view.found, view.words[chosen]
    assert found is not None and found.rollout is not None and found.saliency is not None
    made = [figure(inside.canvas(view.picture), "Image", "as the model sees it")]
    for title, heat, all_of, about in (
        (
            "Attention rollout",
            view.rolled(chosen),
            found.rollout,
            "attention of all layers, multiplied: {} ends on the image",
        ),
        ("Saliency", view.salient(chosen), found.saliency.sum(dim=0), "|A dL/dA|: {} of it is on the image"),
    ):
        rows = [row for row in word.rows if row < len(all_of)]
        share = float(all_of[rows][:, found.visual].sum() / all_of[rows].sum().clamp(min=1e-12))
        peak = float(heat.max())
        note = f"“{word.text}”, {about.format(f'{share:.1%}')}"
        made.append(figure(inside.overlay(view.picture, heat, peak), title, note, ("heat", "0", f"{peak:.2g} a patch")))
    table = "".join(page.saliency(found, [view.names[i] for i in found.ids.tolist()], _answer(view)))
    return f'<div class="figures">{"".join(made)}</div>{table}'


def heads_and_sinks(view: View, chosen: int) -> str:
    """Heads that copy or look, and sinks by layer."""
    assert view.found is not None
    return "".join([*page.heads(view.found), *page.sinks(view.found)])


VIEWS: dict[str, Callable[[View, int], str]] = {
    "What each layer would say": layers,
    "Rollout and saliency": flows,
    "Heads and sinks": heads_and_sinks,
}


def shown(view: View, chosen: int, which: str) -> str:
    """One of VIEWS, of a view that was inspected."""
    return f'<div class="inspect">{VIEWS[which](view, chosen)}</div>'


def _answer(view: View) -> list[str]:
    assert view.found is not None
    return [html.escape(view.names[i]) for i in view.found.tokens.tolist()]
