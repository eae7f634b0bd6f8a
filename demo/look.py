"""The Look inside tab: click a word of an answer and see where in the image the model looked."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from . import inside, views
from .compare import Asked, sentence
from .drawn import figure, picture
from .inside import View
from .models import Models
from .page import CLICKS, notice

HEADS, THUMB = 12, 130  # heads in the gallery, and their pixels
HINT = "Compare something first; then choose an answer and click one of its words."
WAIT = "The answers are still being written. What you clicked opens when they are done."


def spoken(view: View, chosen: int) -> str:
    """The answer as buttons, one a word; the bar below a word is its attention on the image."""
    share = [float(view.mass(i).mean()) for i in range(len(view.words))]
    top = max(share, default=1) or 1
    buttons = []
    for i, word in enumerate(view.words):
        about = f"{100 * share[i]:.0f} % of its attention is on the image"
        about += f"; {word.node}: {word.label}" if word.label else ""
        buttons.append(
            f'<button type="button" data-word="{i}" class="word {word.label or ""}" title="{html.escape(about)}" '
            f'aria-pressed="{str(i == chosen).lower()}" style="--m:{share[i] / top:.3f}">{html.escape(word.text)}</button>'
        )
    return f'<div class="answer">{" ".join(buttons)}</div>'


def figures(view: View, chosen: int, layer: int | None, head: int | None) -> str:
    """The heatmaps of a word, and what pruners dropped and other branches see."""
    word, sinks = view.words[chosen], view.sinks(layer)
    raw, masked = (view.heatmap(chosen, layer, head, what) for what in ("raw", "masked"))
    (h, w), marked = raw.shape, int(sinks.sum())
    where = f"{'all layers' if layer is None else f'layer {layer}'}, {'all heads' if head is None else f'head {head}'}"
    made = [figure(inside.canvas(view.picture), "Image", f"as the model sees it, {h} × {w} patches")]
    share = float(view.mass(chosen, layer, head).mean())
    note = f"“{word.text}” puts {100 * share:.0f} % of its attention on the image; {where}"
    drawn = inside.overlay(view.picture, raw, float(raw.max()), sinks=sinks)
    made.append(figure(drawn, "Attention", note, _heat(float(raw.max()))))
    notes = []
    if marked:
        note = f"{marked} sink tokens (ringed) taken out; {100 * float(masked.sum()):.0f} % left"
        drawn = inside.overlay(view.picture, masked, float(masked.max()))
        made.append(figure(drawn, "Without sinks", note, _heat(float(masked.max()))))
    else:
        notes.append("No image token is an attention sink here.")
    if view.note:
        notes.append(view.note)
    elif view.base is None:
        notes.append("Choose a method’s answer to see what it changes.")
    else:
        change = view.heatmap(chosen, layer, head, "change")
        peak = float(change.abs().max())
        if peak <= 1e-3 * float(raw.max()):
            notes.append(f"{view.pane.title} leaves this attention as it is.")
        else:
            note = f"red: more, blue: less attention; {round(100 * float(change.sum()), 1) + 0.0:+} points in all"
            drawn = inside.overlay(view.picture, change, peak, signed=True)
            ends = ("change", f"−{100 * peak:.2g} %", "0", f"+{100 * peak:.2g} %")
            made.append(figure(drawn, f"{view.pane.title} minus baseline", note, ends))
    dropped = view.dropped(layer)
    if dropped is not None:
        where = "the last layer" if layer is None else f"layer {layer}"
        note = f"{int((~dropped).sum())} of {dropped.numel()} patches reach {where}"
        made.append(figure(inside.pruned(view.picture, dropped), "What the pruner keeps", note))
    made += [figure(inside.canvas(image), title, note) for title, note, image in view.others]
    said = html.escape(" ".join(notes))
    return f'<div class="figures">{"".join(made)}</div><p class="quiet">{said}</p>'


def _heat(peak: float) -> tuple[str, ...]:
    return "heat", "0", f"{100 * peak:.2g} % in a patch"


def heads(view: View, chosen: int, layer: int | None, head: int | None) -> str:
    """Every head's attention on the image as a grid of layers and heads, and the heads that look most as pictures."""
    mass = view.mass(chosen)
    depth, count = mass.shape
    top = float(mass.max()) or 1.0
    cells = []
    for i in range(depth):
        cells.append(f'<span class="axis">{i}</span>')
        for j in range(count):
            share = float(mass[i, j])
            picked = layer in (i, None) and head in (j, None) and (layer, head) != (None, None)
            cells.append(
                f'<i data-layer="{i}" data-head="{j}" class="{"on" if picked else ""}" style="--m:{share / top:.3f}" '
                f'title="layer {i}, head {j}: {100 * share:.0f} % on the image"></i>'
            )
    ranked = mass.flatten() if layer is None else mass[layer]
    thumbs = []
    for number in ranked.topk(min(HEADS, len(ranked))).indices.tolist():
        i, j = divmod(number, count) if layer is None else (layer, number)
        heat = view.heatmap(chosen, i, j)
        small = inside.overlay(view.picture, heat, float(heat.max()))
        small.thumbnail((THUMB, THUMB))
        about = f"layer {i}, head {j}: {100 * float(mass[i, j]):.0f} %"
        thumbs.append(
            f'<button type="button" data-layer="{i}" data-head="{j}">{picture(small, about, 80)}<span>{about}</span></button>'
        )
    where = "the model" if layer is None else f"layer {layer}"
    best = f"{100 * top:.0f} %"
    return (
        f'<div class="heads"><section><h4>Attention on the image, head by head</h4><div class="grid" role="img" '
        f'aria-label="{depth} layers by {count} heads; the largest share is {best}" style="--n:{count}">{"".join(cells)}'
        f'</div><p class="quiet">down: layers, across: heads; darkest: {best}</p></section>'
        f'<section><h4>The heads of {where} that look most</h4><div class="thumbs">{"".join(thumbs)}</div></section></div>'
    )


def tab(models: Models, asked: gr.State, cards: list[gr.HTML], tabs: gr.Tabs, here: gr.Tab) -> None:
    """The tab's components and events; a click on a word of `cards` comes here."""
    view, place, word = gr.State(None, time_to_live=3600), gr.State(None), gr.State(None)
    late = gr.State(False)  # whether something was clicked while the answers were being written
    said = gr.HTML(f'<p class="quiet">{HINT}</p>', elem_id="look-notice")
    with gr.Row():
        with gr.Column(scale=1, min_width=290, elem_id="look-how"):
            which = gr.Radio([], label="Answer of", visible=False, elem_id="which")
            what = gr.Radio(
                [views.ATTENTION, *views.VIEWS], value=views.ATTENTION, label="View", visible=False, elem_id="what"
            )
            layer = gr.Slider(
                -1, 1, -1, step=1, label="Layer", info="-1: mean over all", visible=False, elem_id="layer"
            )
            head = gr.Slider(-1, 1, -1, step=1, label="Head", info="-1: mean over all", visible=False, elem_id="head")
        with gr.Column(scale=3, min_width=320):
            answer = gr.HTML("", js_on_load=CLICKS, elem_id="answer")
            maps = gr.HTML("", elem_id="maps")
    gallery = gr.HTML("", js_on_load=CLICKS, elem_id="heads")
    drawn = [answer, maps, gallery]

    def draw(view: View | None, word: int | None, layer: int, head: int, what: str = views.ATTENTION) -> list[Any]:
        """The three drawings."""
        if view is None or not view.words:
            return [""] * 3
        chosen = view.first if word is None else max(0, min(int(word), len(view.words) - 1))
        i, j = (None if x < 0 else int(x) for x in (layer, head))
        if what in views.VIEWS and view.found is not None:
            return [spoken(view, chosen), views.shown(view, chosen, what), ""]
        return [spoken(view, chosen), figures(view, chosen, i, j), heads(view, chosen, i, j)]

    def turn(
        asked: Asked | None, view: View | None, word: int | None, layer: int, head: int, what: str
    ) -> Iterator[Any]:
        """Another of the views. Outputs: notice, sliders, drawings."""
        sliders = [gr.Slider(visible=what == views.ATTENTION)] * 2
        if view is None or asked is None or what == views.ATTENTION:
            yield ["", *sliders, *draw(view, word, layer, head)]
            return
        yield ['<p class="quiet"><i class="spin"></i>Looking through all layers …</p>', *sliders, gr.skip(), "", ""]
        try:
            inside.inspect(models.get(asked.model), asked.image, asked.prompt, view)
        except Exception as error:  # a page shows one sentence, never a stack trace
            yield [notice(sentence(error)), *[gr.skip()] * 5]
            return
        yield ["", gr.skip(), gr.skip(), *draw(view, word, layer, head, what)]

    def opened(
        asked: Asked | None, old: View | None, place: int | None, word: int | None, layer: int, head: int
    ) -> list[Any]:
        """Observe the chosen answer, unless that was done. Outputs: view, place, notice, radios, sliders, drawings."""
        sliders = [gr.Slider(visible=False)] * 2
        hidden = [gr.skip(), gr.Radio(visible=False), gr.Radio(visible=False), *sliders, *[""] * 3]
        if asked is None:
            return [None, None, f'<p class="quiet">{HINT}</p>', *hidden[1:]]
        if asked.running:
            return [None, place, f'<p class="quiet">{WAIT}</p>', *hidden[1:]]
        done = {i: pane for i, pane in asked.panes.items() if pane.state == "done"}
        place = place if place in done else max(done, default=None)
        if place is None:
            return [None, None, f'<p class="quiet">{HINT}</p>', *hidden[1:]]
        pane = done[place]
        radio = gr.Radio([(p.title, i) for i, p in done.items()], value=place, visible=True)
        try:
            made = (
                old
                if old and old.pane is pane
                else inside.look(models.get(asked.model), asked.image, asked.prompt, pane)
            )
        except Exception as error:  # a page shows one sentence, never a stack trace
            return [None, place, notice(sentence(error)), radio, *hidden[2:]]
        depth, count = made.seen.visual_mass.shape[:2]
        layer, head = min(layer, depth - 1), min(head, count - 1)
        sliders = [gr.Slider(maximum=n - 1, value=x, visible=True) for n, x in ((depth, layer), (count, head))]
        turned = gr.Radio(value=views.ATTENTION, visible=True)
        return [made, place, "", radio, turned, *sliders, *draw(made, word, layer, head)]

    def noted(asked: Asked | None, *rest: Any) -> list[Any]:
        """Open now, or if the answers are still being written when they are done."""
        return [asked is None or asked.running, *opened(asked, *rest)]

    def then(late: bool, asked: Asked | None, *rest: Any) -> list[Any]:
        if not late or asked is None or asked.running:
            return [gr.skip()] * (len(outputs) + 1)
        return [False, *opened(asked, *rest)]

    def clicked(number: int) -> Any:
        def go(event: gr.EventData) -> list[Any]:
            return [number, event.word, gr.Tabs(selected="inside")]

        return go

    def picked(event: gr.EventData, view: View | None, layer: int, head: int, what: str) -> list[Any]:
        return [event.word, *draw(view, event.word, layer, head, what)]

    def headed(event: gr.EventData, view: View | None, word: int | None) -> list[Any]:
        return [event.layer, event.head, *draw(view, word, event.layer, event.head)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
    inputs = [asked, view, place, word, layer, head]
    outputs = [view, place, said, which, what, layer, head, *drawn]
    here.select(noted, inputs, [late, *outputs], **quiet)
    asked.change(then, [late, *inputs], [late, *outputs], **quiet)
    which.input(lambda place: (place, None), which, [place, word], **quiet).then(opened, inputs, outputs, **quiet)
    what.input(
        turn, [asked, view, word, layer, head, what], [said, layer, head, *drawn], trigger_mode="always_last", **quiet
    )
    for number, card in enumerate(cards):
        card.select(clicked(number), None, [place, word, tabs], **quiet)
    quiet |= {"concurrency_limit": 1, "concurrency_id": "draw"}  # two quick clicks: the second has the last word
    answer.select(picked, [view, layer, head, what], [word, *drawn], **quiet)
    gallery.select(headed, [view, word], [layer, head, *drawn], **quiet)
    for slider in (layer, head):
        slider.input(draw, [view, word, layer, head], drawn, trigger_mode="always_last", **quiet)
