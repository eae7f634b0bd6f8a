"""The Compare tab: the baseline and up to three stacks of methods side by side, live, with coloured words.

What is shown is always the answer to the image, prompt and settings that are shown with it: `settle` looks after every
change which answers still are, takes the others away, and puts answers that were prepared in their place.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import gradio as gr
from PIL import Image

from vlm_fix import Method
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import runner
from vlm_fix.eval.tasks.sample import CAPTION_PROMPT

from . import choices, compare, examples, prepared
from .cards import LEGEND, card
from .choices import START
from .compare import Asked, Pane, Stop, read_image, stack_of
from .controls import options_of, settings
from .models import Models
from .page import CLICKS, notice, stop_with

GO, GOING = "Compare", "Comparing …"


@lru_cache(maxsize=8)
def seen(path: str | None) -> tuple[Image.Image, examples.Example | None]:
    """The image of a file of the page, and the example that it is; VlmFixError as `read_image`."""
    image = read_image(path)
    return image, examples.recognise(image)


def chips(example: examples.Example | None) -> str:
    """Prompts to try as buttons, in the order of `prompts`."""
    made = (
        f'<button type="button" data-ask="{i}">{html.escape(text)}</button>'
        for i, text in enumerate(["Describe", *(text.replace(" in the image", "") for text in examples.asks(example))])
    )
    return f'<div class="chips" role="group" aria-label="Prompts to try">{"".join(made)}</div>'


def prompts(example: examples.Example | None) -> list[str]:
    return [CAPTION_PROMPT, *examples.asks(example)]


def example_of(path: str | None) -> examples.Example | None:
    """The example in a file of the page; None for any other image, and for none."""
    try:
        return seen(path)[1]
    except VlmFixError:
        return None


class Board:
    """What belongs into the panes. `stops`: session -> its last comparison."""

    def __init__(self, models: Models) -> None:
        self.models, self.stops = models, dict[str, Stop]()

    def fresh(self, how: tuple[Any, ...], stack: Sequence[str]) -> Pane:
        """The pane of a stack that has not been asked with these settings: prepared, idle, or why it cannot run."""
        model, path, prompt, longest, temperature, _ = how
        loaded = self.models.loaded.get(model)
        if loaded:
            weights = loaded.identity.get("weights", "")
            known = prepared.pane(weights, example_of(path), prompt, longest, temperature, stack)
            if known:
                return known
            reason = loaded.refusal([] if stack == runner.BASELINE else stack)
            if reason:
                return Pane(list(stack), "failed", notes=[reason])
        return Pane(list(stack))

    def settled(self, asked: Asked | None, how: tuple[Any, ...], stacks: dict[int, list[str]]) -> Asked:
        """The answers of `asked` that are to these settings, and fresh panes for the others."""
        held = asked.panes if asked and asked.how == how else {}
        panes = {
            i: held[i] if i in held and held[i].stack == stack else self.fresh(how, stack)
            for i, stack in stacks.items()
        }
        try:
            image = seen(how[1])[0]
        except VlmFixError:
            image = Image.new("RGB", (1, 1))
        return Asked(how[0], image, how[2], panes, how)


def stacks_of(count: int, chosen: Sequence[Any]) -> dict[int, list[str]]:
    """Place -> stack of the panes that are shown and have methods; VlmFixError for a bad setting."""
    stacks = {0: list(runner.BASELINE)}
    for i, (names, options) in enumerate(zip(chosen[::2], chosen[1::2], strict=True), 1):
        if names and i < count:
            stacks[i] = stack_of(names, options)
    return stacks


def drawn(panes: dict[int, Pane]) -> list[str]:
    """The cards."""
    return [card(panes.get(i)) for i in range(len(START) + 1)]


def tab(
    models: Models, name: gr.Dropdown, about: gr.HTML, asked: gr.State, page: gr.Blocks, preset: Sequence[Method] = ()
) -> tuple[list[gr.HTML], gr.Image]:
    """The tab's components and events; `asked` gets what is answered, `about` changes when a model is loaded, the first pane
    begins with `preset`. Returns the cards, whose words can be clicked (the event has `word`, its number), and the image."""
    starts = ([method.name for method in preset], *START[1:]) if preset else START
    known, board, listed = choices.presets(preset), Board(models), choices.listed()
    stops = board.stops

    def run(request: gr.Request, old: Asked | None, *given: Any) -> Iterator[list[Any]]:
        """Outputs: notice, cards, Python, command, asked, both buttons."""
        model, image, prompt, longest, temperature, seed, count, *chosen = given
        how, shown = given[:6], [gr.skip()] * (len(START) + 7)
        stop = stops[request.session_hash or ""] = Stop()
        try:
            stacks = stacks_of(count, chosen)
            stop.what = (how, stacks)
            picture, used = read_image(image), [stack for i, stack in stacks.items() if i]
            recipes = compare.recipes(model, picture, prompt, used, compare.how(longest, temperature), seed)
            waiting = Asked(model, picture, prompt, {}, how, running=True)
            cards = drawn({i: Pane(stack, "waiting") for i, stack in stacks.items()})
            yield ["", *cards, *recipes, waiting, gr.Button(GOING, interactive=False), gr.Button(visible=True)]
            panes: list[Pane] = []
            for panes in compare.compare(
                models.get(model, stop), picture, prompt, used, longest, temperature, seed, stop
            ):
                yield [shown[0], *drawn(dict(zip(stacks, panes, strict=True))), *shown[-5:]]
            made = Asked(model, picture, prompt, dict(zip(stacks, panes, strict=True)), how)
            yield [*shown[:-3], made, *shown[-2:]]
        except VlmFixError as error:
            now = board.settled(old, how, stop.what[1]) if stop.what else None
            cards = drawn(now.panes) if now else shown[: len(START) + 1]
            yield [notice(str(error)), *cards, *shown[:2], now or gr.skip(), *shown[-2:]]
        finally:
            stop.set()

    def settle(request: gr.Request, old: Asked | None, *given: Any) -> list[Any]:
        """After any change. Outputs: cards, asked."""
        skipped = [gr.skip()] * (len(START) + 2)
        how, (count, *chosen) = given[:6], given[6:]
        try:
            stacks = stacks_of(count, chosen)
        except VlmFixError:  # a box is half written; Compare says what is wrong with it
            return skipped
        going = stops.get(request.session_hash or "")
        if going and not going.is_set():
            if going.what in (None, (how, stacks)):
                return skipped
            going.set()  # its end settles again
        now = board.settled(old, how, stacks)
        if old and not old.running and old.how == how and old.panes == now.panes:
            return skipped
        return [*drawn(now.panes), now]

    def ended() -> list[Any]:
        return [gr.Button(GO, interactive=True), gr.Button(visible=False)]

    def check(path: str | None) -> list[str]:
        """What is said of a new image: notice, credit, prompts to try."""
        try:
            example = seen(path)[1]
        except VlmFixError as error:
            return [notice(str(error)) if path else "", "", chips(None)]
        return ["", f'<p class="quiet">{example.credit}</p>' if example else "", chips(example)]

    def put(chosen: str, fresh: int) -> list[Any]:
        """A preset in the panes. Outputs: names and options of each, number of panes, columns, fresh."""
        if chosen not in known:
            return [gr.skip()] * (3 * len(START) + 2)
        stacks = known[chosen]
        pairs = [x for stack in stacks for x in ([method.name for method in stack], options_of(stack))]
        return [*pairs, len(stacks) + 1, *(gr.Column(visible=True) for _ in START), fresh + 1]

    def place(event: gr.EventData, count: int, fresh: int, *chosen: Any) -> list[Any]:
        """A method of the catalogue in a pane. Outputs: as of `put`."""
        at, now = int(event.pane), list(chosen)
        now[2 * at - 2 : 2 * at] = [[listed[int(event.method)]], {}]
        count = max(count, at + 1)
        return [*now, count, *(gr.Column(visible=i < count) for i in range(1, len(START) + 1)), fresh + 1]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    first = examples.scenes()[0]
    with gr.Row(elem_id="compare"):
        with gr.Column(scale=1, min_width=270, elem_id="left"):
            image = gr.Image(
                first.image,
                label="Image",
                format="png",
                type="filepath",
                height=250,
                sources=["upload", "webcam", "clipboard"],
                buttons=[],
                alt_text="The image that is asked about",
                elem_id="image",
            )
            # read_image looks at the header before anything is decoded, and says what is wrong in one sentence
            image.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
            credit = gr.HTML(f'<p class="quiet">{first.credit}</p>', elem_id="credit")
            galleries = [
                gr.Gallery(
                    [(example.image, example.about) for example in group],
                    label=label,
                    columns=6,
                    height="auto",
                    format="png",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id=elem_id,
                    elem_classes="examples",
                )
                for group, label, elem_id in (
                    (examples.scenes(), "Picto scenes", "examples"),
                    (examples.photographs(), "COCO photographs (CC BY)", "photographs"),
                )
            ]
        with gr.Column(scale=4, min_width=320):
            with gr.Row(elem_id="ask"):
                prompt = gr.Textbox(
                    CAPTION_PROMPT,
                    label="Prompt",
                    show_label=False,
                    container=False,
                    max_lines=3,
                    scale=8,
                    min_width=200,
                    elem_id="prompt",
                )
                go = gr.Button(GO, variant="primary", elem_id="go", min_width=120, scale=1)
                end = gr.Button("Stop", visible=False, elem_id="stop", min_width=70, scale=1)
            tried = gr.HTML(chips(first), js_on_load=CLICKS, elem_id="asks")
            said = gr.HTML("", elem_id="notice")
            with gr.Row(elem_id="choose"):
                gr.HTML(LEGEND, min_width=260)
                ready = gr.Dropdown(
                    list(known),
                    value=next(iter(known)),
                    label="Preset",
                    show_label=False,
                    container=False,
                    scale=2,
                    min_width=210,
                    elem_id="preset",
                )
                count = gr.Radio(
                    [("2", 2), ("3", 3), ("4 panes", 4)],
                    value=4,
                    label="Panes",
                    show_label=False,
                    container=False,
                    scale=2,
                    min_width=190,
                    elem_id="count",
                )
            cards, inputs, columns = [], [], []
            fresh = gr.State(0)
            weights = models.get(models.names[0]).identity.get("weights", "")
            at_first = [
                prepared.pane(weights, first, CAPTION_PROMPT, prepared.LONGEST, 0, stack) or Pane(stack)
                for stack in (list(runner.BASELINE), *([m.spec() for m in preset] or START[0], *START[1:]))
            ]
            with gr.Row(elem_id="panes"):
                with gr.Column(min_width=190):
                    gr.HTML('<p class="plain">the model as it is</p>')
                    cards.append(gr.HTML(card(at_first[0]), js_on_load=CLICKS, elem_id="pane0"))
                for number, start in enumerate(starts, 1):
                    with gr.Column(min_width=190) as column:
                        names = gr.Dropdown(
                            choices.method_choices(),
                            value=start,
                            multiselect=True,
                            label=f"Methods {number}",
                            show_label=False,
                            container=False,
                            elem_id=f"m{number}",
                        )
                        options = gr.State(options_of(preset) if number == 1 else {})
                        cards.append(gr.HTML(card(at_first[number]), js_on_load=CLICKS, elem_id=f"pane{number}"))
                        settings(page, names, options, fresh)
                        inputs += [names, options]
                        columns.append(column)
            with gr.Accordion(f"All {len(listed)} methods, by kind", open=False, elem_id="all"):
                book = gr.HTML(choices.catalogue(len(START)), js_on_load=CLICKS, elem_id="catalogue")
            with gr.Accordion("Generation", open=False), gr.Row():
                longest = gr.Slider(1, 512, prepared.LONGEST, step=1, label="Longest answer", info="in tokens")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: greedy")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            with gr.Accordion("Copy what was run", open=False, elem_id="copy"):
                python = gr.Code(language="python", label="As Python", interactive=False, elem_id="python")
                command = gr.Code(
                    language="shell",
                    label="As a command: the same runs, scored on the examples",
                    interactive=False,
                    elem_id="command",
                )
    given: list[Any] = [name, image, prompt, longest, temperature, seed, count, *inputs]
    running = gr.on(
        [go.click, prompt.submit],
        run,
        [asked, *given],
        [said, *cards, python, command, asked, go, end],
        concurrency_limit=8,
        trigger_mode="once",
        **quiet,
    )
    running.then(ended, None, [go, end], queue=False, **quiet).then(
        settle, [asked, *given], [*cards, asked], concurrency_limit=None, **quiet
    )
    gr.on(
        [page.load, about.change, *(each.change for each in given)],
        settle,
        [asked, *given],
        [*cards, asked],
        trigger_mode="always_last",
        concurrency_limit=None,
        **quiet,
    )
    stop_with(page, end, stops)
    count.input(
        lambda n: [gr.Column(visible=i < n) for i in range(1, len(START) + 1)], count, columns, queue=False, **quiet
    )
    chosen_now = [*inputs, count, *columns, fresh]
    ready.input(put, [ready, fresh], chosen_now, concurrency_limit=None, **quiet)
    book.select(place, [count, fresh, *inputs], chosen_now, concurrency_limit=None, **quiet)
    tried.select(_ask, image, prompt, queue=False, **quiet)
    image.change(check, image, [said, credit, tried], **quiet)
    for gallery, group in zip(galleries, (examples.scenes(), examples.photographs()), strict=True):
        gallery.select(_picker(group), None, image, **quiet)
    return cards, image


def _ask(event: gr.EventData, path: str | None) -> str:
    return prompts(example_of(path))[int(event.ask)]


def _picker(group: tuple[examples.Example, ...]) -> Callable[..., Image.Image]:
    def pick(event: gr.SelectData) -> Image.Image:
        return group[event.index].image

    return pick
