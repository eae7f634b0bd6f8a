"""The Compare tab: the baseline and up to three stacks of methods side by side, live, with coloured words.

Each method's controls are made from its dataclass: `help`, `low`, `high` and `choices` of its fields.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import itertools
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from vlm_fix import Method
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.tasks.sample import CAPTION_PROMPT
from vlm_fix.registry import get_method

from . import compare, examples
from .compare import Asked, Pane, Stop, read_image, stack_of
from .models import Models
from .page import CLICKS, method_choices, notice, stop_with

PROMPTS = [CAPTION_PROMPT, "Is there a person in the image?"]
START = (["vcd"], ["vhr"], ["hiprune"])  # what the panes begin with
LEGEND = (
    '<div class="legend"><mark class="grounded">grounded</mark> in the image &ensp; <mark class="hallucinated">'
    "hallucinated</mark> not in the image &ensp; plain: names no object. Words are coloured where the truth is known: on "
    "the example images. Click a word to look inside. Speeds are of this one answer; memory on a CPU is the whole "
    "process.</div>"
)


def card(pane: Pane | None) -> str:
    """One pane as HTML; everything that a model or a person wrote is escaped."""
    if pane is None:
        return '<div class="card"><h3>no method</h3><p class="said"><small>Choose a method above.</small></p></div>'
    said, words = "", itertools.count()
    for text, label, node in pane.words():
        number = next(words) if text.strip() else ""
        mark = f'mark class="{label}" title="{html.escape(node)}: {label}"' if label else "span"
        word = f'<{mark} data-word="{number}">{html.escape(text)}</{mark[:4]}>'
        said += word if text.strip() else html.escape(text)
    live = " live" if pane.state == "running" else ""
    lines = [f"<h3>{html.escape(pane.title)}</h3>", f'<p class="said{live}" aria-live="polite">{said}</p>']
    score = pane.score()
    if score and score.rows[0]["mentions"]:
        row = score.rows[0]
        tone = "bad" if row["hallucinated"] else "good"
        lines.append(
            f'<div class="rate {tone}"><b>{100 * score.chair_i:.0f} %</b><small>hallucinated (C<sub>i</sub>): '
            f"{row['hallucinated']} of {row['mentions']} objects named; "
            f"{row['found']} of {row['truth']} in the image found</small></div>"
        )
    if pane.state == "done":
        first = f" · first token after {pane.first_token:.2f} s" if pane.first_token else ""
        speed = f"{pane.tokens / pane.seconds:.0f} tokens/s" if pane.seconds else ""
        peak = f"{pane.peak_mb / 1e3:.1f} GB" if pane.peak_mb >= 1e4 else f"{pane.peak_mb:.0f} MB"
        lines.append(f"<small>{pane.tokens} tokens · {speed}{first} · peak memory {peak}</small>")
    elif pane.state in ("waiting", "running", "stopped"):
        lines.append(f"<small>{pane.state}{' for the model' if pane.state == 'waiting' else ''} …</small>")
    lines += [f'<div class="note">{html.escape(note)}</div>' for note in pane.notes]
    return f'<div class="card {pane.state}">{"".join(lines)}</div>'


def about(cls: type[Method]) -> str:
    """A method's docstring as HTML: its first line, its paper, and the rest to unfold."""
    first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    paper = f' <a href="{html.escape(cls.paper, quote=True)}" target="_blank">Paper</a>' if cls.paper else ""
    more = f"<details><summary>How it works</summary><pre>{html.escape(rest.strip())}</pre></details>" if rest else ""
    return f'<div class="about">{html.escape(first)}{paper}{more}</div>'


def control(cls: type[Method], field: dataclasses.Field[Any], text: str | None) -> Any:
    """The component for one field of a method; `text` is what was set before. A slider wherever a range is known.

    A float without an upper limit gets a slider up to five times its default; Python takes any legal value.
    """
    kind, meta = typing.get_type_hints(cls)[field.name], field.metadata
    value: Any = field.default
    common = {"label": field.name, "info": meta.get("help", ""), "interactive": True}
    if meta.get("choices"):
        empty = ["auto"] if value is None else []
        return gr.Dropdown([*empty, *meta["choices"]], value=text or value or "auto", **common)
    if kind is bool:
        return gr.Checkbox(value=value if text is None else text == "True", **common)
    if kind in (int, float):
        low, high, now = meta.get("low"), meta.get("high"), kind(value if text is None else text)
        if high is None and kind is float and value > 0:
            high = 1 if meta.get("counts") else 5 * value  # a share; a count is typed on the command line
        if low is None or high is None:
            return gr.Number(value=now, minimum=low, maximum=high, precision=0 if kind is int else None, **common)
        step = 1 if kind is int else (high - low) / 100
        return gr.Slider(low + step if meta.get("open") else low, high, value=now, step=step, **common)
    shown = "|".join(map(str, value)) if isinstance(value, tuple) else value
    return gr.Textbox(value=text or shown or "", placeholder="auto", max_lines=1, **common)


def remember(options: dict[str, dict[str, str]], value: Any, *, method: str, field: str) -> dict[str, dict[str, str]]:
    """The options with one more set; the default, or an emptied box, takes it out again."""
    default = next(f.default for f in dataclasses.fields(get_method(method)) if f.name == field)
    text = f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
    text = "" if value == default else text
    kept = {key: old for key, old in options.get(method, {}).items() if key != field}
    return {**options, method: {**kept, **({field: text} if text else {})}}


def options_of(stack: Sequence[Method]) -> dict[str, dict[str, str]]:
    """What a pane remembers of these methods: their settings that are not the default, as text."""
    found: dict[str, dict[str, str]] = {method.name: {} for method in stack}
    for method in stack:
        for field in dataclasses.fields(method):
            value = getattr(method, field.name)
            if value != field.default:
                found[method.name][field.name] = "|".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return found


def tab(
    models: Models, name: gr.Dropdown, asked: gr.State, page: gr.Blocks, preset: Sequence[Method] = ()
) -> list[gr.HTML]:
    """The tab's components and events; `asked` gets what was compared last. The first pane begins with `preset`, if there is
    one. Returns the cards, whose words can be clicked: the event has `word`, the number of the word."""
    starts = ([method.name for method in preset], *START[1:]) if preset else START
    stops: dict[str, Stop] = {}  # of each visitor's running comparison

    def run(
        request: gr.Request,
        model: str,
        image: str | None,
        prompt: str,
        longest: int,
        temperature: float,
        seed: int,
        count: int,
        *chosen: Any,
    ) -> Iterator[list[Any]]:
        """Outputs: notice, cards, Python, command, asked."""
        cards = len(START) + 1
        shown = [gr.skip()] * (cards + 4)
        stop = stops[request.session_hash or ""] = Stop()
        try:
            stacks = [stack_of(names, options) for names, options in zip(chosen[::2], chosen[1::2], strict=True)]
            used = [stack for stack in stacks[: count - 1] if stack]
            picture = read_image(image)
            what = (model, picture, prompt, used, compare.how(longest, temperature), seed)
            loaded = models.get(model)
            yield ["", *shown[1:-3], *compare.recipes(*what), None]
            panes: list[Pane] = []
            for panes in compare.compare(loaded, picture, prompt, used, longest, temperature, seed, stop):
                rest = iter(panes[1:])
                drawn = [card(next(rest)) if stack and i < count - 1 else card(None) for i, stack in enumerate(stacks)]
                yield [shown[0], card(panes[0]), *drawn, *shown[-3:]]
            places = [0, *(i for i, stack in enumerate(stacks[: count - 1], 1) if stack)]
            yield [*shown[:-1], Asked(model, picture, prompt, dict(zip(places, panes, strict=True)))]
        except VlmFixError as error:
            yield [notice(str(error)), *shown[1:]]
        finally:
            stop.set()

    def check(image: str | None) -> tuple[str, str]:
        try:
            read_image(image)
        except VlmFixError as error:
            return notice(str(error)), ""
        return "", ""

    def preview(model: str, names: list[str]) -> str:
        """The card of a stack that was just chosen: empty, or why it cannot run."""
        if not names:
            return card(None)
        try:
            reason = models.get(model).refusal(names)
        except VlmFixError as error:
            reason = str(error)
        return card(Pane(names, "failed", notes=[reason]) if reason else Pane(names))

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Row():
        with gr.Column(scale=1, min_width=290):
            first = examples.scenes()[0]
            image = gr.Image(
                first.image,
                label="Image",
                format="png",
                type="filepath",
                height=270,
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
                    columns=4,
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
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                with gr.Column(scale=4, min_width=240):
                    prompt = gr.Textbox(CAPTION_PROMPT, label="Prompt", max_lines=3, elem_id="prompt")
                    gr.Examples(PROMPTS, prompt, label="Prompts to try", elem_id="prompts")
                with gr.Column(scale=1, min_width=150):
                    with gr.Row():
                        go = gr.Button("Compare", variant="primary", elem_id="go", min_width=90)
                        end = gr.Button("Stop", elem_id="stop", min_width=70)
                    count = gr.Radio([2, 3, 4], value=3, label="Panes", elem_id="count")
            said = gr.HTML("", elem_id="notice")
            cards, inputs, columns = [], [], []
            with gr.Row(elem_id="panes"):
                with gr.Column(min_width=190):
                    gr.Dropdown(["baseline"], value=["baseline"], multiselect=True, label="Baseline", interactive=False)
                    cards.append(gr.HTML(card(Pane(["baseline"])), js_on_load=CLICKS, elem_id="pane0"))
                for number, start in enumerate(starts, 1):
                    with gr.Column(min_width=190, visible=number < 3) as column:
                        names = gr.Dropdown(
                            method_choices(),
                            value=start,
                            multiselect=True,
                            label=f"Methods {number}",
                            elem_id=f"m{number}",
                        )
                        options = gr.State(options_of(preset) if number == 1 else {})
                        cards.append(gr.HTML(card(Pane(start)), js_on_load=CLICKS, elem_id=f"pane{number}"))
                        _settings(page, names, options)
                        names.input(preview, [name, names], cards[-1], queue=False, **quiet)
                        inputs += [names, options]
                        columns.append(column)
            gr.HTML(LEGEND)
            with gr.Accordion("Generation", open=False), gr.Row():
                longest = gr.Slider(1, 512, 64, step=1, label="Longest answer", info="in tokens")
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
    gr.on(
        [go.click, prompt.submit],
        run,
        [name, image, prompt, longest, temperature, seed, count, *inputs],
        [said, *cards, python, command, asked],
        concurrency_limit=8,
        trigger_mode="once",
        **quiet,
    )
    stop_with(page, end, stops)
    count.input(
        lambda n: [gr.Column(visible=i < n) for i in range(1, len(START) + 1)], count, columns, queue=False, **quiet
    )
    image.upload(check, image, [said, credit], **quiet)
    image.clear(lambda: "", None, credit, **quiet)
    for gallery, group in zip(galleries, (examples.scenes(), examples.photographs()), strict=True):
        gallery.select(_picker(group), None, [image, said, credit], **quiet)
    return cards


def _picker(group: tuple[examples.Example, ...]) -> Callable[..., Any]:
    def pick(event: gr.SelectData) -> tuple[Any, str, str]:
        return group[event.index].image, "", f'<p class="quiet">{group[event.index].credit}</p>'

    return pick


def _settings(page: gr.Blocks, names: gr.Dropdown, options: gr.State) -> None:
    """Below a pane: the controls of the methods that are chosen in it, rebuilt whenever the choice changes."""

    @gr.render([names, options], triggers=[page.load, names.change])
    def controls(chosen: list[str], held: dict[str, dict[str, str]]) -> None:
        for name in chosen:
            cls = get_method(name)
            with gr.Accordion(f"{name}: settings", open=False):
                gr.HTML(about(cls))
                for field in dataclasses.fields(cls):
                    made = control(cls, field, held.get(name, {}).get(field.name))
                    made.change(
                        partial(remember, method=name, field=field.name),
                        [options, made],
                        options,
                        queue=False,
                        show_progress="hidden",
                        api_visibility="private",
                    )
