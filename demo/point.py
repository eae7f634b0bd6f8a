"""The Point tab: draw a box on the image; the model answers once as it is and once turned to the box (ControlMLLM)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import runner
from vlm_fix.methods.procedures.regions import shares

from . import compare, examples
from .cards import card
from .compare import Pane, Stop, sentence
from .drawn import picture
from .inside import canvas
from .models import Loaded, Models
from .page import notice, stoppable

METHOD, TOKENS = "control_mllm", 64
START = (56, 69, 88, 99)  # the first example's umbrella: left, top, right, bottom, in percent
SIDES = ("Left", "Top", "Right", "Bottom")
LEAST = 2  # percent: a click without a drag is no box
DRAG = """let from = null;
const at = event => {
  const frame = element.querySelector('.pick').getBoundingClientRect();
  return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height]
    .map(share => Math.round(100 * Math.min(1, Math.max(0, share))));
};
const span = ([a, b], [c, d]) =>
  ({left: Math.min(a, c), top: Math.min(b, d), right: Math.max(a, c), bottom: Math.max(b, d)});
element.addEventListener('pointerdown', event => {
  if (!event.target.closest('.pick')) return;
  from = at(event); event.preventDefault(); event.target.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', event => {
  if (!from) return;
  const s = span(from, at(event)), box = element.querySelector('.box').style;
  box.left = s.left + '%'; box.top = s.top + '%'; box.width = s.right - s.left + '%'; box.height = s.bottom - s.top + '%';
});
element.addEventListener('pointerup', event => { if (from) { trigger('select', span(from, at(event))); from = null; } });"""


def pad(image: Image.Image | None, box: Sequence[float]) -> str:
    """The image with the box on it, to draw another on."""
    if image is None:
        return '<p class="quiet">Choose an image in Compare first.</p>'
    left, top, right, bottom = box
    style = f"left:{left}%;top:{top}%;width:{right - left}%;height:{bottom - top}%"
    return f'<div class="pick">{picture(canvas(image), "Draw a box on this image")}<i class="box" style="{style}"></i></div>'


def spec(loaded: Loaded, image: Image.Image, box: Sequence[float]) -> str:
    """control_mllm with a box in percent of the image. VlmFixError for one that is no box, or that the model is not shown."""
    left, top, right, bottom = box
    if right - left < LEAST or bottom - top < LEAST:
        raise VlmFixError("That is no box: draw from one corner to the other, or set its sides in numbers.")
    pixels = [value / 100 * image.size[i % 2] for i, value in enumerate(box)]
    given = shares(pixels, image.size, loaded.processor.image_processor)
    return f"{METHOD}:box={'|'.join(f'{share:.4g}' for share in given)}"


def ask(loaded: Loaded, image: Image.Image, prompt: str, box: Sequence[float], stop: Stop) -> Iterator[list[Pane]]:
    """The model as it is, and turned to the box."""
    stack = [spec(loaded, image, box)]
    return compare.compare(loaded, image, prompt, [stack], TOKENS, stop=stop)


def tab(models: Models, name: gr.Dropdown, image: gr.Image, page: gr.Blocks, here: gr.Tab) -> None:
    """The tab's components and events; `image` is that of Compare."""
    stops: dict[str, Stop] = {}

    def read(path: str | None) -> Image.Image | None:
        try:
            return compare.read_image(path)
        except VlmFixError:
            return None

    def show(path: str | None, *box: float) -> list[Any]:
        return [pad(read(path), box), *_empty()]

    def drawn(event: gr.EventData, path: str | None) -> list[Any]:
        box = [float(getattr(event, side.lower())) for side in SIDES]
        return [*box, pad(read(path), box), *_empty()]

    def run(request: gr.Request, model: str, path: str | None, prompt: str, *box: float) -> Iterator[list[Any]]:
        stop = stops[request.session_hash or ""] = Stop()
        try:
            loaded, picked = models.get(model, stop), compare.read_image(path)
            for panes in ask(loaded, picked, prompt, box, stop):
                yield ["", *map(card, panes)]
        except Exception as error:  # a page shows one sentence, never a stack trace
            yield [notice(sentence(error)), *_empty()]
        finally:
            stop.set()

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            canvas_of = gr.HTML(pad(examples.scenes()[0].image, START), js_on_load=DRAG, elem_id="pad")
            gr.HTML(
                '<p class="quiet">Drag a box over the image of Compare. A small model follows it seldom: that of the '
                "paper has 7 billion parameters.</p>"
            )
            with gr.Accordion("The box in numbers", open=False):
                sides = [
                    gr.Slider(0, 100, value, step=1, label=f"{side}, percent", elem_id=f"box-{side.lower()}")
                    for side, value in zip(SIDES, START, strict=True)
                ]
        with gr.Column(scale=3, min_width=320):
            with gr.Row(elem_id="point-ask"):
                prompt = gr.Textbox(
                    "Please describe this image in detail.",
                    show_label=False,
                    label="Question",
                    container=False,
                    scale=6,
                )
                go = gr.Button("Ask", variant="primary", elem_id="point", min_width=90, scale=1)
                end = gr.Button("Stop", visible=False, elem_id="point-stop", min_width=70, scale=1)
            said = gr.HTML("", elem_id="point-notice")
            with gr.Row():
                cards = [gr.HTML(text, elem_id=f"pointed{i}") for i, text in enumerate(_empty())]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    events, asked = [go.click, prompt.submit], [name, image, prompt, *sides]
    stoppable(page, events, run, asked, [said, *cards], end, stops, concurrency_limit=8)
    canvas_of.select(drawn, image, [*sides, canvas_of, *cards], **quiet)
    gr.on([here.select, *(side.input for side in sides)], show, [image, *sides], [canvas_of, *cards], **quiet)


def _empty() -> list[str]:
    return [card(Pane(list(runner.BASELINE))), card(Pane([METHOD]))]
