"""POPE by token probability: is yes likelier than no as the first word, and how well do these probabilities rank answers?

A row of the answer file has question_id, p_yes and p_no: the probabilities, as the first token of the answer, of all tokens
that count as yes and as no. Which tokens these are changes the figures by points (" Yes" and "yes" and "YES"), so the file
names them once, in a row's `yes_tokens` and `no_tokens`; without them a warning says so. The samples.jsonl of `vlm-fix eval`,
or its folder, brings questions, labels and tokens along; every run and split in it is a part.

    accuracy, precision, recall, f1, yes_ratio as for POPE, with the answer yes if p_yes > p_no
    p     = p_yes / (p_yes + p_no)            mass = mean of p_yes + p_no: what is left for all other tokens is 1 - mass
    auroc = probability that a question with label yes has a higher p than one with label no, ties counting half
    ece   = sum over 10 bins of equal width of (n in bin / n) |accuracy - confidence|; confidence = max(p, 1 - p)

Source: P. Bradley, Pattern Recognition 30 (1997), AUROC; C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
ECE; that the set of tokens matters: pope-audit 0.1.1.

Worked example: two right and sure, one wrong and unsure.
>>> asked = [Question(i, "1.jpg", "Is there a dog in the image?", label) for i, label in enumerate(("yes", "no", "no"))]
>>> found = score(asked, [(0.8, 0.1), (0.1, 0.9), (0.3, 0.2)])
>>> [round(found.figures[name], 3) for name in ("accuracy", "auroc", "ece", "mass")]
[0.667, 1.0, 0.27, 0.8]
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import counted, read_rows, read_text

from .answers import IMAGES, LABELS, QUESTIONS, first, same_question
from .benchmark import YES_NO_COLUMNS, Argument, Benchmark, Layout, YesNo, plain_caption
from .pope.data import load_questions
from .pope.files import image_key
from .pope.score import METRICS, Question
from .replies import counts, needs
from .result import Result, or_none, tally

SOURCE = "this project"
BINS = 10
ROW = '{"question_id": 1, "p_yes": 0.91, "p_no": 0.02, "yes_tokens": ["Yes", "yes"], "no_tokens": ["No", "no"]}'
TOKENS = ("yes_tokens", "no_tokens")
SAMPLES = "samples.jsonl"


def load_probabilities(
    path: str | Path, rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, tuple[float, float]], dict[str, list[str]]]:
    """Return id -> (p_yes, p_no) of the rows of a file, and the tokens that count as yes and as no, {} if none names them."""
    found: dict[str, tuple[float, float]] = {}
    tokens: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        needs(row, ("question_id", "p_yes", "p_no"), path, number)
        yes, no = (_number(row[key]) for key in ("p_yes", "p_no"))
        if not (0 <= yes <= 1 and 0 <= no <= 1) or not 0 < yes + no < 1.0001:
            raise VlmFixError(
                f"{path}, row {number}: p_yes {row['p_yes']!r} and p_no {row['p_no']!r} are not two probabilities "
                "with a sum above 0, at most 1."
            )
        id = _id(row)
        if id in found:
            raise VlmFixError(f"{path}, row {number}: question_id {id} comes twice; keep one.")
        found[id] = yes, no
        named = {name: _tokens(row[name]) for name in TOKENS if row.get(name)}
        if named and tokens and named != tokens:
            raise VlmFixError(f"{path}, row {number}: other tokens count as yes or no than in the rows before.")
        tokens = tokens or named
    return found, tokens


def _id(row: Mapping[str, Any]) -> str:
    return re.sub(r"\.0+$", "", str(row["question_id"]))  # pandas writes whole numbers so


def _tokens(value: Any) -> list[str]:
    """A list of tokens, also as a text of CSV: a JSON array, or words with spaces between them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = value.split()
    return [*map(str, found if isinstance(found, list | tuple) else [value])]


def _number(value: Any) -> float:
    """A number, also as a text of CSV; nan for anything else."""
    try:
        return float("nan" if isinstance(value, bool) or value is None else value)
    except (TypeError, ValueError):
        return float("nan")


def score(questions: Sequence[Question], probabilities: Sequence[tuple[float, float]]) -> Result:
    """Score (p_yes, p_no) of each question."""
    rows, sure = [], []
    for question, (yes, no) in zip(questions, probabilities, strict=True):
        rows.append(counts(question.image, question.label, "yes" if yes > no else "no"))
        sure.append((yes / (yes + no), question.label == "yes"))
    result = tally("p_yes > p_no", rows, METRICS, asked=[question.text for question in questions])
    right = [(max(p, 1 - p), bool(row["tp"] or row["tn"])) for (p, _), row in zip(sure, rows, strict=True)]
    mass = fmean(yes + no for yes, no in probabilities)
    result.figures.update({"auroc": or_none(auroc(sure)), "ece": ece(right), "mass": mass})
    return result


def auroc(scored: Sequence[tuple[float, bool]]) -> float:
    """Return the area under the ROC curve of (score, label); nan if a label is missing."""
    positive = sum(label for _, label in scored)
    negative = len(scored) - positive
    if not positive or not negative:
        return float("nan")
    order = sorted(scored)
    ranks, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and order[end][0] == order[start][0]:
            end += 1
        ranks += (start + 1 + end) / 2 * sum(label for _, label in order[start:end])  # the mean rank of a tie
        start = end
    return (ranks - positive * (positive + 1) / 2) / (positive * negative)


def ece(judged: Sequence[tuple[float, bool]]) -> float:
    """Return the expected calibration error of (confidence, right)."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in judged:
        bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, right))
    gaps = (len(b) * abs(fmean(right for _, right in b) - fmean(c for c, _ in b)) for b in bins.values())
    return sum(gaps) / len(judged)


def of_samples(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Result]:
    """Score rows of samples.jsonl that have p_yes and p_no, by (run, benchmark, split); other rows are left out."""
    found: dict[tuple[str, str, str], tuple[list[Question], list[tuple[float, float]]]] = {}
    for row in rows:
        if row.get("p_yes") is None or not row["p_yes"] + row["p_no"]:
            continue
        for split in row.get("splits", ["questions"]):
            label = row.get("labels", {}).get(split, row["label"])
            asked, given = found.setdefault((row["run"], row["benchmark"], split), ([], []))
            asked.append(Question(row["id"], row["image"], row["prompt"], label))
            given.append((row["p_yes"], row["p_no"]))
    return {key: score(*both) for key, both in found.items()}


def results(
    questions: str | None, answers: str, method: str | None = None, tell: Callable[[str], Any] = str
) -> dict[str, dict[str, Result]]:
    """Score a file of probabilities against a question file, or the samples of `vlm-fix eval`, and name the tokens."""
    path = Path(answers) / SAMPLES if Path(answers).is_dir() else Path(answers)
    rows = read_rows(path, "file of probabilities", ROW)
    if {"run", "benchmark", "batch"} <= rows[0].keys():
        if questions:
            raise VlmFixError(f"{answers} is of vlm-fix eval and brings its questions along: leave {questions} out.")
        found, tokens = _of_eval(path, rows, method, tell)
    elif method:
        raise VlmFixError("--method has no effect but on the samples of vlm-fix eval: leave it out.")
    elif not questions:
        raise VlmFixError(f"{answers} has no questions: give the question file before it, or coco:random and the like.")
    else:
        result, tokens = _of_file(path, rows, questions, tell)
        found = {"questions": result}
    named = {name: " ".join(map(repr, words)) for name, words in tokens.items()}
    return {"pope-prob": {part: replace(result, notes=named) for part, result in found.items()}}


def _of_eval(
    path: Path, rows: list[dict[str, Any]], method: str | None, tell: Callable[[str], Any]
) -> tuple[dict[str, Result], dict[str, list[str]]]:
    runs = list(dict.fromkeys(row["run"] for row in rows))
    if method and method not in runs:
        raise VlmFixError(f"{path} has no run {method!r}: give one of {', '.join(runs)}.")
    rows = [row for row in rows if row["run"] == (method or row["run"]) and row.get("label") in ("yes", "no")]
    for number, row in enumerate(rows, 1):
        _check_sample(path, number, row)
    found = of_samples(rows)
    if not found:
        raise VlmFixError(
            f"{path} has no p_yes and p_no of questions with yes or no: ask pope again with this version."
        )
    lost = sum(row.get("p_yes") is None for row in rows)
    tell(f"read {len(rows) - lost} rows of p_yes and p_no from {path}" + (f"; {lost} rows have none" if lost else ""))
    several = len({benchmark for _, benchmark, _ in found}) > 1
    made = path.with_name("results.json")
    try:
        tokens = json.loads(read_text(made, "results")).get("probabilities", {}) if made.is_file() else {}
        tokens = {name: tokens[name] for name in TOKENS if name in tokens}
    except VlmFixError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise VlmFixError(
            f"{made} does not say which tokens are yes and no: finish the run there with --resume, or move the answers away."
        ) from None
    return {
        (f"{name}: " if not method else "") + (f"{benchmark} {split}" if several else split): result
        for (name, benchmark, split), result in found.items()
    }, tokens


def _check_sample(path: Path, number: int, row: Mapping[str, Any]) -> None:
    """Raise VlmFixError for a sample with probabilities that is not as `vlm-fix eval` writes it, such as of a table."""
    given: list[Any] = [row.get("p_yes"), row.get("p_no")]
    if given[0] is None:
        return
    sane = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in given)
    shapes = {"splits": list, "labels": dict, "benchmark": str, "image": str, "prompt": str}
    filled: dict[str, Any] = {"splits": [], "labels": {}, **row}
    if not sane or sum(given) >= 1.0001 or not all(isinstance(filled.get(k), kind) for k, kind in shapes.items()):
        raise VlmFixError(
            f"{path}, question {number} of yes and no: it is not as vlm-fix eval writes it (p_yes {given[0]!r}, p_no "
            f"{given[1]!r}): give its own {SAMPLES}, unchanged."
        )


def _of_file(
    path: Path, rows: list[dict[str, Any]], questions: str, tell: Callable[[str], Any]
) -> tuple[Result, dict[str, list[str]]]:
    asked, (given, tokens), answers = load_questions(questions), load_probabilities(path, rows), path
    tell(f"read {len(given)} rows of p_yes and p_no from {answers}")
    lost = {str(q.question_id) for q in asked} ^ given.keys()
    if lost:
        raise VlmFixError(
            f"{len(asked)} questions and {len(given)} rows of probabilities do not line up (question_id {min(lost)!r}): give "
            "the question file that these were made from."
        )
    texts, other = {str(q.question_id): q for q in asked}, 0
    for number, row in enumerate(rows, 1):
        question = texts[_id(row)]
        _check_row(path, number, row, question, questions)
        other += first(row, LABELS).strip().lower() in {"yes", "no"} - {question.label}
    if other:
        differ = "differs" if other == 1 else "differ"
        tell(f"note: {counted(other, 'label')} of {answers} {differ} from the questions', which are used")
    if {*tokens} != {*TOKENS}:
        warnings.warn(
            f"{answers} does not name its yes_tokens and no_tokens: figures of other sets of tokens differ by points.",
            stacklevel=3,
        )
    return score(asked, [given[str(q.question_id)] for q in asked]), tokens


def _check_row(path: Path, number: int, row: Mapping[str, Any], question: Question, questions: str) -> None:
    """Raise VlmFixError for a row that has another question or image than the question of its id."""
    text = first(row, QUESTIONS) or (each if "?" in (each := first(row, ["text"])) else "")
    image = first(row, IMAGES)
    if text and not same_question(question.text, text):
        asked, meant = text, question.text
    elif image and image_key(image) != image_key(question.image):
        asked, meant = image, question.image
    else:
        return
    raise VlmFixError(
        f"{path}, row {number} answers {asked[:60]!r} under id {question.question_id!r}, where {questions} has {meant[:60]!r}: "
        "give the question file that these probabilities were made from."
    )


BENCHMARK = Benchmark(
    name="pope-prob",
    title="POPE by probability",
    source_commit=SOURCE,
    commits={},
    score_what="score probabilities of yes and no with POPE",
    arguments=(
        Argument("questions", {"metavar": "QUESTIONS", "nargs": "?", "help": "POPE question file"}),
        Argument(
            "answers",
            {
                "metavar": "ANSWERS",
                "help": "JSON lines: question_id, p_yes, p_no; yes_tokens, no_tokens once; or a folder of `vlm-fix eval`",
            },
        ),
        Argument("--method", {"metavar": "NAME", "help": "of a folder of `vlm-fix eval`: one of its runs (all)"}),
    ),
    results=results,
    asked=False,
    layouts={
        "pope-prob": Layout(
            columns={"accuracy": "accuracy", **YES_NO_COLUMNS},
            metrics=METRICS,
            compared=("accuracy", "f1", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=plain_caption("POPE by probability"),
            answers=YesNo(lambda answer, _, __: answer or "unknown", balanced=True),
            leaderboard={"accuracy": ""},
        )
    },
)
