"""Which runs an evaluation has: the baseline, the methods, and the rows that keep them honest.

    baseline     the model as it is, decoded as asked; every difference is against it
    greedy       beside a baseline that samples or searches beams: gains over sampling alone are often only near-greediness
    sampled      with `controls`, beside a greedy baseline
    controls     apc_only at the methods' beta, yes_bias, yes_threshold (where questions are yes/no), random_heads;
                 random_tokens, uniform_grid, downsample_image at every budget of the pruning methods
    gaussian_logits as METHOD   with `controls`, for each stack that contrasts: its contrast replaced by noise of the
                 standard deviation that the contrast's term was measured to have on each benchmark (`Term`), 3 digits,
                 at its beta; where no step left it two tokens, no size of noise would change anything and there is none
    beams=k      with `equal_compute`: the unwrapped model with k beams, for each number k > 1 of forward passes per token
                 that a stack takes (`Contrast.passes`)

Controls are methods like any other: those that are not registered, or asked for already, are left out.
Source: the critique of ustc-hyin/cd_rethink, and random selection in UniPruneBench.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import vlm_fix
from vlm_fix import registry
from vlm_fix.calibration.files import Calibration, apply
from vlm_fix.decoding.kinds import Contrast
from vlm_fix.errors import VlmFixError
from vlm_fix.families import table as families
from vlm_fix.method import Baseline, Method

if TYPE_CHECKING:
    from vlm_fix.eval.tasks import Task

    from .runner import Settings

AT_BETA = "apc_only"
NOISE = "gaussian_logits"
YES_NO = ("yes_bias", "yes_threshold")
HEADS = ("random_heads",)
PRUNING = ("random_tokens", "uniform_grid", "downsample_image")


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the results: a stack of methods, what of the decoding differs from the settings, and its seeds.

    `imitates` names the row to whose term the noise of this one is matched: `sized` has to be asked before it can run.
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
        """This row with noise of the standard deviation `sd`, to 3 significant digits; None: without."""
        noise, *others = self.stack
        return dataclasses.replace(
            self, stack=(dataclasses.replace(noise, **{"sigma": float(f"{sd or 0:.3g}")}), *others)
        )

    @contextlib.contextmanager
    def applied(self, model: Any, calibration: Sequence[Calibration] = (), seed: int | None = None) -> Iterator[None]:
        """The model wrapped with the stack (the baseline runs unwrapped, so that any family can be measured). Methods
        that draw at random draw from `seed`, unless their own was set."""
        if all(isinstance(method, Baseline) for method in self.stack):
            yield
            return
        stack = [_seeded(method, seed) if seed is not None else method for method in self.stack]
        names = {method.name for method in stack}
        with vlm_fix.wrapped(model, stack, [c for c in calibration if c.method in names]):
            yield


def _seeded(method: Method, seed: int) -> Method:
    return method.but(seed=seed) if _draws(method) else method


def _draws(method: Method) -> bool:
    """True for a method with a seed that the user left alone."""
    own = next((field for field in dataclasses.fields(method) if field.name == "seed"), None)
    return own is not None and getattr(method, "seed", None) == own.default


def runs(settings: Settings, model: Any, tasks: Sequence[Task], calibration: Sequence[Calibration] = ()) -> list[Run]:
    """All runs, the baseline first. Raises VlmFixError for a method that does not exist or does not fit the model."""
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
    """Every seed where a run draws at random, else the first alone: greedy decoding would only repeat itself."""
    seeds = settings.seeds or (settings.seed,)
    draws = dict(run.decoding).get("sample", settings.sample) or any(map(_draws, run.stack))
    return seeds if draws else seeds[:1]


def _controls(stacks: Sequence[Sequence[Method]], model: Any, yes_no: bool) -> list[str]:
    """Specs of the controls that suit these methods."""
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
        keeps = list(dict.fromkeys(k[-1] if isinstance(k, tuple) else k for k in keeps))  # stages: what the last leaves
        wanted += [f"{name}:keep={keep:.6g}" for name in PRUNING for keep in keeps if keep is not None]
    return [spec for spec in wanted if spec.partition(":")[0] in known]


def _noise(name: str, stack: Sequence[Method], exact: Sequence[Method]) -> Run | None:
    """The stack of that name with noise in place of its contrast; `exact` is the stack with its calibration."""
    contrast = next((m for m in exact if isinstance(m, Contrast) and m.contrasts), None)
    if contrast is None or contrast.kind == "control" or any(m.name == NOISE for m in stack):
        return None
    noise = registry.parse_spec(f"{NOISE}:beta={getattr(contrast, 'beta', 0)}")
    others = [m for m in stack if m.name != contrast.name and getattr(m, "branch", "") != "negative"]
    return Run(f"{NOISE} as {name}", (noise, *others), imitates=name)
