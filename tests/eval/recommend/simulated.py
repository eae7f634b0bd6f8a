"""Simulated candidates: answers of each image drawn with known chances, on a clock that only measuring moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlm_fix.eval.recommend.objective import COLUMNS, Judge
from vlm_fix.eval.recommend.search import BASELINE, Candidate, Outcome, Search

QUESTIONS, RIGHT, MENTIONS, INVENTED = 6, 0.85, 5, 0.1
AGAIN = 0.7  # share of answers that a candidate leaves as the baseline's
JUDGE = Judge.of("hallucination", ("captions", "questions"))


class World:
    """`better` maps a candidate to the points that it gains in accuracy and in CHAIR_i; a second an image, `cost` for others."""

    def __init__(self, seed: int, better: Mapping[str, float] = {}, cost: float = 1.5, images: int = 400) -> None:
        self.seed, self.better, self.cost, self.now, self.size = seed, better, cost, 0.0, images
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.tables: dict[str, np.ndarray] = {}
        self.base = self._rng(BASELINE).random((images, QUESTIONS + MENTIONS)) < self._chance(BASELINE)

    def clock(self) -> float:
        return self.now

    def measure(self, candidate: Candidate, images: Sequence[int]) -> tuple[np.ndarray, float]:
        key = candidate.key
        seconds = len(images) * (1.0 if key == BASELINE else self.cost)
        self.asked.append((key, tuple(images)))
        self.now += seconds
        if key not in self.tables:
            self.tables[key] = self._table(key)
        return self.tables[key][images[0] : images[-1] + 1], seconds

    def _rng(self, key: str) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key.encode()))

    def _chance(self, key: str) -> np.ndarray:
        """Of a right answer, and of a mention of what is there: of those that are drawn anew."""
        share = 1 if key == BASELINE else 1 - AGAIN
        return np.array([RIGHT] * QUESTIONS + [1 - INVENTED] * MENTIONS) + self.better.get(key, 0) / 100 / share

    def _table(self, key: str) -> np.ndarray:
        mine = self.base
        if key != BASELINE:
            rng = self._rng(key)
            own = rng.random(self.base.shape) < self._chance(key)
            mine = np.where(rng.random(self.base.shape) < AGAIN, self.base, own)
        yes, no = mine[:, :3].sum(1), mine[:, 3:QUESTIONS].sum(1)
        invented, before = (MENTIONS - each[:, QUESTIONS:].sum(1) for each in (mine, self.base))
        row = {"positive": 3, "negative": 3, "tp": yes, "fp": 3 - no, "tn": no, "captions": 1, "mentions": MENTIONS}
        row |= {"invented": invented, "found": 4, "truth": 5, "words": 12, "cut_mentions": MENTIONS}
        row |= {"cut_invented": invented, "base_cut_mentions": MENTIONS, "base_cut_invented": before, "tokens": 20}
        row |= {"seconds": 1.0 if key == BASELINE else self.cost, "changed": (mine != self.base).sum(1)}
        table = np.zeros((self.size, len(COLUMNS)))
        for place, name in enumerate(COLUMNS):
            table[:, place] = row[name]
        return table


def searched(world: World, candidates: int, budget: float, controls: int = 2, resamples: int = 400) -> Outcome:
    """Search among `candidates` called c0, c1, ... and some controls, for `budget` simulated seconds."""
    made = [Candidate(f"c{i}", ("a",)) for i in range(candidates)]
    made += [Candidate(f"control{i}", ("control",), True) for i in range(controls)]
    search = Search(JUDGE, world.measure, world.clock, until=0.65 * budget, end=budget, resamples=resamples)
    half = world.size // 2
    return search.run(made, range(half), range(half, world.size))
