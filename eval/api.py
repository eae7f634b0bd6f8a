"""`vlm_fix.evaluate` and `vlm_fix.calibrate`: the commands of the same names, on a model by its name or one in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_fix.calibrated import Calibration
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import calibrate as finding
from vlm_fix.eval.run import loading, runner
from vlm_fix.eval.settings import Settings
from vlm_fix.method import Method
from vlm_fix.registry import parse, register, split_methods
from vlm_fix.spelling import spelled
from vlm_fix.wing import installed

Stack = str | Method | type[Method] | Sequence[str | Method | type[Method]]
Loaded = tuple[Any, Any, dict[str, Any]] | None


def evaluate(
    model: Any = "picto-llava",
    methods: str | Sequence[Stack] = (),
    benchmark: str = "all",
    *,
    processor: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    watch: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model with and without methods, as `vlm-fix eval` does, and return the content of results.json.

    model: a name or folder, or a loaded model with its `processor`. methods: "pai,vcd" as on the command line (commas
    separate runs, + stacks), or a list with a run each: a spec, a Method, its class, or a list of these for a stack.
    benchmark: "pope", "chair", "all" for both, or another that `vlm-fix eval --help` names.
    settings: the fields of `vlm_fix.eval.settings.Settings`, such as data="picto:shift", limit=50, batch_size=32.
    output: the folder that keeps answers, tables and figure; without one nothing is kept. resume: go on in it.
    quiet: no progress on stderr. watch(run, done, samples) is called after every batch.
    Raises VlmFixError for bad input, before anything runs.
    """
    known = {field.name for field in dataclasses.fields(Settings)} - {"benchmark", "model", "methods"}
    if unknown := sorted(settings.keys() - known):
        raise VlmFixError(f"evaluate takes no {', '.join(unknown)}; its settings are {', '.join(sorted(known))}.")
    if resume and output is None:
        raise VlmFixError("resume=True needs output, the folder of the run to continue.")
    name, loaded = _loaded(model, processor)
    chosen = Settings(benchmark=benchmark, model=name, methods=_runs(methods), **settings)
    console = Console(stderr=True, quiet=True) if quiet else None
    with contextlib.ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        results = runner.evaluate(chosen, folder, resume, console, loaded, watch)
        if output is not None:
            from vlm_fix.eval.report import tables

            tables.write(results, Path(output))
    return results


def calibrate(
    model: Any,
    method: str | Method | type[Method],
    *,
    processor: Any = None,
    out: str | Path | None = None,
    data: str = "picto:train",
    limit: int = 300,
    seed: int = 0,
    search: Mapping[str, Sequence[Any]] | None = None,
    pairs: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Calibration:
    """Find a method's parameters for a model on labelled questions, as `vlm-fix calibrate` does.

    model, processor: as for `evaluate`. search: values to try, such as {"alpha": [0.1, 0.3]}. out: a file to write.
    Returns what `wrap(model, method, calibration=...)` takes; `.found` holds the values, `.score` how they did on held-out
    questions. Raises VlmFixError for bad input, and where nothing is found.
    """
    name, loaded = _loaded(model, processor)
    (chosen,) = parse(method)
    tried = {key: [spelled(value) for value in values] for key, values in (search or {}).items()}
    result = finding.calibrate(
        chosen.spec(), name, data, limit, seed, tried, dtype, device, loaded=loaded, pairs=pairs
    ).calibration
    if out is not None:
        result.write(out)
    return result


def _loaded(model: Any, processor: Any) -> tuple[str, Loaded]:
    """The model's name and, of one in memory, what `loading.load_model` would return."""
    if isinstance(model, str | Path):
        if processor is not None:
            raise VlmFixError("a model by its name brings its own processor: leave processor out.")
        return str(model), None
    if processor is None:
        raise VlmFixError("a loaded model needs processor=..., the one it was loaded with, or give the model's name.")
    if engine := installed(model):
        names = "+".join(m.name for m in engine.methods)
        raise VlmFixError(
            f"the model is wrapped with {names}: call vlm_fix.unwrap(model) first; methods go into the call."
        )
    name = str(getattr(model, "name_or_path", "")) or type(model).__name__
    loading.prepare(processor, name)
    return name, (model.eval(), processor, loading.identify(model, name))


def _runs(methods: str | Sequence[Stack]) -> tuple[tuple[str, ...], ...]:
    """As `Settings.methods`: specs by run. Methods of one's own are registered, so that their specs can be read again."""
    if isinstance(methods, str):
        return tuple(map(tuple, split_methods(methods)))
    if isinstance(methods, Method | type):
        raise VlmFixError("methods is a list of runs: write [method], or a spec.")
    stacks = [parse(stack) for stack in methods]
    for method in (method for stack in stacks for method in stack):
        if type(method).__module__.partition(".")[0] != "vlm_fix":
            register(type(method))
    return tuple(tuple(method.spec() for method in stack) for stack in stacks)
