"""The Recommend tab: `vlm-fix recommend` on Picto, with a budget of minutes; candidates are watched while they are tried.

It works on a twin of the model and lets go of it after every candidate, as a benchmark does after every batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from rich.console import Console

from vlm_fix.eval.recommend.api import Recommendation, recommend, seconds_of
from vlm_fix.eval.recommend.candidates import Candidates
from vlm_fix.eval.recommend.live import SHOWN, Live
from vlm_fix.eval.recommend.search import Search

from . import choices
from .compare import Stop, Stopped, command, sentence
from .models import Loaded, Models
from .page import bar as page_bar
from .page import notice, places, steps, stoppable, watched

BUDGETS = {"1 minute: a look": "1m", "3 minutes": "3m", "10 minutes": "10m", "30 minutes: an answer": "30m"}
STEPS = (
    (
        "Search",
        "Every method that the model takes, at several strengths, on half of the scenes; the better half goes on.",
    ),
    (
        "Controls",
        "Random heads, noise, a bias towards yes search along. What does no better than they do is not proposed.",
    ),
    ("Proof", "The two best once more, on scenes that no search has seen. A chance of 5 % at most for a false claim."),
    (
        "Answer",
        "“better by x points”, with a preset to use, or “keep your model as it is”: in minutes, mostly the second.",
    ),
)
OBJECTIVES = ("hallucination", "captions", "questions")
TOKENS, BATCH = 64, 16


@dataclasses.dataclass(frozen=True)
class Row:
    """A candidate that has been measured; `out` says why the search dropped it ("": it is in)."""

    name: str
    images: int
    gain: float
    error: float
    missed: tuple[str, ...]
    control: bool
    out: str = ""


@dataclasses.dataclass
class Progress:
    """Where the search is; `found` at its end."""

    said: str = ""
    share: float = 0.0
    rows: list[Row] = dataclasses.field(default_factory=list)
    found: Recommendation | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a person asks for."""

    model: str
    split: str = "shift"
    scenes: int = 300
    budget: str = "3m"
    objective: str = "hallucination"
    only: tuple[str, ...] = ()

    def as_command(self) -> str:
        """The same on the command line."""
        options = {"model": self.model, "data": f"picto:{self.split}", "limit": self.scenes, "budget": self.budget}
        options |= {"objective": self.objective, "method": ",".join(self.only)}
        options |= {"batch-size": BATCH, "max-new-tokens": TOKENS, "out": "vlm-fix.yaml"}
        return command("", options).replace("vlm-fix eval ", "vlm-fix recommend", 1)


def search(loaded: Loaded, wanted: Wanted, folder: Path, stop: Stop) -> Iterator[Progress]:
    """Run, or continue, the search in `folder`; the last Progress has what was found, unless it was stopped.

    Raises what `recommend` raises. Closing the iterator stops the search after its candidate.
    """
    made = list[Recommendation]()
    total = seconds_of(wanted.budget)
    live = Live(total, Console(quiet=True))

    def work(tell: Callable[[Progress], None]) -> None:
        def watch(now: Search, candidates: Candidates, what: str) -> None:
            dropped = sorted((s for s in now.standings if s.images and s.out), key=lambda s: -s.score)
            rows = [
                Row(s.candidate.key, s.images, s.gain, s.error, tuple(s.missed), s.candidate.control, s.out)
                for s in [*now.alive, *dropped][:SHOWN]
            ]
            tell(Progress(live.line(now, what), min(1.0, now.clock() / total), rows))
            if stop.is_set():
                raise Stopped
            loaded.turn.pass_on()

        with loaded.turn:
            found = recommend(
                loaded.twin(),
                loaded.processor,
                f"picto:{wanted.split}",
                wanted.budget,
                wanted.objective,
                only=",".join(wanted.only),
                limit=wanted.scenes,
                batch_size=BATCH,
                max_new_tokens=TOKENS,
                out=folder / "vlm-fix.yaml",
                resume=True,
                identity=loaded.identity,
                command=wanted.as_command().replace("\\\n  ", "").strip(),
                watch=watch,
            )
            made.append(found)

    state = Progress("waiting for the model")
    yield state
    with contextlib.closing(watched(work, stop)) as news:
        for state in news:
            yield state
    if made:
        yield dataclasses.replace(state, share=1.0, found=made[0])


def bar(progress: Progress, said: str = "") -> str:
    """How much of the budget is spent, and what is being done."""
    return page_bar("Search", progress.share, said or progress.said)


def table(rows: Sequence[Row]) -> str:
    """The candidates, the best first, then those dropped: gain with one standard error, also as a bar from the model itself."""
    if not rows:
        return ""
    reach = max(1.0, *(abs(row.gain) + row.error for row in rows if row.error < float("inf")))
    made = []
    for row in rows:
        sure = row.error < float("inf")
        a, b = sorted((50.0, 50 + 50 * max(-1.0, min(1.0, row.gain / reach))))
        tone = "better" if row.gain > row.error else "worse" if row.gain < -row.error else ""
        out = ' class="out"' if row.out else ""
        role = " <i>control</i>" if row.control else ""
        why = row.out or (f"misses {', '.join(row.missed)}" if row.missed else "")
        missed = f"<small>{html.escape(why)}</small>" if why else ""
        told = f"{row.gain:+.1f} ± {row.error:.1f}" if sure else f"{row.gain:+.1f}"
        made.append(
            f'<tr{out}><th scope="row">{html.escape(row.name)}{role}{missed}</th><td class="{tone}"><b>{told}</b></td>'
            f'<td class="gain" aria-hidden="true"><i class="{tone}" style="left:{a:.1f}%;width:{b - a:.1f}%"></i></td>'
            f"<td>{row.images}</td></tr>"
        )
    heads = ("candidate", "points gained", "← worse · the model · better →", "images")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return f'<table class="board search"><thead><tr>{head}</tr></thead><tbody>{"".join(made)}</tbody></table>'


def verdict(found: Recommendation) -> str:
    """What came of it, as HTML."""
    said = found.verdict[:1].upper() + found.verdict[1:]
    return (
        f'<div class="verdict {"good" if found.better else "none"}" role="status"><p>{html.escape(said)}</p>'
        f"<small>{html.escape(str(found.report['objective']))}</small></div>"
    )


def tab(models: Models, name: gr.Dropdown, page: gr.Blocks, splits: dict[str, str]) -> None:
    """The tab's components and events."""
    stops: dict[str, Stop] = {}
    place: Callable[[gr.Request], Path] = places(page)

    def start(
        request: gr.Request, model: str, split: str, scenes: int, budget: str, objective: str, only: list[str]
    ) -> Iterator[list[Any]]:
        """Outputs: notice, verdict, bar, table, preset, both downloads, command."""
        stop = stops[request.session_hash or ""] = Stop()
        state, rest = Progress(), [gr.skip()] * 4
        hidden = [gr.Code(visible=False), *[gr.DownloadButton(visible=False)] * 2]
        wanted = Wanted(model, splits[split], int(scenes), BUDGETS[budget], objective, tuple(only))
        try:
            loaded = models.get(model, stop)
            folder = place(request) / f"recommend-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}"
            yield ["", "", bar(state, "starting"), gr.skip(), *hidden, wanted.as_command()]
            last = 0.0
            for state in search(loaded, wanted, folder, stop):
                if state.found:
                    out = folder / "vlm-fix.yaml"
                    yield [
                        "",
                        verdict(state.found),
                        bar(state, f"done in {state.found.report['seconds']:.0f} s"),
                        table(state.rows),
                        gr.Code(out.read_text(), visible=True),
                        gr.DownloadButton(value=str(out), visible=True),
                        gr.DownloadButton(value=str(out.with_suffix(".html")), visible=True),
                        gr.skip(),
                    ]
                elif time.monotonic() - last > 0.3:
                    last = time.monotonic()
                    yield [gr.skip(), gr.skip(), bar(state), table(state.rows) or gr.skip(), *rest]
            if not state.found:
                yield [gr.skip(), gr.skip(), bar(state, "stopped; Search continues there"), gr.skip(), *rest]
        except Exception as error:  # a page shows one sentence, never a stack trace
            yield [notice(sentence(error)), "", bar(state, "failed"), gr.skip(), *rest]
        finally:
            stop.set()

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            budget = gr.Radio(list(BUDGETS), value="3 minutes", label="Budget, for all of it", elem_id="budget")
            objective = gr.Radio(OBJECTIVES, value=OBJECTIVES[0], label="Objective")
            split = gr.Dropdown(list(splits), value=next(iter(splits)), label="Picto scenes")
            scenes = gr.Slider(20, 600, 300, step=20, label="Number of scenes", info="half to search, half to prove")
            only = gr.Dropdown(
                choices.method_choices(), multiselect=True, label="Methods", info="none chosen: all", elem_id="only"
            )
            with gr.Row():
                go = gr.Button("Search", variant="primary", elem_id="search", min_width=90)
                end = gr.Button("Stop", visible=False, elem_id="search-stop", min_width=90)
        with gr.Column(scale=3, min_width=320):
            said = gr.HTML("", elem_id="search-notice")
            told = gr.HTML("", elem_id="search-verdict")
            progress = gr.HTML(
                bar(
                    Progress(),
                    "Every method is tried on half of the scenes; the two best are proven on the other half.",
                ),
                elem_id="search-bar",
            )
            rows = gr.HTML(steps(STEPS), elem_id="search-table")
            with gr.Row():
                save = gr.DownloadButton("Download vlm-fix.yaml", visible=False, elem_id="save-preset")
                report = gr.DownloadButton("Download the report (HTML)", visible=False, elem_id="save-report")
            preset = gr.Code(language="yaml", label="vlm-fix.yaml", visible=False, interactive=False, elem_id="yaml")
            with gr.Accordion("Copy what was run", open=False):
                line = gr.Code(language="shell", label="As a command", interactive=False, elem_id="search-command")
    asked, outputs = (
        [name, split, scenes, budget, objective, only],
        [said, told, progress, rows, preset, save, report, line],
    )
    stoppable(page, [go.click], start, asked, outputs, end, stops, concurrency_limit=4)
