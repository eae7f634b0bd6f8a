"""The page as an MCP server: `describe`, `ask` and `compare` as tools for programs."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import runner
from vlm_fix.eval.tasks.sample import CAPTION_PROMPT
from vlm_fix.registry import split_methods

from . import compare, examples
from .compare import Pane, read_image, sentence
from .models import Models

IMAGE = "scene:0 to scene:11 or coco:519208 (examples), a data: URL or base64 of an image file"
LONGEST = 512


def image_of(text: str, own: bool) -> Image.Image:
    """An example's name, a data: URL, base64, or where `own` a file -> the image. Nothing is fetched from anywhere."""
    text = text.strip()
    if text.startswith(("scene:", "coco:")):
        return examples.find(text).image
    if own and len(text) < 4096 and Path(text).is_file():
        return read_image(text)
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError:
        data = b""
    if not data:
        raise VlmFixError(f"There is no such image: give {IMAGE}.")
    return read_image(io.BytesIO(data))


def as_row(pane: Pane) -> dict[str, Any]:
    """What a pane says, for a program. Words are listed where the truth is known."""
    words = [(node, label) for _, label, node in pane.words() if label]
    score = pane.score()
    return {
        "methods": pane.title,
        "answer": pane.text.strip(),
        "tokens": pane.tokens,
        "tokens_per_second": round(pane.tokens / pane.seconds, 1) if pane.seconds else None,
        "first_token_seconds": pane.first_token,
        "peak_memory_mb": round(pane.peak_mb),
        "grounded": [node for node, label in words if label == "grounded"] if score else None,
        "hallucinated": [node for node, label in words if label == "hallucinated"] if score else None,
        "chair_i": score.chair_i if score else None,
        "notes": pane.notes,
    }


def tools(models: Models) -> list[Callable[..., Any]]:
    """The three functions; each raises VlmFixError with a sentence for what cannot be done."""

    def panes(image: str, prompt: str, methods: str, longest: int, model: str, alone: bool) -> list[Pane]:
        """Of one stack alone, or of the baseline and all."""
        stacks = split_methods(methods) or [runner.BASELINE]
        if alone and len(stacks) > 1:
            raise VlmFixError(f"{methods!r} are {len(stacks)} runs: join methods with +, or call compare.")
        if not 1 <= longest <= LONGEST:
            raise VlmFixError(f"longest is {longest}: give 1 to {LONGEST} tokens.")
        loaded = models.get(model or models.names[0])
        if reason := next(filter(None, map(loaded.refusal, stacks)), ""):
            raise VlmFixError(reason)
        stacks = stacks if alone else [stack for stack in stacks if stack != runner.BASELINE]
        picture = image_of(image, models.any_name)
        *_, made = compare.compare(loaded, picture, prompt, stacks, longest, baseline=not alone)
        if failed := next((pane for pane in made if pane.state != "done"), None):
            raise VlmFixError(f"{failed.title}: {'; '.join(failed.notes) or failed.state}")
        return made

    def describe(image: str, methods: str = "vhr", longest: int = 128, model: str = "") -> str:
        """Describe an image with a vision-language model that is steered to hallucinate less.

        Args:
            image: scene:0 to scene:11 or coco:519208 (examples), a data: URL or base64 of an image file
            methods: the methods to apply, + stacks several, such as hiprune:keep=32+vcd; baseline for none
            longest: longest answer in tokens
            model: one of the models that the page offers; the first if empty
        """
        return panes(image, CAPTION_PROMPT, methods, longest, model, alone=True)[0].text.strip()

    def ask(image: str, question: str, methods: str = "vhr", longest: int = 64, model: str = "") -> str:
        """Ask a question about an image, such as: Is there a dog in the image?

        Args:
            image: scene:0 to scene:11 or coco:519208 (examples), a data: URL or base64 of an image file
            question: what to ask
            methods: the methods to apply, + stacks several, such as hiprune:keep=32+vcd; baseline for none
            longest: longest answer in tokens
            model: one of the models that the page offers; the first if empty
        """
        return panes(image, question, methods, longest, model, alone=True)[0].text.strip()

    def compare_methods(
        image: str, prompt: str = CAPTION_PROMPT, methods: str = "vcd,vhr", longest: int = 128, model: str = ""
    ) -> str:
        """Answers of the unchanged model and of each method side by side, with speed, memory and hallucinated objects, as JSON.

        Args:
            image: scene:0 to scene:11 or coco:519208 (examples), a data: URL or base64 of an image file
            prompt: what to ask
            methods: runs separated by commas, + stacks methods in one run: pai:alpha=0.5,hiprune:keep=32+vcd
            longest: longest answer in tokens
            model: one of the models that the page offers; the first if empty
        """
        return json.dumps([as_row(pane) for pane in panes(image, prompt, methods, longest, model, False)])

    compare_methods.__name__ = "compare"
    return [describe, ask, compare_methods]


def add(models: Models) -> None:
    """Offer the tools in the page that is being built."""
    for tool in tools(models):
        gr.api(_told(tool), api_name=tool.__name__, concurrency_limit=8)


def _told(tool: Callable[..., Any]) -> Callable[..., Any]:
    """The tool with its errors as one sentence for whoever calls it."""

    @functools.wraps(tool)
    def call(*given: Any, **named: Any) -> Any:
        try:
            return tool(*given, **named)
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    return call
