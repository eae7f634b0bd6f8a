"""Ask a vision-language model a benchmark's questions, with and without methods, and keep every answer.

`evaluate` executes the runs of `plan.py` over the tasks of `tasks/`, in left-padded batches through `generate`, in one
process or, under `accelerate launch` or `torchrun`, in several that share the batches. The output folder gets
`config.json` (the settings), `run.yaml` (the same as options, for `--config`), `samples.jsonl` (one line per answer, flushed
to disk after every batch, see `store.py`) and `results.json`; `report.tables.write` adds tables and a figure. Batches and
their random seeds depend only on the settings, so an interrupted and resumed run, or one shared between processes, gives
the same answers as any other.

Speed is measured on the run itself, after one untimed warm-up call per run and benchmark. tokens/s: new tokens, end token
included, per second inside `generate` (with prefill). First token: seconds from the call of `generate` to the first
sampled token of the batch, median over batches. Peak memory: that of the allocator on CUDA, else the resident size of the
process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vlm_fix
from vlm_fix import registry
from vlm_fix.calibrated import choose, read_all
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import options
from vlm_fix.eval.files import counted, write_atomic
from vlm_fix.eval.scorers import pope_prob
from vlm_fix.eval.scorers.registry import scorer_and_commit
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks import Task, build

from . import size, summary
from .elsewhere import Elsewhere
from .first import tokens_of
from .generation import answer, batches, peak_mb, reset_peak, warm_up
from .loading import check_revision, hardware, load_model, load_remote, load_served, outline
from .plan import Run, check_stacks, runs
from .store import Store, Team, held, load_results, read_config

BASELINE = ["baseline"]
VERSIONS = ("torch", "transformers", "accelerate", "numpy", "pillow", "nltk")
PROBABILITIES = ("accuracy", "auroc", "ece", "mass")
GIVE_UP_AFTER = 3  # batches in a row without any answer: then the method or the model is broken, not the data


# ------------------------------------------------------------------------------------------------------------ the run


def _run(
    model: Any, processor: Any, run: Run, seed: int, task: Task, settings: Settings, store: Store
) -> Iterator[int]:
    """Answer the batches that are not in the store yet; under a launcher, this process's share of them.

    Yields the number of finished samples after every batch, and at the end those of the other processes.
    """
    how = dataclasses.replace(settings, **dict(run.decoding)).generate_kwargs(task.max_new_tokens)
    plan = batches(task.samples, int(settings.batch_size))
    left = [i for i in range(len(plan)) if (run.name, seed, task.benchmark, i) not in store.rows]
    mine = left[store.team.rank :: store.team.size]
    yield len(task.samples) - sum(len(plan[i]) for i in left)
    if mine:
        warm_up(model, processor, plan[mine[0]], seed, how, settings.gen_kwargs)
        reset_peak(model.device)
    dead = 0
    for i in mine:
        rows = answer(model, processor, plan[i], seed, **how)
        place = {"run": run.name, "seed": seed, "benchmark": task.benchmark, "batch": i, "batch_size": len(plan[i])}
        peak = {"peak_mb": None if settings.server else peak_mb(model.device)}
        store.add(
            (run.name, seed, task.benchmark, i),
            [{**place, **sample.describe(), **row, **peak} for sample, row in zip(plan[i], rows, strict=True)],
        )
        dead = 0 if any(row["error"] is None for row in rows) else dead + 1
        if dead == GIVE_UP_AFTER:
            raise VlmFixError(
                f"{run.name}: no answer in {dead} batches of {task.benchmark} in a row ({rows[0]['error']}): "
                f"see {store.mine}, fix the cause and start again in another --output."
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
    """Run the baseline and the methods, keep everything in the folder `output` and return the content of results.json.

    With `resume`, batches already in `samples.jsonl` are kept; the settings must be the old ones. `loaded` is the result
    of `load_model` if the model is already in memory. `watch(run, done, samples)` is called after every batch; an
    exception from it ends the run, which can be resumed.
    """
    team = Team()
    console = console or Console(stderr=True, quiet=not team.first)
    folder = Path(output)
    methods = [method for stack in settings.methods for method in registry.parse(list(stack))]
    read_all(settings.calibration)
    check_revision(settings.model, settings.revision)
    if folder.exists() and not folder.is_dir():
        raise VlmFixError(f"--output {folder} is a file: give a folder.")
    if team.share((folder / "config.json").exists()) and not resume:
        raise VlmFixError(f"{folder} already holds a run: add --resume to continue it or choose another --output.")
    check_stacks(settings, None if loaded else outline(settings.model, settings.revision, settings.trust_remote_code))
    tasks = build(settings)
    model, processor, identity = loaded or _loaded(settings)
    calibration = choose(settings.calibration, model, methods)
    plan = runs(settings, model, tasks, calibration)
    for run in plan:  # report a bad value or combination now, not after an hour of baseline
        with run.applied(model, calibration, tell=True):
            pass
    if settings.batch_size == "auto":
        settings = dataclasses.replace(
            settings,
            batch_size=_auto_size(
                team, folder, resume, lambda: size.choose(model, processor, settings, tasks, plan, calibration)
            ),
        )
        console.print(f"batches of {settings.batch_size}", highlight=False)
    config = json.loads(
        json.dumps(
            {
                **dataclasses.asdict(settings),
                "model": identity,
                "source": settings.data,
                "data": {task.benchmark: task.data for task in tasks},
                "calibration": {c.method: _told(c.found) for c in calibration},
                "runs": {
                    run.name: {"decoding": dict(run.decoding), "seeds": run.seeds}
                    | ({"imitates": run.imitates} if run.imitates else {})
                    for run in plan
                },
            }
        )
    )
    with held(folder) if team.first else contextlib.nullcontext():
        store = Store(folder, config, resume, team)
        if team.first:
            write_atomic(folder / "run.yaml", options.to_text(settings))
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
            per_batch = int(settings.batch_size)
            order = [
                (run.name, s, t.benchmark, i)
                for run in plan
                for s in run.seeds
                for t in tasks
                for i in range(-(-len(t.samples) // per_batch))
            ]
            store.merge(order)
            words = {} if isinstance(model, Elsewhere) else tokens_of(processor.tokenizer)
            _write(config, plan, specs, tasks, store, model, words)
        team.wait()
    return load_results(folder)


def _told(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a calibration found, with a file as its name and hash: the same in every folder."""
    if not isinstance(file := found.get("file"), str):
        return dict(found)
    return {**found, "file": f"{Path(file).name} sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"}


def _loaded(settings: Settings) -> tuple[Any, Any, dict[str, Any]]:
    """Where `settings` want the model: behind a server, in vLLM, or here."""
    if settings.server:
        return load_remote(settings.model, settings.server)
    where = settings.model, settings.dtype, settings.device, settings.device_map
    if settings.engine == "vllm":
        return load_served(*where)
    return load_model(*where, settings.revision, settings.trust_remote_code, settings.model_args)


def _auto_size(team: Team, folder: Path, resume: bool, choose: Callable[[], int]) -> int:
    """Return the size that a run to be resumed had, else the smallest that the processes chose."""
    known = folder / "config.json"
    if resume and known.exists():
        return int(read_config(folder)["batch_size"])
    return min(team.gather(choose()))


def _write(
    config: dict[str, Any],
    plan: Sequence[Run],
    specs: dict[str, dict[str, str]],
    tasks: Sequence[Task],
    store: Store,
    model: Any,
    words: Mapping[str, Mapping[str, int]],
) -> None:
    """Write results.json from the answers in the store; `words` are the tokens that are yes and no."""
    names = [run.name for run in plan]
    results = {
        "vlm_fix": vlm_fix.__version__,
        "settings": config,
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
        "scorers": {task.benchmark: scorer_and_commit(config, task.benchmark) for task in tasks},
        "hardware": (isinstance(model, Elsewhere) and model.hardware) or hardware(model.device),
        "processes": store.team.size,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_memory_of": _memory_of(model),
        "runs": summary.summarise(names, tasks, store.of, config["seed"]),
        "changed": summary.changed(names, tasks, store.of),
        "warnings": {run: _warnings([r for t in tasks for r in store.of(run, t.benchmark)]) for run in names},
        "term_sd": {
            run: sds for run in names if (sds := term_sds([r for t in tasks for r in store.of(run, t.benchmark)]))
        },
        "gated": {
            run: found for run in names if (found := gated([r for t in tasks for r in store.of(run, t.benchmark)]))
        },
        "specs": specs,  # of runs whose name is not their spec
        "speed": {run: {t.benchmark: speed(store.of(run, t.benchmark)) for t in tasks} for run in names},
    }
    if any(sample.yes_no for task in tasks for sample in task.samples[:1]):
        asked = [row for run in names for task in tasks for row in store.of(run, task.benchmark)]
        results["probabilities"] = probabilities(asked, words)
    write_atomic(store.folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def _memory_of(model: Any) -> str:
    if isinstance(model, Elsewhere) and model.hardware:
        return "the server, not measured"
    return "CUDA allocator" if model.device.type == "cuda" else "process, resident (CPU)"


@contextlib.contextmanager
def _progress(console: Console, run: str, total: int) -> Iterator[Any]:
    """Show a progress bar with the time left on a terminal, otherwise one line at the end of the run."""
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
        console.print(
            f"{run}: {counted(total, 'sample')}, {time.perf_counter() - start:.0f} s", highlight=False, soft_wrap=True
        )


def speed(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return tokens/s (per process), median seconds to the first token and peak MB of the batches of a run and task."""
    first = {(row["seed"], row["batch"]): row for row in rows}.values()
    seconds = sum(row["batch_seconds"] for row in first)
    waits = [row["batch_first_token"] for row in first if row["batch_first_token"]]
    return {
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds if seconds else None,
        "first_token_seconds": statistics.median(waits) if waits else None,
        "peak_mb": max((row["peak_mb"] for row in rows if row["peak_mb"] is not None), default=None),
    }


def probabilities(rows: Sequence[Mapping[str, Any]], words: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the tokens that are yes and no, and run -> benchmark -> split -> figures by their probabilities."""
    found: dict[str, Any] = {f"{word}_tokens": [*tokens] for word, tokens in words.items()}
    found["of"] = "first token, after methods and logits processors, before temperature and top_p"
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    found["runs"] = runs
    for (run, benchmark, split), result in pope_prob.of_samples(rows).items():
        kept = {"n": result.n} | {name: result.figures[name] for name in PROBABILITIES}
        runs.setdefault(run, {}).setdefault(benchmark, {})[split] = kept
    return found


TERM = ("benchmark", "seed", "batch", "batch_term")


def term_sds(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return benchmark -> standard deviation of the contrast's term over all batches and seeds; {} without a contrast."""
    return {b: math.sqrt(squares / dof) if dof else None for b, (squares, dof) in _sums(rows, "batch_term").items()}


def gated(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return benchmark -> share of the steps of all answers that a contrast's gate left as they are; {} without a gate."""
    return {b: count / steps for b, (count, steps) in _sums(rows, "batch_gated").items() if steps}


def _sums(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[float]]:
    """Return benchmark -> the pairs of numbers that rows have of their batch, summed over batches and seeds."""
    pairs: dict[str, dict[Any, Any]] = {}
    for row in rows:
        if row.get(key):
            pairs.setdefault(row["benchmark"], {})[row["seed"], row["batch"]] = row[key]
    return {name: [math.fsum(part) for part in zip(*each.values(), strict=True)] for name, each in pairs.items()}


def _warnings(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return each warning of the model or a method (such as an edit that changed nothing) -> number of batches."""
    batches = {(row["seed"], row["benchmark"], row["batch"]): row["batch_warnings"] for row in rows}
    return dict(Counter(message for messages in batches.values() for message in messages))
