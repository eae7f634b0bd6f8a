"""What the demo does, without its page: one image, one prompt, the baseline and stacks of methods, live.

Answers go through `eval.generation.generate`, so that speed means here what it means in a benchmark. A model answers one
call at a time, pane after pane: nothing else slows the figures down, and a method never meets another one's model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from transformers import TextIteratorStreamer

import vlm_fix
from vlm_fix.decoding import ProcedureWing
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import generation, runner
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.yesno import verdict
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks.sample import CAPTION_PROMPT
from vlm_fix.registry import get_method
from vlm_fix.wing import engine_of

from . import examples
from .models import Loaded

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 25_000_000
REFRESH = 0.1  # least seconds between two pictures of a growing answer

Options = dict[str, dict[str, str]]
"""Method name -> field -> value as text, as a person set them in the page."""


def read_image(path: str | Path | io.BytesIO | Image.Image | None) -> Image.Image:
    """The image upright in RGB; one in memory is taken as it is.

    Raises VlmFixError for no image, no image file, or too many pixels, which are read off the header. The sentence
    holds no path: it is shown to whoever sent the file.
    """
    if isinstance(path, Image.Image):
        return path
    if not path:
        raise VlmFixError("There is no image yet: upload one or choose an example.")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise VlmFixError(
                    f"The image has {width} x {height} pixels; make it smaller than {MAX_PIXELS // 10**6} megapixels."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except VlmFixError:
        raise
    except Image.DecompressionBombError:
        raise VlmFixError(
            f"The image has far too many pixels; make it smaller than {MAX_PIXELS // 10**6} megapixels."
        ) from None
    except Exception:  # Pillow's decoders raise nearly anything on a broken file
        raise VlmFixError(f"This file is not a readable image: give a {', '.join(FORMATS)} file.") from None


def stack_of(names: Sequence[str], options: Options) -> list[str]:
    """Chosen methods and what was set for them -> spec strings without defaults. VlmFixError for a bad value."""
    return [get_method(name).from_options(options.get(name, {})).spec() for name in names]


@dataclasses.dataclass
class Pane:
    """One stack and its answer so far; `seconds` and what follows it are known when `state` is "done"."""

    stack: list[str]
    state: str = "idle"  # waiting, running, done, stopped, failed
    label: str = ""  # the true answer to a yes/no question; "": it is none, or the truth is unknown
    prepared: bool = False  # answered before the page was opened (see `prepared`)
    text: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    truth: frozenset[str] | None = None
    ids: list[int] = dataclasses.field(default_factory=list)  # of the answer's tokens
    tokens: int = 0
    seconds: float = 0.0
    first_token: float | None = None
    peak_mb: float = 0.0  # CUDA allocator, or on a CPU the whole process

    @property
    def title(self) -> str:
        return " + ".join(self.stack)

    def score(self) -> chair.ChairResult | None:
        """CHAIR of the answer so far (pattern variant), or None where the truth is unknown or there is no text."""
        if self.truth is None or not self.text.strip():
            return None
        return chair.score([chair.Caption(0, self.text)], {0: self.truth}, "pattern")

    def right(self) -> bool | None:
        """Whether a yes/no answer is the true one; None if that is not known. Neither yes nor no is wrong."""
        if not self.label or self.state != "done":
            return None
        return verdict(self.text, self.label, "ours") == self.label

    def words(self) -> list[tuple[str, str | None, str]]:
        """The text in words, objects and blanks (text, "grounded" | "hallucinated" | None, object); joined: the text.

        Of an answer to a yes/no question the yes or no is marked, as grounded where it is right.
        """
        score, pieces, at = self.score(), list[tuple[str, str | None, str]](), 0
        right = self.right()
        if right is not None and (said := re.search(r"\b(yes|no|not)\b", self.text, re.IGNORECASE)):
            mark = ("grounded", "right") if right else ("hallucinated", f"wrong, it is {self.label}")
            return [*_plain(self.text[: said.start()]), (said[0], *mark), *_plain(self.text[said.end() :])]
        caption = score.captions[0] if score else None
        marked = [(o, "grounded") for o in caption.correct] if caption else []
        marked += [(o, "hallucinated") for o in caption.hallucinated] if caption else []
        for item, label in sorted(marked, key=lambda pair: pair[0].start):
            pieces += _plain(self.text[at : item.start])
            pieces.append((self.text[item.start : item.end], label, item.node))
            at = item.end
        return [*pieces, *_plain(self.text[at:])]


def _plain(text: str) -> list[tuple[str, str | None, str]]:
    return [(part, None, "") for part in re.split(r"(\s+)", text) if part]


@dataclasses.dataclass
class Asked:
    """What was compared: `panes` by their place in the page. `how`: the image, the prompt and all settings as a person has
    set them, to tell answers of other ones. While it is `running`, there are no panes yet."""

    model: str
    image: Image.Image
    prompt: str
    panes: dict[int, Pane]
    how: tuple[Any, ...] = ()
    running: bool = False


class Stopped(Exception):
    """Raised inside `generate` to end it at the next token."""


class Stop(threading.Event):
    """Ends a comparison from another thread; `what` is being compared, in the page's terms."""

    what: Any = None


class _Live(TextIteratorStreamer):
    """Hands the answer over word by word, until `stop` is set."""

    def __init__(self, tokenizer: Any, stop: Stop) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = stop

    def put(self, value: Any) -> None:
        if self.stop.is_set():
            raise Stopped
        super().put(value)


def compare(
    loaded: Loaded,
    image: str | Path | Image.Image | None,
    prompt: str,
    stacks: Sequence[Sequence[str]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Stop | None = None,
    baseline: bool = True,
) -> Iterator[list[Pane]]:
    """Baseline and each stack in turn; yields all panes whenever one has grown, a last time when all are done.

    Temperature 0 is greedy. Raises VlmFixError for a bad image or prompt; what a method refuses is in its pane.
    """
    picture = read_image(image)
    prompt, options = prompt.strip(), how(max_new_tokens, temperature)
    if not prompt:
        raise VlmFixError(f'There is no prompt: ask something, such as "{CAPTION_PROMPT}"')
    stop = stop or Stop()
    example = examples.recognise(picture)
    truth = example.truth if example and not examples.yes_no(prompt) else None
    label = examples.label(example, prompt)
    panes = [
        Pane(list(stack), truth=truth, label=label) for stack in ([runner.BASELINE] if baseline else []) + list(stacks)
    ]
    try:
        for pane in panes:
            if stop.is_set():
                pane.state = "stopped"
                continue
            live = _Live(loaded.processor.tokenizer, stop)
            work = threading.Thread(
                target=_answer, args=(loaded, pane, live, picture, prompt, seed, options), daemon=True
            )
            pane.state = "waiting"
            yield panes
            work.start()
            shown = 0.0
            for piece in live:
                pane.text += piece
                if time.monotonic() - shown > REFRESH:
                    yield panes
                    shown = time.monotonic()
            work.join()
            first = panes[0]
            if baseline and pane is not first and first.state == pane.state == "done" and first.text == pane.text:
                pane.notes.append("Word for word the baseline's answer.")
            yield panes
    finally:
        stop.set()  # the page was closed: the answer that is being made ends at its next token
    yield panes


def _answer(
    loaded: Loaded, pane: Pane, live: _Live, image: Image.Image, prompt: str, seed: int, options: dict[str, Any]
) -> None:
    """Runs in a thread of its own; the end of `live` is told in any case, or its reader would wait for ever."""
    model = loaded.model
    try:
        with loaded.turn, warnings.catch_warnings(record=True) as caught:
            if live.stop.is_set():
                raise Stopped
            warnings.simplefilter("always", UserWarning)
            pane.state = "running"
            plain = pane.stack == runner.BASELINE
            generation.reset_peak(model.device)
            with contextlib.nullcontext() if plain else vlm_fix.wrapped(model, pane.stack):
                procedures = None if plain else engine_of(model).wing(ProcedureWing)
                streams = not procedures or all("streamer" not in m.refuses for m in procedures.searches)
                more = {**options, "streamer": live} if streams else options
                batch = generation.generate(model, loaded.processor, [image], [prompt], seed, **more)
            if not streams:
                live.text_queue.put(batch.texts[0])
            pane.peak_mb = generation.peak_mb(model.device)
        pane.notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
        if not batch.finished[0]:
            pane.notes.append("Cut off at the longest answer allowed.")
        pane.ids, pane.tokens = batch.ids[0], batch.tokens[0]
        pane.seconds, pane.first_token = batch.seconds, batch.first_token
        pane.state = "done"
    except Stopped:
        pane.state = "stopped"
    except Exception as error:  # a page shows one sentence, never a stack trace
        pane.notes.append(sentence(error))
        pane.state = "failed"
    finally:
        live.text_queue.put(live.stop_signal)


def sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if isinstance(error, VlmFixError) else f"{type(error).__name__}: {lines[0]}"


def how(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Keyword arguments of `generate`."""
    sample: dict[str, Any] = {"sample": True, "temperature": float(temperature)} if temperature else {}
    return Settings(**sample).generate_kwargs(int(max_new_tokens))


def recipes(
    model: str,
    image: str | Path | Image.Image,
    prompt: str,
    stacks: Sequence[Sequence[str]],
    options: dict[str, Any],
    seed: int,
) -> tuple[str, str]:
    """A Python script that gives the same answers; the same runs as a benchmark on the examples, on the command line.

    For an example, the benchmark's samples.jsonl then holds the same answers where decoding is greedy. Where it samples, the
    benchmark seeds each batch by its samples as well, and draws others.
    """
    example, prompt = examples.recognise(read_image(image)), prompt.strip()
    if example:
        lead, source = "", f'find("{example.name}").image'
    else:
        lead = "from PIL import Image, ImageOps\n\n"
        source = 'ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")  # your image'
    settings = ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
    python = (
        f"{lead}import vlm_fix\n{'from vlm_fix.demo.examples import find' + chr(10) if example else ''}"
        f"from vlm_fix.eval.run import generation, loading\n\n"
        f"model, processor, _ = loading.load_model({model!r})\n"
        f"image = {source}\n"
        f"for methods in {[runner.BASELINE, *map(list, stacks)]!r}:\n"
        "    with vlm_fix.wrapped(model, methods):\n"
        f"        answer = generation.generate(\n            model, processor, [image], [{prompt!r}],\n"
        f"            seed={int(seed)}, {settings},\n        )\n"
        '    print(" + ".join(methods), answer.texts[0], sep="\\n")\n'
    )
    kind, _, number = example.name.partition(":") if example else ("scene", "", str(examples.SCENES - 1))
    words = {
        "model": model,
        "method": ",".join("+".join(stack) for stack in stacks),
        "data": f"coco:{examples.FOLDER}" if kind == "coco" else f"picto:{examples.SPLIT}",
        "limit": "" if kind == "coco" else int(number) + 1,
        "batch-size": 1,
        "variant": "pattern",
        "prompt": prompt,
        "max-new-tokens": options["max_new_tokens"],
    }
    if options["do_sample"]:
        words["temperature"] = options["temperature"]
    return python, command("chair", words, ["--sample"] if options["do_sample"] else [])


def command(benchmark: str, options: dict[str, Any], flags: Sequence[str] = ()) -> str:
    """`vlm-fix eval` with these options, in several lines; empty ones are left out."""
    words = [f"--{key} {shlex.quote(str(value))}" for key, value in options.items() if value != ""]
    return f"vlm-fix eval {benchmark} " + " \\\n  ".join([*words, *flags]) + "\n"
