"""The page of `vlm-fix demo`: choose a model; compare methods, look inside, measure."""

from __future__ import annotations

import html
import importlib.util
import io
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from vlm_fix import presets
from vlm_fix.errors import VlmFixError
from vlm_fix.registry import read_stack

from . import benchmark, look, panes, point, recommended, tools
from .compare import Stop
from .here import HERE, OnlyHere
from .models import Models, bundled
from .page import notice, stop_with

MAX_FILE = "20mb"
KEPT_SECONDS = 3600  # an uploaded image is deleted after this, and all of them when the demo ends


def build(models: Models, mcp: bool = False, preset: str | None = None) -> gr.Blocks:
    """The page; its first model is loaded. `mcp`: with `tools.py` as endpoints; `preset`: a file of `vlm-fix recommend`."""
    first = models.get(models.names[0])
    if preset:
        presets.check(f"@{preset}", first.model)
    stack = read_stack(preset) if preset else []

    loads: dict[str, Stop] = {}  # session -> what it is loading

    def choose(request: gr.Request, name: str, before: str) -> Iterator[list[Any]]:
        """Outputs: about, notice, cancel, the model's name, the name of the one before."""
        session = request.session_hash or ""
        if session in loads:
            loads[session].set()
        stop = loads[session] = Stop()
        yield [
            head(f'<i class="spin"></i>Loading {html.escape(str(name))} …'),
            "",
            gr.Button(visible=True),
            *[gr.skip()] * 2,
        ]
        hidden = gr.Button(visible=False)
        try:
            loaded = models.get(name, stop)
            yield [head(loaded.about()), "", hidden, gr.skip(), loaded.name]
        except VlmFixError as error:
            if loads.get(session) is not stop:  # another one was chosen meanwhile
                return
            back = before if stop.is_set() else gr.skip()
            yield [head("No model"), notice(str(error)), hidden, back, gr.skip()]

    def head(about: str) -> str:
        return f'<h1>vlm-fix</h1><p><span class="tag">See a model hallucinate less. </span>{about}</p>'

    with gr.Blocks(title="vlm-fix demo", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        with gr.Row(elem_id="head", equal_height=True):
            with gr.Column(scale=3, min_width=260):
                about = gr.HTML(head(first.about()), elem_id="about")
            name = gr.Dropdown(
                models.names,
                value=first.name,
                label="Model: a Hugging Face name or a folder" if models.any_name else "Model",
                show_label=False,
                container=False,
                allow_custom_value=models.any_name,
                filterable=models.any_name,
                scale=1,
                min_width=220,
                elem_id="model",
            )
            cancel = gr.Button("Cancel", visible=False, size="sm", scale=0, min_width=80, elem_id="cancel")
        said = gr.HTML("", elem_id="model-notice")
        before = gr.State(first.name)
        asked = gr.State(None, time_to_live=KEPT_SECONDS)
        with gr.Tabs() as tabs:
            with gr.Tab("Compare", id="compare"):
                cards, image = panes.tab(models, name, about, asked, page, stack)
            with gr.Tab("Look inside", id="inside") as here:
                look.tab(models, asked, cards, tabs, here)
            with gr.Tab("Point", id="point") as pointing:
                point.tab(models, name, image, page, pointing)
            with gr.Tab("Benchmark", id="benchmark"):
                benchmark.tab(models, name, page)
            with gr.Tab("Recommend", id="recommend"):
                recommended.tab(models, name, page, benchmark.SPLITS)
        if mcp:
            tools.add(models)
        name.change(
            choose,
            [name, before],
            [about, said, cancel, name, before],
            show_progress="hidden",
            api_visibility="private",
            concurrency_limit=None,
            trigger_mode="multiple",
        )
        stop_with(page, cancel, loads)
    return page


def launch(
    model: str = "picto-llava",
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    mcp: bool = False,
    preset: str | None = None,
) -> None:
    """Load `model` and serve the page until interrupted. Raises VlmFixError for a model or port that cannot be used.

    Only on this machine's own address, and not shared, the page loads other models by name and opens folders.
    `preset` is a file of `vlm-fix recommend`, with which the first pane begins. `mcp` serves `tools.py` as an MCP server
    beside it, under /gradio_api/mcp/.
    """
    if mcp and not importlib.util.find_spec("mcp"):
        raise VlmFixError("the MCP server needs mcp: pip install 'vlm-fix[mcp]'")
    refused = VlmFixError(
        f"The page cannot be served on {host}, port {port or 'any'}: choose another --host or --port."
    )
    try:  # before a model is loaded
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except (OSError, OverflowError):
        raise refused from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the address is read in a log, too, as soon as it is there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the images go then, too
    own = host in HERE and not share
    with tempfile.TemporaryDirectory(prefix="vlm-fix-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(Models([model, *bundled()], any_name=own), mcp, preset)
        page.queue(max_size=32)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=share,
                show_error=True,
                max_file_size=MAX_FILE,
                ssr_mode=False,
                footer_links=[],
                mcp_server=mcp,
                app_kwargs={"middleware": [Middleware(OnlyHere)]} if own else {},
                **style(),
            )
        except OSError:
            raise refused from None


def style() -> dict[str, Any]:
    """Theme and style; no font is fetched from anywhere."""
    theme = gr.themes.Default(primary_hue="emerald", neutral_hue="slate", font=["system-ui", "sans-serif"])
    return {"theme": theme.set(block_radius="12px"), "css_paths": [Path(__file__).with_name("style.css")]}
