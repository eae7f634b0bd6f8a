"""Replies by id, labels, and the counts of one yes/no answer: what the smaller benchmarks share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.stats import Metric, harmonic, ratio

from .answers import Answer, Answers, same_question

METRICS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["n"]),
    "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"]),
    "recall": lambda s: ratio(s["tp"], s["positive"]),
    "f1": lambda s: harmonic(METRICS["precision"](s), METRICS["recall"](s)),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}


def in_own_order(rows: Sequence[Answer]) -> list[Answer]:
    """Return rows in the order of their ids, so that the same answers in another order are the same result."""
    if all(row.id.isdecimal() for row in rows):
        return sorted(rows, key=lambda row: int(row.id))
    return sorted(rows, key=lambda row: row.id) if all(row.id for row in rows) else [*rows]


def by_id(answers: Answers) -> dict[str, Answer]:
    """Return id -> answer. Raises VlmFixError for an id that comes twice or is missing."""
    found: dict[str, Answer] = {}
    for row in answers.rows:
        if not row.id or row.id in found:
            wrong = f"id {row.id} comes twice; keep one answer" if row.id else "no id; name it with --id-key"
            raise VlmFixError(f"{answers.path}, row {row.number}: {wrong}.")
        found[row.id] = row
    return found


def asks(row: Answer, text: str, path: str | Path, what: str) -> None:
    """Raise VlmFixError if an answer is to another question than the one of its id. `path` is the answer file."""
    if row.question and not same_question(text, row.question):
        raise VlmFixError(
            f"{path}, row {row.number} answers {row.question[:60]!r}, but {what} {row.id} is {text[:60]!r}: give answers "
            "to these questions, or say which key is the id with --id-key."
        )


def paired(questions: Sequence[Any], given: Answers, what: str) -> list[str | None]:
    """Return the answer to each question, by `id`.

    Raises VlmFixError for unanswered questions, unknown ids, and an answer to another question than that of its id.
    """
    answers = by_id(given)
    lost = [question.id for question in questions if question.id not in answers]
    extra = answers.keys() - {question.id for question in questions}
    if lost or extra:
        which = f"no answer to {lost[0]!r}" if lost else f"an answer to {min(extra)!r}, which is no question"
        raise VlmFixError(
            f"{len(questions)} {what} questions and {len(answers)} answers do not line up ({which}): give one answer for each "
            "question, under its id."
        )
    for question in questions:
        asks(answers[question.id], question.text, given.path, f"{what} question")
    return [answers[question.id].reply for question in questions]


def needs(row: Mapping[str, Any], keys: Sequence[str], path: str | Path, number: int) -> None:
    """Raise VlmFixError naming the first of the keys that a row lacks."""
    for key in keys:
        if key not in row:
            raise VlmFixError(f'{path}, row {number}: no "{key}" in its keys {", ".join(row)}; add it.')


def label_of(value: Any, path: str | Path, number: int) -> str:
    """Return "yes" or "no"."""
    label = str(value).strip().lower()
    if label not in ("yes", "no"):
        raise VlmFixError(f"{path}, row {number}: label {value!r} is neither yes nor no.")
    return label


def counts(image: Any, label: str, said: str) -> dict[str, Any]:
    """Return the row of one answer; `said` is yes, no or unknown, which is wrong."""
    yes, positive = said == "yes", label == "yes"
    row = {"tp": yes and positive, "fp": yes and not positive, "tn": said == "no" and not positive}
    row |= {"fn": said == "no" and positive, "yes": yes, "positive": positive, "unparsed": said == "unknown"}
    return {"image": image, "n": 1} | {name: int(value) for name, value in row.items()}


def either(text: str | None) -> str:
    """Return yes if the reply holds "yes" in any case, else no if it holds "no", else unknown."""
    low = (text or "").lower()
    return "yes" if "yes" in low else "no" if "no" in low else "unknown"
