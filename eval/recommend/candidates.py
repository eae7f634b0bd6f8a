"""What is tried on a model: every method that its family serves, at its default and along its `grid`, and the controls.

A method that cannot run there without a calibration takes the checkpoint's own, or is calibrated on the images of the search. One
that is refused is listed with the reason. Stacks join two candidates of different kinds.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_fix import calibrated
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.calibrate import calibrate
from vlm_fix.eval.run.plan import PRUNING
from vlm_fix.eval.run.served import ServedModel
from vlm_fix.families import arch_of
from vlm_fix.method import Baseline, Method
from vlm_fix.registry import list_methods, parse, split_methods
from vlm_fix.wrapping import plan

from .data import Data
from .ledger import Ledger
from .search import Candidate

QUESTIONS = 60  # of a calibration's half
STACKED = 3  # candidates that are stacked with each other


class _Late(Exception):
    pass


@dataclass
class Candidates:
    """Candidates of a model: `stacks` maps a candidate's key to its methods, calibrated, `refused` to the reason."""

    model: Any
    stacks: dict[str, list[Method]] = field(default_factory=dict)
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    controls: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    files: list[calibrated.Calibration] = field(default_factory=list)
    open: list[str] = field(default_factory=list)  # methods that need a calibration that there is none of

    @classmethod
    def of(cls, model: Any, only: str = "", files: calibrated.Files = None) -> Candidates:
        """All of the model's, or with `only` those that it names, as `--method` does, beside the controls."""
        made = cls(model, files=calibrated.read_all(files))
        stacks = [parse(list(stack)) for stack in split_methods(only)]
        for stack in stacks:
            made.add(stack)
        for each in list_methods():
            if each is not Baseline and (not only or is_control(each)):
                made.add([each()])
        grids = [grid_of(each()) for each in list_methods() if not only and not is_control(each)]
        for method in itertools.chain.from_iterable(itertools.zip_longest(*grids)):
            if method and method.name not in made.refused:
                made.add([method])
        return made

    def add(self, stack: Sequence[Method]) -> bool:
        """Take a stack in, unless the model refuses it."""
        key = "+".join(method.spec() for method in stack)
        if key in self.stacks:
            return False
        mine = [c for c in self.files if c.method in {method.name for method in stack}]
        try:
            with warnings.catch_warnings(action="ignore"):
                bare = getattr(self.model, "bare", self.model)
                filled = calibrated.apply(calibrated.choose(mine, bare, stack), stack, arch_of(bare))
                self._plan(filled)
        except VlmFixError as reason:
            if len(stack) == 1 and type(stack[0]).calibrate is not Method.calibrate and not mine:
                self.open.append(key)
            self.refused[key] = str(reason)
            return False
        self.refused.pop(key, None)
        self.stacks[key], self.kinds[key] = filled, tuple(dict.fromkeys(method.kind for method in stack))
        if any(is_control(type(method)) for method in stack):
            self.controls.add(key)
        return True

    def _plan(self, stack: Sequence[Method]) -> None:
        if isinstance(self.model, ServedModel):
            with self.model.applied(stack, ()):
                return
        active = plan(self.model, list(stack)).active
        if not active:
            raise VlmFixError("at this setting it changes nothing on this model.")

    def calibrate(
        self,
        model: Any,
        processor: Any,
        identity: Any,
        data: Data,
        folder: Path | None,
        ledger: Ledger,
        seed: int,
        until: float,
    ) -> None:
        """Calibrate the methods that need it, one after the other, while there is time."""
        questions = data.for_calibration()
        fresh: dict[str, calibrated.Calibration] = {}
        for key in list(self.open):
            place = folder / f"{key.partition(':')[0]}.json" if folder else None

            def work(key: str = key, place: Path | None = place) -> dict[str, str]:
                if questions is None or isinstance(model, ServedModel):
                    return {"failed": "it needs a calibration on yes/no questions, by Hugging Face's engine."}
                if ledger.now > until:
                    return {"failed": "no time to calibrate it."}

                def watch(what: str, share: float) -> None:
                    if ledger.seconds > until:
                        raise _Late

                source = "picto" if data.source.startswith("picto") else "coco"
                try:
                    with warnings.catch_warnings(action="ignore"):
                        fresh[key] = calibrate(
                            key,
                            str(identity.get("name", "")),
                            limit=QUESTIONS,
                            seed=seed,
                            progress=watch,
                            data=source,
                            questions=questions,
                            loaded=(model, processor, identity),
                        ).calibration
                    if place:
                        fresh[key].write(place)
                except _Late:
                    return {"failed": "no time to calibrate it."}
                except VlmFixError as reason:
                    return {"failed": f"calibration: {reason}"}
                return {"file": str(place)}

            made = ledger.step(["calibrate", key], work)
            if "failed" in made:
                self.refused[key] += f" Here: {made['failed']}"
                continue
            self.files.append(calibrated.Calibration.read(place) if place else fresh[key])
            (default,) = parse(key)
            for method in (default, *grid_of(default)):
                self.add([method])

    def listed(self) -> list[Candidate]:
        """The candidates in the order in which they are tried: defaults of one kind after the other, then other strengths.

        Programs around generate come last: one of them may take minutes.
        """
        order = sorted(self.stacks, key=lambda key: ":" in key)
        turns = Counter[tuple[bool, bool, tuple[str, ...]]]()
        turn = {}
        for key in order:
            group = ("procedure" in self.kinds[key], ":" in key, self.kinds[key])
            turn[key] = (*group[:2], turns[group])
            turns[group] += 1
        return [Candidate(key, self.kinds[key], key in self.controls) for key in sorted(order, key=turn.__getitem__)]

    def stacked(self, best: Sequence[Candidate]) -> list[Candidate]:
        """Stacks of the best candidates of different kinds."""
        firsts: dict[tuple[str, ...], Candidate] = {}
        for candidate in best:
            firsts.setdefault(candidate.kinds, candidate)
        made = []
        for one, other in itertools.combinations([*firsts.values()][:STACKED], 2):
            stack = [*parse(one.key), *parse(other.key)]
            key = "+".join(method.spec() for method in stack)
            if not {*one.kinds} & {*other.kinds} and self.add(stack):
                made.append(Candidate(key, self.kinds[key]))
        return made


def is_control(method: type[Method]) -> bool:
    return method.kind == "control" or method.name in PRUNING


def grid_of(method: Method) -> list[Method]:
    """The method at the other strengths of its `grid`."""
    return [method.but(**{name: value}) for name, values in method.grid.items() for value in values]
