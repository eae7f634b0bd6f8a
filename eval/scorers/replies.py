"""The replies of a file of rows, by id, and the counts of one yes/no answer: what the smaller benchmarks share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_rows
from vlm_fix.eval.stats import Metric, harmonic, ratio

IDS = ("question_id", "id")
REPLIES = ("response", "answer", "text", "model_prediction")
METRICS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["n"]),
    "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"]),
    "recall": lambda s: ratio(s["tp"], s["positive"]),
    "f1": lambda s: harmonic(METRICS["precision"](s), METRICS["recall"](s)),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}


def by_id(path: str | Path, what: str) -> dict[str, str | None]:
    """Return id -> reply of a file of answers. Raises VlmFixError for ids that come twice and rows without either."""
    found: dict[str, str | None] = {}
    for number, row in enumerate(read_rows(path, f"{what} answer file", '{"id": 0, "answer": "No."}'), 1):
        key = str(row[one_key(row, IDS, path, number)])
        if key in found:
            raise VlmFixError(f"{path}, row {number}: id {key} comes twice; keep one answer.")
        found[key] = reply(row, path, number)
    return found


def reply(row: Mapping[str, Any], path: str | Path, number: int, keys: Sequence[str] = REPLIES) -> str | None:
    """Return the reply of a row; null is an answer that failed."""
    text = row[one_key(row, keys, path, number)]
    if text is not None and not isinstance(text, str):
        raise VlmFixError(f"{path}, row {number}: the reply {text!r} is not a text.")
    return text


def one_key(row: Mapping[str, Any], keys: Sequence[str], path: str | Path, number: int) -> str:
    """Return the one of the keys that the row has. Raises VlmFixError if there is none, or more than one."""
    there = [key for key in keys if key in row]
    if len(there) != 1:
        what = f"both {there[0]!r} and {there[1]!r}: leave one out" if there else f"none of {', '.join(keys)}: add one"
        raise VlmFixError(f"{path}, row {number} has {what}.")
    return there[0]


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
