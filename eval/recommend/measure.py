"""Ask the model about images with a candidate's methods, and count what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import generation
from vlm_fix.eval.run.plan import Run
from vlm_fix.eval.scorers.chair.score import at_equal_length
from vlm_fix.eval.scorers.yesno import verdict
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks.chair import Chair
from vlm_fix.method import Baseline, Method

from .data import Data
from .features import SharedFeatures
from .ledger import Ledger
from .objective import COLUMNS
from .search import BASELINE, Candidate, Dropped, Outcome

Answers = dict[str, str | None]
FAR = 2.0
"""Times --max-slowdown that a measurement may take before it is stopped."""


class Measurer:
    """`measure` of a search. `stacks` maps a candidate's key to its methods; answers are kept in `said`, warnings in
    `warned`, and how many answers were not made in `failed`."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        data: Data,
        stacks: Mapping[str, Sequence[Method]],
        ledger: Ledger,
        settings: Settings,
        slowdown: float | None = None,
    ) -> None:
        """`slowdown` is the limit; what is FAR beyond it is stopped within its measurement."""
        self.model, self.processor, self.data, self.stacks = model, processor, data, stacks
        self.ledger, self.settings = ledger, settings
        self.said: dict[str, Answers] = {BASELINE: {}}
        self.warned: dict[str, dict[str, None]] = {}
        self.failed: dict[str, int] = {}
        self.warm = False
        self.features = SharedFeatures(model, self._clock)
        self.slowdown, self.pace = slowdown, dict[str, tuple[float, int]]()  # seconds and answers of the model itself

    def __call__(self, candidate: Candidate, images: Sequence[Any]) -> tuple[Any, float]:
        """Return a table [images, COLUMNS] and the seconds it took. Raises Dropped if there is no answer at all."""
        key = candidate.key
        made = self.ledger.step(["measure", key, images[0], len(images)], lambda: self._ask(key, images))
        if "dropped" in made:
            raise Dropped(made["dropped"])
        if key == BASELINE:
            for task, (seconds, answers) in made["pace"].items():
                spent, said = self.pace.get(task, (0.0, 0))
                self.pace[task] = spent + seconds, said + answers
        self.said.setdefault(key, {}).update(made["answers"])
        self.failed[key] = sum(answer is None for answer in self.said[key].values())
        self.warned.setdefault(key, {}).update(dict.fromkeys(made["warnings"]))
        return self._table(key, images, made), made["wall"]

    def examples(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Answers of the best proven candidate that are wrong on one side alone: sample, both answers, whether it is fixed.

        Captions are wrong if they name an object that is not there. As many broken ones as there are, fixed ones first.
        """
        if not outcome.proofs:
            return []
        best = outcome.winner or max(outcome.proofs, key=lambda proof: proof.gain)
        base, mine, unseen = self.said[BASELINE], self.said[best.candidate.key], {*self.data.proof}
        found: list[dict[str, Any]] = []
        asked: list[Any] = [task for task in (self.data.chair, self.data.pope) if task]
        for task in asked:
            for sample in task.samples:
                if sample.file not in unseen or sample.id not in mine:
                    continue
                if isinstance(task, Chair) and (base[sample.id] is None or mine[sample.id] is None):
                    continue  # a caption that failed has nothing to show
                before, after = (self._wrong(task, sample, given[sample.id]) for given in (base, mine))
                if before[0] != after[0] and not (before[0] and after[0]):
                    found.append(
                        {
                            "sample": sample,
                            "task": task.benchmark,
                            "base": (base[sample.id], before[1]),
                            "method": (mine[sample.id], after[1]),
                            "fixed": after[0] == 0,
                        }
                    )
        return found

    def _wrong(self, task: Any, sample: Any, answer: str | None) -> tuple[int, list[tuple[int, int, bool]]]:
        """How much is wrong in an answer, and its marked words (start, end, right)."""
        if isinstance(task, Chair):
            (scored,) = task.score({sample.id: answer})["captions"].captions
            marks = [(o.start, o.end, True) for o in scored.correct] + [
                (o.start, o.end, False) for o in scored.hallucinated
            ]
            return len(scored.hallucinated), sorted(marks)
        right = (
            answer is not None and verdict(answer, sample.reference["label"], task.scorer) == sample.reference["label"]
        )
        return int(not right), [(0, len(answer or ""), right)]

    def _ask(self, key: str, images: Sequence[str]) -> dict[str, Any]:
        here, start = {*images}, time.monotonic()
        found: dict[str, Any] = {"answers": {}, "tokens": 0, "seconds": 0.0, "warnings": [], "pace": {}}
        tasks: list[Any] = [task for task in (self.data.chair, self.data.pope) if task]
        asked = {task.benchmark: [sample for sample in task.samples if sample.file in here] for task in tasks}
        most = math.inf if key == BASELINE else self._most(asked)
        run = Run(key, tuple(self.stacks.get(key, (Baseline(),))))
        errors = []
        try:
            with run.applied(self.model):
                for task in tasks:
                    how = self.settings.generate_kwargs(task.max_new_tokens)
                    if task is self.data.pope and task is not None:
                        how |= {"max_new_tokens": task.max_new_tokens}
                    spent = 0.0
                    for batch in generation.batches(asked[task.benchmark], int(self.settings.batch_size)):
                        if not self.warm:  # a process's first call is slow, and no candidate's fault
                            generation.answer(self.model, self.processor, batch[:1], 0, **how)
                            self.warm = True
                        begun, saved = self._clock(), self.features.saved
                        with self.features.of(tuple(sample.id for sample in batch)):
                            rows = generation.answer(self.model, self.processor, batch, self.settings.seed, **how)
                        took = self._clock() - begun + self.features.saved - saved  # as if it had shared nothing
                        spent, found["seconds"] = spent + took, found["seconds"] + took
                        for sample, row in zip(batch, rows, strict=True):
                            found["answers"][sample.id] = row["answer"]
                            found["tokens"] += row["tokens"]
                            errors += [row["error"]] if row["error"] else []
                        found["warnings"] += [w for w in rows[0]["batch_warnings"] if w not in found["warnings"]]
                        done, of = len(found["answers"]), sum(map(len, asked.values()))
                        if found["seconds"] > most and done < of:
                            times = FAR * float(self.slowdown or 0)
                            return {
                                "dropped": f"too slow: {done} of {of} answers took {times:g} times as long as all of the model's "
                                "own, and it was stopped there"
                            }
                    found["pace"][task.benchmark] = spent, len(asked[task.benchmark])
        except VlmFixError as error:
            return {"dropped": str(error)}
        if errors and len(errors) == len(found["answers"]):
            return {"dropped": errors[0]}
        return {**found, "wall": time.monotonic() - start}

    def _most(self, asked: Mapping[str, Sequence[Any]]) -> float:
        """Seconds after which a candidate of the search is stopped: it is far beyond the limit, whatever the rest would take.

        In the proof nothing is stopped, as its end may depend on the time alone.
        """
        searched = {*self.data.search}
        if not self.slowdown or any(sample.file not in searched for samples in asked.values() for sample in samples):
            return math.inf
        if any(not self.pace.get(task, (0, 0))[1] for task, samples in asked.items() if samples):
            return math.inf
        usual = sum(
            len(samples) * self.pace[task][0] / self.pace[task][1] for task, samples in asked.items() if samples
        )
        return FAR * self.slowdown * usual

    def _clock(self) -> float:
        """The processor's own time on a CPU, which other work on the machine does not lengthen."""
        return time.process_time() if self.model.device.type == "cpu" else time.monotonic()

    def _table(self, key: str, images: Sequence[str], made: Mapping[str, Any]) -> Any:
        import numpy as np

        rows = {file: dict.fromkeys(COLUMNS, 0.0) for file in images}
        answers, base = made["answers"], self.said[BASELINE]
        for row in rows.values():
            row["seconds"], row["tokens"] = made["seconds"] / len(images), made["tokens"] / len(images)
        for task in (self.data.pope, self.data.chair):
            for sample in task.samples if task else ():
                if sample.id in answers and sample.file in rows:
                    rows[sample.file]["changed"] += answers[sample.id] != base[sample.id]
        if (pope := self.data.pope) is not None:
            for sample in pope.samples:
                if sample.id in answers and sample.file in rows:
                    count(rows[sample.file], answers[sample.id], sample.reference["label"], pope.scorer)
        if self.data.chair:
            self._captions(rows, answers, base)
        return np.array([[rows[file][name] for name in COLUMNS] for file in images])

    def _captions(self, rows: dict[str, dict[str, float]], answers: Answers, base: Answers) -> None:
        task = self.data.chair
        assert task
        here = [sample for sample in task.samples if sample.file in rows]
        samples = [
            s for s in here if answers.get(s.id) is not None and base.get(s.id) is not None
        ]  # both sides answered
        if not samples:
            return
        mine, theirs = (task.score({s.id: given[s.id] for s in samples})["captions"] for given in (answers, base))
        cut_theirs, cut_mine = at_equal_length(theirs, mine)
        for sample, row, cut, base_cut in zip(samples, mine.rows, cut_mine, cut_theirs, strict=True):
            into = rows[sample.file]
            for name, value in (
                ("captions", 1),
                ("mentions", row["mentions"]),
                ("invented", row["hallucinated"]),
                ("found", row["found"]),
                ("truth", row["truth"]),
                ("words", row["tokens"]),
                ("cut_mentions", cut["mentions"]),
                ("cut_invented", cut["hallucinated"]),
                ("base_cut_mentions", base_cut["mentions"]),
                ("base_cut_invented", base_cut["hallucinated"]),
            ):
                into[name] += value


def count(row: dict[str, float], answer: str | None, label: str, scorer: Any) -> None:
    """Add an answer to a question; None, and what is neither yes nor no, is right of none."""
    said = "failed" if answer is None else verdict(answer, label, scorer)
    row["positive" if label == "yes" else "negative"] += 1
    if said == "yes":
        row["tp" if label == "yes" else "fp"] += 1
    elif said == "no" and label == "no":
        row["tn"] += 1
