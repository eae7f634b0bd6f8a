"""Successive halving over images, and the proof on others; knows no model: it is given candidates and `measure`.

Search. All candidates are measured on a few images, the better half (by score, see `objective`) on about twice as many, and so
on, so that each round takes an equal share of the time and most images go to the few that may win. Each round also drops what
changes no answer and what is surely no better (score + 2 standard errors below 0). A candidate's rows stay its own: it is never
asked about an image twice, and all are compared with the same answers of the baseline. When few are left, stacks of the best
join.

Controls take part, and cannot win; nothing is proposed that scores no better than a control which is still in.

Proof. The two best are measured once on images that no search has seen, beside the baseline, block by block until time or images
end: when to stop depends on the time alone, never on the figures. Each interval of the gain that counts has the level
`bonferroni(2)`, widened for few images, so that the chance of even one false claim is at most 5 %, however many candidates
were searched.

Source: Z. Karnin, T. Koren, O. Somekh, Almost optimal exploration in multi-armed bandits, ICML 2013 (sequential halving).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_fix.eval.stats import SIGNIFICANT, bonferroni, expanded, jackknife, table_intervals

from .objective import COLUMNS, Judge, sums_of

BASELINE = ""
FIRST, CHUNK = 8, 32  # images: of the first round at least, and of one measurement at most
FINALISTS = 2
SURELY, SETTLED = 2.0, 8  # standard errors; images before a candidate is dropped for its own figures
ENOUGH = 30  # images, for a claim
FIRST_SHARE = 0.5  # of the search, at most, for the first round


@dataclass(frozen=True)
class Candidate:
    """What may be recommended: `key` names it (BASELINE: the model itself), `kinds` are those of its methods."""

    key: str
    kinds: tuple[str, ...] = ()
    control: bool = False


class Dropped(Exception):
    """`measure` raises it for a candidate that cannot be measured, with the reason."""


Measure = Callable[[Candidate, Sequence[Hashable]], tuple[Any, float]]
"""(candidate, images) -> (table [images, COLUMNS], seconds it took)."""


@dataclass
class Standing:
    """What is known of a candidate: its rows so far, and why it is out ("": it is in)."""

    candidate: Candidate
    table: Any = None
    seconds: float = 0.0
    gain: float = 0.0
    score: float = 0.0
    error: float = math.inf  # standard error of the score
    missed: dict[str, float] = field(default_factory=dict)
    out: str = ""

    @property
    def images(self) -> int:
        return 0 if self.table is None else len(self.table)

    def add(self, table: Any, seconds: float) -> None:
        import numpy as np

        self.table = table if self.table is None else np.concatenate([self.table, table])
        self.seconds += seconds

    def cost(self, usual: float) -> float:
        """Seconds an image."""
        return self.seconds / self.images if self.images else usual


@dataclass(frozen=True)
class Proof:
    """The candidate on images that the search has not seen: the gain that counts with its interval, and what it misses."""

    candidate: Candidate
    images: int
    gain: float
    low: float
    high: float
    level: float
    missed: dict[str, float]
    table: Any = field(repr=False, compare=False)
    base: Any = field(repr=False, compare=False)

    @property
    def better(self) -> bool:
        """Whether the candidate is claimed to be better."""
        return self.low > 0 and self.images >= ENOUGH and not self.missed


@dataclass
class Outcome:
    """Everything that was found; `winner` is None where nothing is claimed, and `reason` says why."""

    standings: list[Standing]
    base: Standing
    proofs: list[Proof]
    winner: Proof | None
    reason: str


@dataclass
class Search:
    """One search. `clock` tells the seconds since the start; `until` is when the search ends, `end` when the proof does."""

    judge: Judge
    measure: Measure
    clock: Callable[[], float]
    until: float
    end: float
    watch: Callable[[Search, str], None] = lambda search, what: None
    stacks: Callable[[Sequence[Candidate]], Sequence[Candidate]] = lambda best: ()
    resamples: int = 2000
    standings: list[Standing] = field(default_factory=list)
    base: Standing = field(default_factory=lambda: Standing(Candidate(BASELINE)))
    rounds: tuple[int, int] = (0, 0)

    def run(self, candidates: Sequence[Candidate], images: Sequence[Hashable], unseen: Sequence[Hashable]) -> Outcome:
        """Search on `images`, prove on `unseen`."""
        self.standings = [Standing(candidate) for candidate in candidates]
        untried = len(candidates) + 1
        while 0 < len(self.waiting) < untried:  # again, if time is left for more of them
            untried = len(self.waiting)
            self._halving(images)
        for standing in self.waiting:
            standing.out = "not tried: the budget was too small"
        best, reason = self._proposed()
        proofs = self._prove(best, unseen) if best else []
        won = sorted((proof for proof in proofs if proof.better), key=lambda proof: -proof.gain)
        return Outcome(
            self.standings, self.base, proofs, won[0] if won else None, "" if won else reason or _why(proofs)
        )

    @property
    def alive(self) -> list[Standing]:
        """The candidates that are in and have been measured, the best first."""
        return sorted((s for s in self.standings if s.images and not s.out), key=lambda s: -s.score)

    @property
    def waiting(self) -> list[Standing]:
        """The candidates that have not been measured yet."""
        return [s for s in self.standings if not s.images and not s.out]

    def _halving(self, images: Sequence[Hashable]) -> None:
        """All rounds, from those that wait to the finalists."""
        number, stacked, going = 0, False, True
        while going:
            number += 1
            left = max(1, math.ceil(math.log2(max(len(self.alive if number > 1 else self.waiting), 1) / FINALISTS)))
            self.rounds = (number, number + left - 1)
            in_time = self._round(images, left)
            self._halve()
            self.watch(self, "round")
            going = in_time and len(self.alive) > FINALISTS
            if in_time and not stacked and len(self.alive) <= 4 * FINALISTS:
                stacked = True
                made = [Standing(made) for made in self.stacks([s.candidate for s in self._best()])]
                self.standings += made
                going = going or bool(made)

    def _round(self, images: Sequence[Hashable], rounds_left: int) -> bool:
        """Measure all that are in on more images; False if the time is up.

        The first round measures those that wait on a few images, as many of them as half of the time is enough for.
        """
        start, first = self.clock(), self.rounds[0] == 1
        if not self.base.images:
            self._extend(self.base, images[:FIRST], math.inf)
        usual = 1.5 * self.base.cost(0)
        contenders = self.waiting if first else [*self.alive, *(s for s in self.waiting if len(s.candidate.kinds) > 1)]
        costs = [s.cost(usual) for s in (self.base, *contenders)]
        have = [s.images for s in (self.base, *contenders)]
        whole = (self.until - start) * min(1 / rounds_left, FIRST_SHARE if first else 1)
        share = whole - (self.clock() - start)
        reach = (share + sum(c * h for c, h in zip(costs, have, strict=True))) / max(sum(costs), 1e-9)
        n = min(len(images), max(FIRST, 0 if first else max(have) + FIRST, int(reach) // FIRST * FIRST))
        limit = start + FIRST_SHARE * (self.until - start) if first else self.until
        if not self._extend(self.base, images[:n], self.until):
            return False
        for standing in contenders:
            if not self._extend(standing, images[:n], limit):
                return first
            self.watch(self, "candidate")
        return True

    def _extend(self, standing: Standing, images: Sequence[Hashable], until: float) -> bool:
        """Measure what is missing of `images`; False if that would end after `until`."""
        usual = 1.5 * self.base.cost(0)
        while standing.images < len(images) and not standing.out:
            part = images[standing.images : standing.images + CHUNK]
            if self.clock() + len(part) * standing.cost(usual) > until:
                return False
            try:
                standing.add(*self.measure(standing.candidate, part))
            except Dropped as reason:
                standing.out = str(reason)
                return True
        if standing is not self.base and not standing.out:
            self._rate(standing)
        return True

    def _rate(self, standing: Standing) -> None:
        base, mine = self.base.table[: standing.images], standing.table
        sums = sums_of(base), sums_of(mine)
        standing.gain, standing.missed = float(self.judge.gain(*sums)), self.judge.missed(*sums)
        standing.score, standing.error = jackknife(self.judge.score, COLUMNS, base, mine)
        if standing.images < SETTLED:
            return
        if not mine[:, COLUMNS.index("changed")].any():
            standing.out = f"gave the model's own answers on {standing.images} images"
        elif standing.score + SURELY * standing.error < 0:
            missed = f", misses {', '.join(standing.missed)}" if standing.missed else ""
            standing.out = f"surely no better: {standing.gain:+.1f} points{missed}, on {standing.images} images"

    def _halve(self) -> None:
        tried = self.alive
        for standing in tried[max(FINALISTS, math.ceil(len(tried) / 2)) :]:
            standing.out = f"behind others: {standing.gain:+.1f} points on {standing.images} images"

    def _best(self) -> list[Standing]:
        """Those that gain, the surest first: some have been measured on fewer images than others when the time is up."""
        found = [s for s in self.alive if s.score > 0 and not s.candidate.control]
        return sorted(found, key=lambda s: s.error - s.score)

    def _proposed(self) -> tuple[list[Standing], str]:
        """The candidates to prove, and why there are none."""
        controls = [s for s in self.alive if s.candidate.control]
        bar = max((s.score for s in controls), default=0.0)
        best = self._best()
        beaten = [s for s in best if s.score > bar and not s.missed]
        if not best:
            tried, all_of = sum(s.images > 0 for s in self.standings), len(self.standings)
            if not tried:
                return [], "no candidate could be tried in this budget"
            reached = "" if tried == all_of else f", which reached {tried} of {all_of} candidates"
            return [], f"no candidate gained anything in the search{reached}"
        if not beaten:
            top = best[0]
            if top.score <= bar:
                control = max(controls, key=lambda s: s.score)
                return [], (
                    f"the control {control.candidate.key} gains as much as the best candidate, {top.candidate.key} "
                    f"({control.score:+.1f} and {top.score:+.1f} points in the search), so its gain does not count"
                )
            return [], f"the best candidate, {top.candidate.key}, misses {', '.join(top.missed)}"
        return beaten[:FINALISTS], ""

    def _prove(self, best: Sequence[Standing], unseen: Sequence[Hashable]) -> list[Proof]:
        runs = [Standing(self.base.candidate), *(Standing(s.candidate) for s in best)]
        block_cost = sum(s.cost(0) for s in (self.base, *best))
        for block in _blocks(unseen):
            if self.clock() + len(block) * block_cost > self.end:
                break
            try:
                for run in runs:
                    run.add(*self.measure(run.candidate, block))
            except Dropped:  # of a candidate that has answered before: what there is of whole blocks counts
                whole = min(run.images for run in runs)
                for run in runs:
                    run.table = run.table[:whole] if run.images else None
                break
            block_cost = sum(run.cost(0) for run in runs)
            self.watch(self, f"proof: {runs[0].images} of at most {len(unseen)} images")
        return [self._proof(run, runs[0], len(best)) for run in runs[1:]] if runs[0].images else []

    def _proof(self, run: Standing, base: Standing, claims: int) -> Proof:
        level = bonferroni(claims, SIGNIFICANT)
        sums = sums_of(base.table), sums_of(run.table)
        gains = {"gain": self.judge.gain}
        wide = expanded(level, run.images)
        low, high = table_intervals(gains, COLUMNS, base.table, run.table, self.resamples, level=wide)["gain"]
        gain = float(self.judge.gain(*sums))
        return Proof(run.candidate, run.images, gain, low, high, level, self.judge.missed(*sums), run.table, base.table)


def _blocks(images: Sequence[Hashable]) -> Iterator[Sequence[Hashable]]:
    return (images[i : i + CHUNK // 2] for i in range(0, len(images), CHUNK // 2))


def _why(proofs: Sequence[Proof]) -> str:
    """Why none of these proofs is a claim."""
    if not proofs:
        return "no time was left for the proof: give a larger budget"
    first = max(proofs, key=lambda proof: proof.gain)
    if first.images < ENOUGH:
        return (
            f"only {first.images} images were left or in time for the proof, which needs {ENOUGH}: give a larger budget"
        )
    if first.low > 0:
        return f"{first.candidate.key} gains, but misses {', '.join(first.missed)} on images it had not seen"
    chance = ": that may be chance" if first.gain > 0 else ""
    return (
        f"{first.candidate.key}, of the best in the search, gained {first.gain:+.1f} [{first.low:.1f}, {first.high:.1f}] points "
        f"on {first.images} images it had not seen{chance}"
    )
