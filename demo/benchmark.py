"""The Benchmark tab: POPE and CHAIR on Picto scenes through `eval.run.runner`, watched and stopped from the page.

A benchmark works on a twin of the model (same weights, methods of its own) and lets go of the model after every batch:
whoever compares in the meantime waits for one batch at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from rich.console import Console

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic
from vlm_fix.eval.report import tables as report
from vlm_fix.eval.report.page import read
from vlm_fix.eval.run import runner
from vlm_fix.eval.settings import Settings
from vlm_fix.registry import split_methods

from . import board
from .choices import method_choices
from .compare import Stop, Stopped, command, sentence
from .models import Loaded, Models
from .page import bar, notice, places, steps, stoppable, watched

BATCH, MOST = 16, 500
KINDS = {"POPE: yes/no questions": "pope", "CHAIR: captions": "chair", "both": "all"}
SPLITS = {"shift: the prior is broken": "shift", "test: the prior holds": "test", "style: unseen pictographs": "style"}
SECONDS = 0.3  # between two pictures of the bar

STEPS = [
    (
        "Questions",
        "POPE: is there a …? Half of the objects are not in the scene; popular and adversarial ones are likely there.",
    ),
    (
        "Captions",
        "CHAIR: the share of the objects named that is not in the scene; recall, the share of those there that is named.",
    ),
    ("Intervals", "Every run answers about the same scenes, so each difference is paired, with its 95 % interval."),
    ("Verdict", "Better, worse, no difference seen, or better only by saying less or by saying no."),
]
"""What the tab will do."""


@dataclasses.dataclass
class Progress:
    """How far a benchmark is; `results` at its end."""

    run: str = ""
    done: int = 0
    total: int = 1
    seconds: float = 0.0
    left: float | None = None  # seconds
    results: dict[str, Any] | None = None

    def bar(self, now: str = "") -> str:
        """The bar and what is being asked, as HTML."""
        share = self.done / self.total
        left = "" if self.left is None else f", about {self.left:.0f} s left"
        said = now or f"{self.run}: {self.done} of {self.total} answers{left}"
        return bar("Benchmark", share, said)


def settings_of(model: str, kind: str, split: str, scenes: int, stacks: Sequence[str], seed: int) -> Settings:
    """Settings of the runner; VlmFixError for a bad number or method."""
    if not 1 <= int(scenes) <= MOST:
        raise VlmFixError(f"A benchmark in the page has 1 to {MOST} scenes, not {scenes}: use vlm-fix eval for more.")
    methods = dict.fromkeys(tuple(stack) for text in stacks for stack in split_methods(text))
    return Settings(
        benchmark=kind,
        model=model,
        methods=tuple(methods),
        data=f"picto:{split}",
        limit=int(scenes),
        batch_size=BATCH,
        variant="pattern",
        seed=int(seed),
    )


def as_command(settings: Settings) -> str:
    """The same benchmark on the command line."""
    options = {
        "model": settings.model,
        "method": ",".join("+".join(stack) for stack in settings.methods),
        "data": settings.data,
        "limit": settings.limit,
        "batch-size": settings.batch_size,
        "variant": settings.variant,
        "seed": settings.seed,
    }
    return command(settings.benchmark, options)


def run(loaded: Loaded, settings: Settings, folder: Path, stop: Stop) -> Iterator[Progress]:
    """Run, or continue, the benchmark in `folder`; the last Progress has the results, unless it was stopped.

    Raises what the runner raises. Closing the iterator stops the run after its batch.
    """
    runs, made = 1 + len(settings.methods), list[dict[str, Any]]()

    def work(tell: Callable[[tuple[str, int, int]], None]) -> None:
        def watch(name: str, done: int, samples: int) -> None:
            tell((name, done, samples))
            if stop.is_set():
                raise Stopped
            loaded.turn.pass_on()

        with loaded.turn:
            results = runner.evaluate(
                settings,
                folder,
                resume=True,
                console=Console(quiet=True),
                loaded=(loaded.twin(), loaded.processor, loaded.identity),
                watch=watch,
            )
            report.write(results, folder)
            made.append(results)

    state, finished, start, before = Progress("waiting for the model"), dict[str, int](), time.monotonic(), None
    yield state
    with contextlib.closing(watched(work, stop)) as news:
        for name, done, samples in news:
            finished[name] = done
            asked = sum(finished.values())
            before = asked if before is None else before  # what an earlier, stopped run had answered
            spent, total = time.monotonic() - start, runs * samples
            left = spent * (total - asked) / (asked - before) if asked > before else None
            state = Progress(name, asked, total, spent, left)
            yield state
    if made:
        yield dataclasses.replace(state, done=state.total, results=made[0])


def open_results(path: str | Path) -> dict[str, Any]:
    """results.json of a run, or of the folder that holds it; VlmFixError if it is not one."""
    file = Path(path).expanduser()
    if not (file / "results.json" if file.is_dir() else file).is_file():
        raise VlmFixError("There is no results.json: give the folder that vlm-fix eval wrote with --output.")
    try:
        ((_, results),) = read([file])
        report.markdown(results)
    except Exception as error:
        raise VlmFixError(f"This is no results.json of vlm-fix eval ({sentence(error)}): choose another.") from None
    return results


def table(results: dict[str, Any]) -> str:
    """The report's tables as Markdown, the differences in lines of their own, those that count in bold."""
    lines = []
    for line in report.markdown(results).splitlines():
        if line.startswith("|"):
            line = re.sub(r" \(([+-][^|]*?)\\\*\)", r" <small><strong>\1 *</strong></small>", line)
            line = re.sub(r" \(([+-][^|]*?)\)", r" <small>\1</small>", line)
        lines.append(line)
    return "\n".join(lines)


def keep(results: dict[str, Any], folder: Path) -> tuple[str, str]:
    """(path of the figure, path of a zip with everything) of results; writes what `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").exists():
        write_atomic(folder / "results.json", json.dumps(results, indent=2) + "\n")
        report.write(results, folder)
    name = f"vlm-fix-{Path(results['settings']['model']['name']).name}-{results['config_hash'][:8]}"
    return str(folder / "figure.png"), shutil.make_archive(str(folder.parent / name), "zip", folder)


def tab(models: Models, name: gr.Dropdown, page: gr.Blocks) -> None:
    """The tab's components and events."""
    stops: dict[str, Stop] = {}
    place = places(page)

    def shown(results: dict[str, Any], folder: Path) -> list[Any]:
        """Updates of verdict, table, all tables, figure and download."""
        picture, archive = keep(results, folder)
        return [
            board.verdict(results),
            board.table(results),
            table(results),
            gr.Image(picture, visible=True),
            gr.DownloadButton(value=archive, visible=True),
        ]

    def start(
        request: gr.Request, model: str, kind: str, split: str, scenes: int, stacks: list[str], seed: int
    ) -> Iterator[list[Any]]:
        stop = stops[request.session_hash or ""] = Stop()
        state, rest = Progress(), [gr.skip()] * 5
        try:
            settings = settings_of(model, KINDS[kind], SPLITS[split], scenes, stacks, seed)
            loaded = models.get(model, stop)
            folder = place(request) / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
            yield ["", state.bar("starting"), *rest, as_command(settings)]
            last = 0.0
            for state in run(loaded, settings, folder, stop):
                if state.results:
                    took = f"{state.total} answers in {state.seconds:.0f} s"
                    yield ["", state.bar(took), *shown(state.results, folder), gr.skip()]
                elif time.monotonic() - last > SECONDS:
                    last = time.monotonic()
                    yield [gr.skip(), state.bar(), *rest, gr.skip()]
            if not state.results:
                said = f"stopped after {state.done} of {state.total} answers; Run continues there"
                yield [gr.skip(), state.bar(said), *rest, gr.skip()]
        except Exception as error:  # a page shows one sentence, never a stack trace
            yield [notice(sentence(error)), state.bar("failed"), *rest, gr.skip()]
        finally:
            stop.set()

    def show(request: gr.Request, path: str) -> list[Any]:
        try:
            results = open_results(path)
            return ["", "", *shown(results, place(request) / f"opened-{results['config_hash'][:16]}")]
        except Exception as error:
            return [notice(sentence(error)), *[gr.skip()] * 6]

    with gr.Row():
        with gr.Column(scale=1, min_width=290):
            kind = gr.Radio(list(KINDS), value="both", label="Benchmark", elem_id="kind")
            split = gr.Dropdown(list(SPLITS), value=next(iter(SPLITS)), label="Picto scenes")
            scenes = gr.Slider(5, MOST, 40, step=5, label="Number of scenes", elem_id="scenes")
            stacks = gr.Dropdown(
                method_choices(),
                value=["vhr", "vcd", "hiprune"],
                multiselect=True,
                allow_custom_value=True,
                label="Methods, a run each",
                info="Or write one: pai:alpha=0.3, or hiprune:keep=32+vcd",
                elem_id="stacks",
            )
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            with gr.Row():
                go = gr.Button("Run", variant="primary", elem_id="run", min_width=90)
                end = gr.Button("Stop", visible=False, elem_id="halt", min_width=90)
            with gr.Accordion("Open earlier results", open=False, elem_id="open"):
                upload = gr.UploadButton("Choose results.json", file_types=[".json"], size="sm", elem_id="upload")
                # a page that others reach must not read folders for them
                folder = gr.Textbox(label="or a folder on this machine", visible=models.any_name, elem_id="folder")
        with gr.Column(scale=3, min_width=320):
            said = gr.HTML("", elem_id="bench-notice")
            so_far = gr.HTML(Progress().bar("Nothing has run yet."), elem_id="bar")
            told = gr.HTML("", elem_id="bench-verdict")
            short = gr.HTML(steps(STEPS), elem_id="board")
            figure = gr.Image(
                label="Gain over the baseline, with 95 % intervals",
                show_label=False,
                visible=False,
                interactive=False,
                buttons=["download", "fullscreen"],
                format="png",
                alt_text="POPE accuracy against the baseline, and CHAIR against recall, with 95 % intervals",
                elem_id="figure",
            )
            with gr.Accordion("All figures", open=False, elem_id="every"):
                results = gr.Markdown("", elem_id="table")
            save = gr.DownloadButton("Download results (zip)", visible=False, size="sm", elem_id="save")
            with gr.Accordion("Copy what was run", open=False):
                line = gr.Code(language="shell", label="As a command", interactive=False, elem_id="bench-command")
    outputs = [said, so_far, told, short, results, figure, save]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    asked = [name, kind, split, scenes, stacks, seed]
    stoppable(page, [go.click], start, asked, [*outputs, line], end, stops, concurrency_limit=4)
    upload.upload(show, upload, outputs, **private)
    if models.any_name:
        folder.submit(show, folder, outputs, **private)
