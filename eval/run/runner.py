"""Ask a vision-language model a benchmark's questions, with and without methods, and keep every answer.

`evaluate` makes the runs of `plan.py` over the tasks of `tasks/`, in left-padded batches through `generate`, in one
process or, under `accelerate launch` or `torchrun`, in several that share the batches. DIR holds `config.json` (what was
asked), `samples.jsonl` (one line per answer, flushed to disk after every batch, see `store.py`), `results.json`,
`table.md` and `figure.png`. Batches and their random seeds depend only on the settings, so a run that was killed and
resumed, or shared, gives the same answers as one that was not.

Speed is measured on the run itself, after one untimed warm-up call per run and benchmark: tokens/s = new tokens up to
and with the end token / seconds inside `generate` (prefill included); first token = seconds from the call of `generate`
to the first sampled token of the batch, median over batches; peak memory = the allocator's on CUDA, else the resident
size of the whole process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vlm_fix
from vlm_fix import registry
from vlm_fix.calibration.files import choose, read_all
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.report import layouts, summary
from vlm_fix.eval.report import tables as report
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.chair import words
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.tasks import Task, build

from .generation import answer, batches, peak_mb, reset_peak, warm_up
from .loading import hardware, load_model
from .plan import Run, runs
from .store import Store, Team, write_atomic

BASELINE = ["baseline"]
VERSIONS = ("torch", "transformers", "accelerate", "numpy", "pillow", "nltk")
GIVE_UP_AFTER = 3  # batches in a row without one answer: the method or the model is broken, not the data


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run. `methods` holds one list of specs per run; the baseline is added. `limit` counts images.

    `seeds` are those of sampling and of methods that draw at random (default: `seed` alone, which also draws the data);
    `controls` and `equal_compute` add the runs of `plan.runs`; `device_map` spreads the model over devices.
    `build` makes POPE's questions from a COCO folder's annotations even where there are official ones, `questions` are
    POPE files about other images; `drop_incomplete` drops a cut-off last sentence before CHAIR is scored.
    `max_new_tokens` None means the benchmark's own (`tasks.sample.MAX_NEW_TOKENS`); `dtype` "auto" is the checkpoint's on a
    GPU and float32 on a CPU.
    """

    benchmark: str = "all"
    model: str = "picto-llava"
    methods: tuple[tuple[str, ...], ...] = ()
    data: str = "picto"
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    splits: tuple[pope.Kind, ...] = ("random", "popular", "adversarial")
    scorer: yesno.Scorer = "official"
    variant: words.Variant | None = None
    prompt: str | None = None
    ids: str | None = None
    max_new_tokens: int | None = None
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    dtype: str = "auto"
    device: str = "auto"
    calibration: tuple[str, ...] = ()
    device_map: str | None = None
    seeds: tuple[int, ...] = ()
    controls: bool = False
    equal_compute: bool = False
    build: bool = False
    questions: tuple[str, ...] = ()
    drop_incomplete: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise VlmFixError(f"--{name.replace('_', '-')} is {value}: give a whole number of at least 1.")
        if self.sample and self.num_beams > 1:
            raise VlmFixError("--sample and --num-beams exclude each other: drop one of them.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise VlmFixError("--temperature must be above 0 and --top-p in (0, 1].")

        if len(set(self.seeds)) != len(self.seeds):
            raise VlmFixError(f"--seeds {','.join(map(str, self.seeds))} names a seed twice: give each once.")
        if self.device_map and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise VlmFixError(
                "--device-map spreads one model over all devices, and a launcher starts one per process: use one of them."
            )

    def generate_kwargs(self, max_new_tokens: int) -> dict[str, Any]:
        """Keyword arguments of `generate`; whatever the checkpoint's own generation config says is overridden."""
        how: dict[str, Any]
        if self.sample:
            how = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        else:
            how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**how, "num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens or max_new_tokens}


# ------------------------------------------------------------------------------------------------------------ the run


def _run(
    model: Any, processor: Any, run: Run, seed: int, task: Task, settings: Settings, store: Store
) -> Iterator[int]:
    """Answer what is not in the store yet, under a launcher this process's share of it; yields the number of samples
    finished, batch after batch, and the other processes' at the end."""
    how = dataclasses.replace(settings, **dict(run.decoding)).generate_kwargs(task.max_new_tokens)
    plan = batches(task.samples, settings.batch_size)
    left = [i for i in range(len(plan)) if (run.name, seed, task.benchmark, i) not in store.rows]
    mine = left[store.team.rank :: store.team.size]
    yield len(task.samples) - sum(len(plan[i]) for i in left)
    if mine:
        warm_up(model, processor, plan[mine[0]], seed, how)
        reset_peak(model.device)
    dead = 0
    for i in mine:
        rows = answer(model, processor, plan[i], seed, **how)
        place = {"run": run.name, "seed": seed, "benchmark": task.benchmark, "batch": i, "batch_size": len(plan[i])}
        peak = {"peak_mb": peak_mb(model.device)}
        store.add(
            (run.name, seed, task.benchmark, i),
            [{**place, **sample.describe(), **row, **peak} for sample, row in zip(plan[i], rows, strict=True)],
        )
        dead = 0 if any(row["error"] is None for row in rows) else dead + 1
        if dead == GIVE_UP_AFTER:
            raise VlmFixError(
                f"{run.name}: no answer in {dead} batches of {task.benchmark} in a row ({rows[0]['error']}): "
                f"see {store.mine}, mend the cause and start again in another --output."
            )
        yield len(plan[i])
    if len(mine) < len(left):
        yield sum(len(plan[i]) for i in {*left} - {*mine})


def evaluate(
    settings: Settings,
    output: str | Path,
    resume: bool = False,
    console: Console | None = None,
    loaded: tuple[Any, Any, dict[str, Any]] | None = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run baseline and methods, write everything into `output` and return what `results.json` holds.

    With `resume`, batches already in `samples.jsonl` are kept; settings other than the old ones are refused. `loaded`
    is what `load_model` gave, where the model is in memory already. `watch(run, done, samples)` is called after every
    batch; what it raises ends the run, which can then be resumed.
    """
    team = Team()
    console = console or Console(stderr=True, quiet=not team.first)
    folder = Path(output)
    methods = [method for stack in settings.methods for method in registry.parse(list(stack))]
    read_all(settings.calibration)
    if folder.exists() and not folder.is_dir():
        raise VlmFixError(f"--output {folder} is a file: give a folder.")
    if team.share((folder / "config.json").exists()) and not resume:
        raise VlmFixError(f"{folder} already holds a run: add --resume to continue it or choose another --output.")
    tasks = build(settings)
    model, processor, identity = loaded or load_model(
        settings.model, settings.dtype, settings.device, settings.device_map
    )
    calibration = choose(settings.calibration, model, methods)
    plan = runs(settings, model, tasks, calibration)
    for run in plan:  # a bad value or combination must not surface after an hour of baseline
        with run.applied(model, calibration):
            pass
    config = json.loads(
        json.dumps(
            {
                **dataclasses.asdict(settings),
                "model": identity,
                "source": settings.data,
                "data": {task.benchmark: task.data for task in tasks},
                "calibration": {c.method: c.found for c in calibration},
                "runs": {
                    run.name: {"decoding": dict(run.decoding), "seeds": run.seeds}
                    | ({"imitates": run.imitates} if run.imitates else {})
                    for run in plan
                },
            }
        )
    )
    store = Store(folder, config, resume, team)
    specs: dict[str, dict[str, str]] = {}
    for run in plan:
        done, samples = 0, sum(len(task.samples) for task in tasks) * len(run.seeds)
        parts = [(run, tasks)]
        if run.imitates:
            mine = [{k: row.get(k) for k in TERM} for t in tasks for row in store.of(run.imitates, t.benchmark)]
            sds = term_sds([row for share in team.gather(mine) for row in share])
            parts = [(run.sized(sds.get(task.benchmark)), [task]) for task in tasks]
            specs[run.name] = {task.benchmark: part.spec for part, (task,) in parts}
        with _progress(console, run.name, samples) as advance:
            for seed, (part, its) in itertools.product(run.seeds, parts):
                with part.applied(model, calibration, seed if settings.seeds else None):
                    for task in its:
                        for n in _run(model, processor, part, seed, task, settings, store):
                            advance(n)
                            done += n
                            if watch:
                                watch(run.name, done, samples)
    team.wait()
    if team.first:
        size = settings.batch_size
        order = [
            (run.name, s, t.benchmark, i)
            for run in plan
            for s in run.seeds
            for t in tasks
            for i in range(-(-len(t.samples) // size))
        ]
        store.merge(order)
        _write(config, plan, specs, tasks, store, model.device)
    team.wait()
    return report.load(folder)


def _write(
    config: dict[str, Any],
    plan: Sequence[Run],
    specs: dict[str, dict[str, str]],
    tasks: Sequence[Task],
    store: Store,
    device: torch.device,
) -> None:
    """results.json, table.md and figure.png from the answers in the store."""
    names = [run.name for run in plan]
    results = {
        "vlm_fix": vlm_fix.__version__,
        "settings": config,
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
        "scorers": {task.benchmark: layouts.scorer_of(config, task.benchmark) for task in tasks},
        "hardware": hardware(device),
        "processes": store.team.size,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_memory_of": "CUDA allocator" if device.type == "cuda" else "process, resident (CPU)",
        "runs": summary.summarise(names, tasks, store.of, config["seed"]),
        "changed": summary.changed(names, tasks, store.of),
        "warnings": {run: _warnings([r for t in tasks for r in store.of(run, t.benchmark)]) for run in names},
        "term_sd": {
            run: sds for run in names if (sds := term_sds([r for t in tasks for r in store.of(run, t.benchmark)]))
        },
        "specs": specs,  # of the runs whose name is not their spec
        "speed": {run: {t.benchmark: speed(store.of(run, t.benchmark)) for t in tasks} for run in names},
    }
    write_atomic(store.folder / "results.json", json.dumps(results, indent=2) + "\n")
    report.write(results, store.folder)


@contextlib.contextmanager
def _progress(console: Console, run: str, total: int) -> Iterator[Any]:
    """A bar with the time left on a terminal; elsewhere one line when the run is done."""
    start = time.perf_counter()
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        job = bar.add_task(run if len(run) <= 28 else run[:27] + "…", total=total)
        yield lambda n: bar.advance(job, n)
    if not console.is_terminal:
        console.print(f"{run}: {total} samples, {time.perf_counter() - start:.0f} s", highlight=False, soft_wrap=True)


def speed(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """tokens/s (of one process), median seconds to the first token and peak MB over the batches of a run and benchmark."""
    first = {(row["seed"], row["batch"]): row for row in rows}.values()
    seconds = sum(row["batch_seconds"] for row in first)
    waits = [row["batch_first_token"] for row in first if row["batch_first_token"]]
    return {
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds if seconds else None,
        "first_token_seconds": statistics.median(waits) if waits else None,
        "peak_mb": max((row["peak_mb"] for row in rows), default=None),
    }


TERM = ("benchmark", "seed", "batch", "batch_term")


def term_sds(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """benchmark -> standard deviation of the contrast's term over all batches and seeds (see `Term`); {} without one."""
    terms: dict[str, dict[Any, Any]] = {}
    for row in rows:
        if row.get("batch_term"):
            terms.setdefault(row["benchmark"], {})[row["seed"], row["batch"]] = row["batch_term"]
    sums = {name: [math.fsum(part) for part in zip(*each.values(), strict=True)] for name, each in terms.items()}
    return {name: math.sqrt(squares / dof) if dof else None for name, (squares, dof) in sums.items()}


def _warnings(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the model or a method warned of (such as an edit that touched nothing), with the number of batches."""
    batches = {(row["seed"], row["benchmark"], row["batch"]): row["batch_warnings"] for row in rows}
    return dict(Counter(message for messages in batches.values() for message in messages))
