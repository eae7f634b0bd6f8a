"""Simulated candidates: answers of each image drawn with known chances, on a clock that only measuring moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlm_fix.eval.recommend.objective import COLUMNS, Judge
from vlm_fix.eval.recommend.search import BASELINE, Candidate, Outcome, Search

QUESTIONS, RIGHT, MENTIONS, INVENTED = 6, 0.85, 5, 0.1
AGAIN = 0.7  # share of answers that a candidate leaves as the baseline's


class World:
    """`better` maps a candidate to the points that it gains in accuracy and in CHAIR_i; a second an image, `cost` for others."""

    def __init__(self, seed: int, better: Mapping[str, float] = {}, cost: float = 1.5, images: int = 1000) -> None:
        self.seed, self.better, self.cost, self.now, self.size = seed, better, cost, 0.0, images
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.drawn: dict[str, np.ndarray] = {}

    def clock(self) -> float:
        return self.now

    def measure(self, candidate: Candidate, images: Sequence[int]) -> tuple[np.ndarray, float]:
        cost = 1.0 if candidate.key == BASELINE else self.cost
        self.asked.append((candidate.key, tuple(images)))
        self.now += cost * len(images)
        base, mine = (self._answers(key)[list(images)] for key in (BASELINE, candidate.key))
        return _table(mine, base, cost), cost * len(images)

    def _answers(self, key: str) -> np.ndarray:
        """[images, 6 answers and 5 mentions], True where right; most are the baseline's, the others drawn anew."""
        if key not in self.drawn:
            chance = np.array([RIGHT] * QUESTIONS + [1 - INVENTED] * MENTIONS)
            rng, size = np.random.default_rng((self.seed, *key.encode())), (self.size, len(chance))
            own = rng.random(size) < chance + self.better.get(key, 0) / 100 / (1 - AGAIN)
            self.drawn[key] = (
                own if key == BASELINE else np.where(rng.random(size) < AGAIN, self._answers(BASELINE), own)
            )
        return self.drawn[key]


def _table(mine: np.ndarray, base: np.ndarray, seconds: float) -> np.ndarray:
    def counts(answers: np.ndarray) -> dict[str, np.ndarray]:
        yes, no = answers[:, :3].sum(1), answers[:, 3:QUESTIONS].sum(1)
        return {"tp": yes, "fp": 3 - no, "tn": no, "invented": MENTIONS - answers[:, QUESTIONS:].sum(1)}

    now, before = counts(mine), counts(base)
    row = {
        "positive": 3,
        "negative": 3,
        "captions": 1,
        "mentions": MENTIONS,
        "found": 4,
        "truth": 5,
        "words": 12,
        **now,
    }
    row |= {"cut_mentions": MENTIONS, "cut_invented": now["invented"], "base_cut_mentions": MENTIONS}
    row |= {"base_cut_invented": before["invented"], "seconds": seconds, "tokens": 20, "changed": (mine != base).sum(1)}
    return np.stack([np.broadcast_to(np.asarray(row[name], dtype=float), len(mine)) for name in COLUMNS], axis=1)


def searched(world: World, candidates: int, budget: float, controls: int = 3) -> Outcome:
    """Search among `candidates` called c0, c1, ... and some controls, for `budget` simulated seconds."""
    made = [Candidate(f"c{i}", ("a",)) for i in range(candidates)]
    made += [Candidate(f"control{i}", ("control",), True) for i in range(controls)]
    judge = Judge.of("hallucination", ("captions", "questions"))
    search = Search(judge, world.measure, world.clock, until=0.65 * budget, end=budget)
    half = world.size // 2
    return search.run(made, range(half), range(half, world.size))
