"""Plan the runs of an evaluation: the baseline, the methods, and the controls that methods have to beat.

    baseline     the unmodified model, decoded as asked; all differences are against it
    greedy       if the baseline samples or uses beams: a gain over sampling may only come from being nearly greedy
    sampled      with `controls`, if the baseline is greedy
    controls     apc_only at the methods' beta, yes_bias, yes_threshold (for yes/no questions), random_heads;
                 random_tokens, uniform_grid, downsample_image at every budget of the pruning methods; for methods that
                 name a `control` of their own (steering: random directions of the same length), that
    gaussian_logits as METHOD   with `controls`, for each stack with a contrast: the contrast is replaced by noise with the
                 standard deviation measured for the contrast's term on each benchmark (`Term`), to 3 digits, at its
                 beta; no noise if no step left the contrast two tokens, where noise of any size would change nothing
    beams=k      with `equal_compute`: the unmodified model with k beams, for each number k > 1 of forward passes per
                 token that a stack takes (`Contrast.passes`)

Controls are methods like any other; those that are not registered, or were asked for anyway, are left out.
Source: the critique of ustc-hyin/cd_rethink, and random selection in UniPruneBench.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import vlm_fix
from vlm_fix import presets, registry
from vlm_fix.calibrated import Calibration, apply, find, read_all
from vlm_fix.decoding.kinds import Contrast
from vlm_fix.engine import Engine
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks import Task
from vlm_fix.families import table as families
from vlm_fix.method import Baseline, Method
from vlm_fix.wrapping import NEUTRAL

from .elsewhere import Elsewhere

AT_BETA = "apc_only"
NOISE = "gaussian_logits"
YES_NO = ("yes_bias", "yes_threshold")
HEADS = ("random_heads",)
PRUNING = ("random_tokens", "uniform_grid", "downsample_image")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, and a row of the results: a stack of methods, its changes to the decoding settings, and its seeds.

    `imitates` names the run whose term this one replaces by noise; such a run needs `sized` before it can start.
    """

    name: str
    stack: tuple[Method, ...]
    decoding: tuple[tuple[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    imitates: str = ""

    @property
    def spec(self) -> str:
        """The stack as `--method` takes it."""
        return "+".join(method.spec() for method in self.stack)

    def sized(self, sd: float | None) -> Run:
        """Return this run with noise of standard deviation `sd`, to 3 significant digits; None means no noise."""
        noise, *others = self.stack
        return dataclasses.replace(
            self, stack=(dataclasses.replace(noise, **{"sigma": float(f"{sd or 0:.3g}")}), *others)
        )

    @contextlib.contextmanager
    def applied(
        self, model: Any, calibration: Sequence[Calibration] = (), seed: int | None = None, tell: bool = False
    ) -> Iterator[None]:
        """Wrap the model with the stack; the baseline runs unwrapped, so that any family can be measured.

        Methods that draw at random use `seed`, unless their own was set. tell: of neutral settings; once is enough.
        """
        stack = [_seeded(method, seed) if seed is not None else method for method in self.stack]
        chosen = [c for c in calibration if c.method in {method.name for method in stack}]
        if isinstance(model, Elsewhere):
            with model.applied(stack, chosen):
                yield
        elif all(isinstance(method, Baseline) for method in stack):
            yield
        else:
            with contextlib.ExitStack() as on:
                with warnings.catch_warnings():
                    if not tell:
                        warnings.filterwarnings("ignore", f".*{re.escape(NEUTRAL)}")
                    on.enter_context(vlm_fix.wrapped(model, stack, chosen))
                yield


def _seeded(method: Method, seed: int) -> Method:
    return method.but(seed=seed) if _draws(method) else method


def _draws(method: Method) -> bool:
    """Whether the method has a seed that the user did not set."""
    own = next((field for field in dataclasses.fields(method) if field.name == "seed"), None)
    return own is not None and getattr(method, "seed", None) == own.default


def check_stacks(settings: Settings, model: Any = None) -> None:
    """Raise VlmFixError for methods that are named twice or make no sense together, before weights are loaded.

    model: an outline of the model (`loading.outline`), for what depends on its family and size.
    """
    seen: dict[str, str] = {}
    for specs in settings.methods:
        name, stack = "+".join(specs), registry.parse(list(specs))
        spec = "+".join(method.spec() for method in stack)
        if registry.file_of(name) and not registry.read_stack(registry.file_of(name)):
            raise VlmFixError(f"{name} recommends the model as it is, which always runs: take it out.")
        if all(isinstance(method, Baseline) for method in stack):
            raise VlmFixError("--method baseline adds nothing: the unmodified model always runs; take it out.")
        if spec in seen:
            raise VlmFixError(f"--method names the run {name} twice (as {seen[spec]}): give each run once.")
        seen[spec] = name
        names = [method.name for method in stack]
        if model is not None:
            presets.check(list(specs), model)
            files = [c for c in settings.calibration if read_all((c,))[0].method in names]
            methods = apply(find(files, model.name_or_path, stack), stack, families.arch_of(model))
            Engine(model, methods)
        elif twice := [each for each in names if names.count(each) > 1]:
            raise VlmFixError(f"{name}: {twice[0]} is listed twice; give it once, with the parameters you want.")
    if settings.seeds and not (settings.sample or settings.controls or any(_draws(m) for m in _all(settings))):
        given = ",".join(map(str, settings.seeds))
        raise VlmFixError(
            f"--seeds {given} has no effect: no run samples or has a method that draws at random; add --sample."
        )


def _all(settings: Settings) -> list[Method]:
    return [method for specs in settings.methods for method in registry.parse(list(specs))]


def runs(settings: Settings, model: Any, tasks: Sequence[Task], calibration: Sequence[Calibration] = ()) -> list[Run]:
    """Return all runs, the baseline first. Raises VlmFixError for unknown methods or ones that do not fit the model."""
    for specs in settings.methods:
        presets.check(list(specs), model)
    stacks = {"+".join(specs): registry.parse(list(specs)) for specs in settings.methods}
    made = {"baseline": Run("baseline", (Baseline(),))}
    plain = (("sample", False), ("num_beams", 1))
    if settings.sample or settings.num_beams > 1:
        made["greedy"] = Run("greedy", (Baseline(),), plain)
    elif settings.controls:
        made["sampled"] = Run("sampled", (Baseline(),), (("sample", True),))
    if settings.equal_compute:
        passes = {max((m.passes for m in stack if isinstance(m, Contrast)), default=1) for stack in stacks.values()}
        if passes <= {1}:
            raise VlmFixError(
                "--equal-compute: no method of this run takes a second forward pass, so the baseline is its own "
                "equal-compute row; drop the option or add a contrast method such as vcd."
            )
        for k in sorted(passes - {1}):
            made[f"beams={k}"] = Run(f"beams={k}", (Baseline(),), (("sample", False), ("num_beams", k)))
    made |= {name: Run(name, tuple(stack)) for name, stack in stacks.items()}
    if settings.controls:
        yes_no = any("label" in task.samples[0].reference for task in tasks if task.samples)
        exact = {name: apply(calibration, stack, families.arch_of(model)) for name, stack in stacks.items()}
        for spec in _controls(list(exact.values()), model, yes_no):
            made.setdefault(spec, Run(spec, (registry.parse_spec(spec),)))
        for run in [_noise(name, stacks[name], stack) for name, stack in exact.items()]:
            made |= {run.name: run} if run else {}
    return [dataclasses.replace(run, seeds=_seeds(settings, run)) for run in made.values()]


def _seeds(settings: Settings, run: Run) -> tuple[int, ...]:
    """Return all seeds if a run draws at random, else only the first, as greedy decoding would repeat itself."""
    seeds = settings.seeds or (settings.seed,)
    draws = dict(run.decoding).get("sample", settings.sample) or any(map(_draws, run.stack))
    return seeds if draws else seeds[:1]


def _controls(stacks: Sequence[Sequence[Method]], model: Any, yes_no: bool) -> list[str]:
    """Return the specs of the controls for these methods."""
    known = {method.name for method in registry.list_methods()}
    pruners = [m for stack in stacks for m in stack if m.kind == "pruning"]
    others = [m for stack in stacks for m in stack if m.kind != "pruning"]
    wanted: list[str] = []
    if others or not pruners:
        betas = dict.fromkeys(getattr(m, "beta", 0.0) for m in others if isinstance(m, Contrast))
        wanted += [f"{AT_BETA}:beta={beta:g}" for beta in betas if beta] or [AT_BETA]
        wanted += [*(YES_NO if yes_no else ()), *HEADS]
    if pruners:
        arch = families.arch_of(model)
        keeps = [getattr(pruner.resolve(arch), "keep", None) for pruner in pruners]
        keeps = list(
            dict.fromkeys(k[-1] if isinstance(k, tuple) else k for k in keeps)
        )  # of several stages, the budget of the last
        wanted += [f"{name}:keep={keep:.6g}" for name in PRUNING for keep in keeps if keep is not None]
    if any(type(m).control is not Method.control for m in others):
        wanted += [m.resolve(families.arch_of(model)).control for m in others]
    return [spec for spec in wanted if spec.partition(":")[0] in known]


def _noise(name: str, stack: Sequence[Method], exact: Sequence[Method]) -> Run | None:
    """Return the stack called `name` with noise in place of its contrast; `exact` is the stack with its calibration."""
    contrast = next((m for m in exact if isinstance(m, Contrast) and m.contrasts), None)
    if contrast is None or contrast.kind == "control" or any(m.name == NOISE for m in stack):
        return None
    noise = registry.parse_spec(f"{NOISE}:beta={getattr(contrast, 'beta', 0)}")
    others = [m for m in stack if m.name != contrast.name and getattr(m, "branch", "") != "negative"]
    return Run(f"{NOISE} as {name}", (noise, *others), imitates=name)
