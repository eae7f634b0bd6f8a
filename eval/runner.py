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
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList

import vlm_fix
from vlm_fix import registry
from vlm_fix.calibration import choose, read_all
from vlm_fix.errors import VlmFixError

from . import layouts, picto, pope, report, summary, words, yesno
from .plan import Run, runs
from .store import Store, Team, write_atomic
from .tasks import Task, build
from .tasks.sample import Sample, load_image

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


# ---------------------------------------------------------------------------------------------------------- the model


def check_device(device: str) -> None:
    """VlmFixError for a --device that is not known or not there."""
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdigit()):
        raise VlmFixError(f"--device {device} is unknown: give auto, cpu, cuda or cuda:N.")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= seen:
        raise VlmFixError(f"--device {device} was asked for but torch sees {seen or 'no'} CUDA GPU: use --device cpu.")


def load_model(
    name: str, dtype: str = "auto", device: str = "auto", device_map: str | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """(model, processor, identity) of a Hugging Face name, a directory or a bundled model such as "picto-llava".

    `device` "auto" is every GPU that the model needs, or the process's own GPU under a launcher, else the CPU.
    """
    check_device(device)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    path = str(picto.model_path(name)) if name.startswith("picto-") and not Path(name).exists() else name
    remedy = "give a directory with a checkpoint, a Hugging Face name that this machine can download, or picto-llava."
    if name.startswith(("/", ".", "~")) and not Path(path).exists():
        raise VlmFixError(f"model {name!r} could not be loaded (there is no such folder): {remedy}")
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "auto" and cuda and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=("auto" if cuda else torch.float32) if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map or (device if cuda else None),
        ).eval()
    except (OSError, ValueError, ImportError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VlmFixError(f"model {name!r} could not be loaded ({cause.rstrip('.')}): {remedy}") from error
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "tokenizer"):
        raise VlmFixError(f"the processor of {name!r} has no chat template: add chat_template.jinja to the checkpoint.")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    identity = {
        "name": name,
        "type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": _weights_id(path, model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    return model, processor, identity


def _weights_id(path: str, model: Any) -> str:
    """The hub revision, or for a directory the sha256 over its weight files."""
    if not Path(path).is_dir():
        return f"revision:{getattr(model.config, '_commit_hash', None) or 'unknown'}"
    digest = hashlib.sha256()
    for file in sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


# ----------------------------------------------------------------------------------------------------------- a batch


class _FirstToken(StoppingCriteria):
    """Never stops anything; notes when the first new token had been chosen."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclasses.dataclass
class Batch:
    """Answers to one batch: text, new tokens and whether the end token came, with the seconds they took."""

    texts: list[str]
    tokens: list[int]
    finished: list[bool]
    seconds: float
    first_token: float | None
    ids: list[list[int]] = dataclasses.field(repr=False, default_factory=list)  # of the new tokens
    term: tuple[float, int] | None = None  # sum of squares and degrees of freedom of a contrast's `Term`


def encode(model: Any, processor: Any, images: Sequence[Any], prompts: Sequence[str]) -> Any:
    """A left-padded batch of (image, prompt) pairs through the model's chat template, on the model's device."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    tokenizer = processor.tokenizer
    # a template that writes the start token itself must not get a second one
    twice = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
    return processor(
        images=[[image] for image in images],
        text=texts,
        padding=True,
        return_tensors="pt",
        **({"add_special_tokens": False} if twice else {}),
    ).to(model.device, model.dtype)


def generate(model: Any, processor: Any, images: Sequence[Any], prompts: Sequence[str], seed: int, **how: Any) -> Batch:
    """Answer each (image, prompt) pair through `generate`."""
    inputs, tokenizer = encode(model, processor, images, prompts), processor.tokenizer
    torch.manual_seed(seed)
    clock = _FirstToken()
    start = time.perf_counter()
    output = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([clock]), **how)
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    seconds = time.perf_counter() - start
    new = output[:, inputs["input_ids"].shape[1] :].cpu()
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    is_end = torch.isin(new, torch.tensor(ends if isinstance(ends, list) else [ends]))
    finished = is_end.any(dim=1)
    tokens = torch.where(finished, is_end.int().argmax(dim=1) + 1, new.shape[1])
    term = vlm_fix.contrast_term(model)
    return Batch(
        texts=[text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)],
        tokens=tokens.tolist(),
        finished=finished.tolist(),
        seconds=seconds,
        first_token=clock.at - start if clock.at else None,
        ids=[row[:n] for row, n in zip(new.tolist(), tokens.tolist(), strict=True)],
        term=(term.squares, term.dof) if term else None,
    )


def batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Samples in batches of similar prompt length, then image size; a function of the samples alone, never of what is
    already done or of how many processes there are."""
    order = sorted(samples, key=lambda s: (len(s.prompt.split()), len(s.prompt), _pixels(s)))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _pixels(sample: Sample) -> int:
    """Width times height, from the header of a file; 0 where it cannot be read, which `load_image` will tell."""
    if isinstance(sample.image, Image.Image):
        return math.prod(sample.image.size)
    with contextlib.suppress(Exception), Image.open(sample.image) as image:
        return math.prod(image.size)
    return 0


def _seed(seed: int, samples: Sequence[Sample]) -> int:
    """One seed per batch, equal for every run: methods are compared under common random numbers."""
    text = "|".join([str(seed), *(sample.id for sample in samples)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def _warn_anew(model: Any) -> None:
    """A wrapped model warns once; here every batch tells, also after the warm-up, which nobody hears."""
    engine = getattr(model, "_vlm_fix_engine", None)
    if engine:
        engine.warned.clear()


def _answer(model: Any, processor: Any, samples: Sequence[Sample], seed: int, **how: Any) -> list[dict[str, Any]]:
    """One row per sample, in order; a sample that cannot be answered carries its `error` instead of an answer."""
    rows: dict[str, dict[str, Any]] = {}
    images = {}
    for sample in samples:
        try:
            images[sample.id] = load_image(sample)
        except VlmFixError as error:
            rows[sample.id] = {"error": str(error)}
    ready = [sample for sample in samples if sample.id in images]
    pending = [ready] if ready else []
    seconds, first_token = 0.0, None
    notes: dict[str, None] = {}
    terms = []
    while pending:
        part = pending.pop(0)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                _warn_anew(model)
                batch = generate(
                    model, processor, [images[s.id] for s in part], [s.prompt for s in part], _seed(seed, part), **how
                )
            notes |= dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
        except Exception as error:  # one bad sample, or a batch too large for memory, must not end the run
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) > 1:
                pending = [[sample] for sample in part]
            else:
                rows[part[0].id] = {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}
            continue
        seconds += batch.seconds
        first_token = first_token or batch.first_token
        terms += [batch.term] if batch.term else []
        for sample, text, tokens, finished in zip(part, batch.texts, batch.tokens, batch.finished, strict=True):
            rows[sample.id] = {"answer": text, "tokens": tokens, "finished": finished, "error": None}
    term = [math.fsum(t[0] for t in terms), sum(t[1] for t in terms)] if terms else None
    batch_wide: dict[str, Any] = {"batch_seconds": seconds, "batch_first_token": first_token}
    batch_wide |= {"batch_warnings": list(notes), "batch_term": term}
    return [{**{"answer": None, "tokens": 0, "finished": False}, **rows[s.id], **batch_wide} for s in samples]


def reset_peak(device: torch.device) -> None:
    """Start a new measurement for `peak_mb`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: start a new high-water mark, so that runs do not inherit it
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """Peak memory since `reset_peak` in MB: CUDA allocator, or resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


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
        _warm_up(model, processor, plan[mine[0]], seed, how)
        reset_peak(model.device)
    dead = 0
    for i in mine:
        rows = _answer(model, processor, plan[i], seed, **how)
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


def _warm_up(model: Any, processor: Any, samples: Sequence[Sample], seed: int, how: dict[str, Any]) -> None:
    """One short untimed call. A combination that a method refuses ends the run here, before any answer is written."""
    readable = []
    for sample in samples:
        with contextlib.suppress(VlmFixError):
            readable.append((load_image(sample), sample.prompt))
    if readable:
        images, prompts = zip(*readable, strict=True)
        short = {**how, "max_new_tokens": min(2, how["max_new_tokens"])}
        try:
            with warnings.catch_warnings(action="ignore"):
                generate(model, processor, images, prompts, seed, **short)
        except VlmFixError:
            raise
        except Exception:  # the batch itself will record what went wrong, sample by sample
            return


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


def hardware(device: torch.device) -> str:
    """The machine in words: GPU name and count, or CPU name, cores and torch threads."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{cpu}, {os.cpu_count()} cores, torch threads: {torch.get_num_threads()}"
