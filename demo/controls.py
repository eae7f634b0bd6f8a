"""The controls of methods, made from their dataclasses: `help`, `low`, `high` and `choices` of the fields."""

from __future__ import annotations

import dataclasses
import html
import inspect
import typing
from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from vlm_fix import Method
from vlm_fix.registry import get_method
from vlm_fix.spelling import spelled


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
        if low is None or high is None or high > 1e6:  # a seed
            return gr.Number(value=now, minimum=low, maximum=high, precision=0 if kind is int else None, **common)
        step = 1 if kind is int else (high - low) / 100
        return gr.Slider(low + step if meta.get("open") else low, high, value=now, step=step, **common)
    shown = "" if value is None else spelled(value)
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
                found[method.name][field.name] = spelled(value)
    return found


def settings(page: gr.Blocks, names: gr.Dropdown, options: gr.State, fresh: gr.State) -> None:
    """Below a pane: the controls of the methods that are chosen in it, rebuilt when the choice or `fresh` changes."""

    @gr.render([names, options], triggers=[page.load, names.change, fresh.change])
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
                        concurrency_limit=None,  # queued: only then does a change of the state tell the panes
                        show_progress="hidden",
                        api_visibility="private",
                    )
