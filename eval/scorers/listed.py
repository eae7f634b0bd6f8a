"""FOHE and R-Bench: yes/no questions in POPE's format, with a script of their own.

    fohe      Anonymousanoy/FOHE@b563de5 caculate.py: an answer is yes if it holds "Yes", else no if it holds "No"; others
              are left out: `n` counts those that are not, `left_out` those that are. Of coco_fohe.json's 139 questions 40
              have an id that comes again, so answers are matched by their order.
    r-bench   mrwu-mac/R-Bench@d9d73c0 eval.py: an answer is read as by POPE's official script. 1e-5 is added to the
              denominators of precision, recall and F1. --subsets takes its files of question ids (five balanced
              ones for each kind of question); their figures are averaged. Questions without an answer are left out.

--scorer ours takes an answer's plain word instead (`plain.py`); one without any is wrong, and none is left out.

`vlm-fix eval pope --questions FILE --data coco:DIR` asks the questions of either.

Worked example: both read "Yes, a dog" as yes; "I think not." is no answer for FOHE, and no for R-Bench.
>>> [(read(name, "Yes, a dog"), read(name, "I think not.")) for name in ("fohe", "r-bench")]
[('yes', 'unknown'), ('yes', 'no')]
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_text
from vlm_fix.eval.stats import Metric, ratio

from . import yesno
from .answers import Keys, same_question
from .benchmark import KEYS, YES_NO_COLUMNS, Argument, Benchmark, Layout, YesNo, figures_of, plain_caption
from .pope.data import load_answers, load_questions
from .pope.score import Answer, Question
from .replies import METRICS, counts
from .result import Result, tally

SMALL = 0.00001
R_BENCH: dict[str, Metric] = {
    **METRICS,
    "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"] + SMALL),
    "recall": lambda s: ratio(s["tp"], s["tp"] + s["fn"] + SMALL),
    "f1": lambda s: _f1(R_BENCH["precision"](s), R_BENCH["recall"](s)),
}
SCORERS = ("official", "ours")
SOURCES = {"fohe": "Anonymousanoy/FOHE@b563de5", "r-bench": "mrwu-mac/R-Bench@d9d73c0"}
TITLES = {"fohe": "FOHE", "r-bench": "R-Bench"}


def _f1(precision: Any, recall: Any) -> Any:
    return 2 * precision * recall / (precision + recall + SMALL)


def read(name: str, reply: str | None, scorer: str = "official") -> str:
    """Return yes, no or unknown."""
    if name == "r-bench" or reply is None or scorer == "ours":
        return yesno.verdict(reply, "", "ours" if scorer == "ours" else "official")
    return "yes" if "Yes" in reply else "no" if "No" in reply else "unknown"


def results(
    name: str,
    questions: str,
    answers: str,
    subsets: str | None = None,
    scorer: str = "official",
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Callable[[str], Any] = str,
) -> dict[str, dict[str, Result]]:
    """Score an answer file against a question file; with `subsets` each of them is a part."""
    asked, given = load_questions(questions), load_answers(answers, Keys(answer_key, id_key), tell)
    if name == "fohe":
        asked, given = _numbered(asked, given)
    _once([str(q.question_id) for q in asked], questions)
    _once([str(answer.question_id) for answer in given], answers)
    said = {str(answer.question_id): answer.text for answer in given}
    strange = said.keys() - {str(q.question_id) for q in asked}
    if strange or not said:
        raise VlmFixError(f"{answers} answers question {min(strange, default='')!r}, which {questions} does not ask.")
    texts = {str(q.question_id): q.text for q in asked}
    for answer in given:
        text = texts[str(answer.question_id)]
        if answer.prompt and not same_question(text, answer.prompt):
            raise VlmFixError(
                f"{answers} answers {answer.prompt[:60]!r} under id {answer.question_id!r}, where {questions} asks "
                f"{text[:60]!r}: give the question file that these answers were made from."
            )
    rows = {str(q.question_id): _row(name, q, said, scorer) for q in asked}
    metrics = R_BENCH if name == "r-bench" else METRICS
    parts = {"questions": [*rows]} | (_subsets(subsets) if subsets else {})
    lost = next((key for ids in parts.values() for key in ids if key not in rows), None)
    if lost:
        raise VlmFixError(f"The subsets name question {lost!r}, which {questions} does not ask.")
    out = [said[key] or "" for key, row in rows.items() if row and not row["n"]]
    if out:
        kept = f"of {len(said)} answers {len(out)} hold neither Yes nor No, such as {min(out, key=lambda text: not text)[:60]!r}"
        if len(out) == len(said):
            raise VlmFixError(
                f"{answers}: {kept}: FOHE's script would score none of them; --scorer ours reads every answer."
            )
        tell(
            f"note: {kept}: FOHE's script leaves them out of its figures, and so does this; --scorer ours reads every answer"
        )
    found = {}
    for part, ids in parts.items():
        mine = [key for key in ids if rows[key]]
        replies = [said[key] for key in mine]
        misread = yesno.misread(replies, [read(name, reply, scorer) for reply in replies])
        result = tally(scorer, [rows[key] for key in mine], metrics, misread, [texts[key] for key in mine])
        left = len(mine) - sum(rows[key]["n"] for key in mine)
        notes = {"left_out": left} if name == "fohe" and scorer == "official" else {}
        found[part] = dataclasses.replace(result, n=len(mine) - left, notes=notes)
    return {name: found}


def _once(ids: Sequence[str], path: str) -> None:
    twice = next((id for id, times in Counter(ids).items() if times > 1), None)
    if twice is not None:
        raise VlmFixError(f"{path}: question_id {twice!r} comes twice; keep one.")


def _numbered(asked: list[Question], given: list[Answer]) -> tuple[list[Question], list[Answer]]:
    """Number both in their order. Raises VlmFixError if they do not line up."""
    pairs = list(zip(asked, given, strict=False))
    odd = next((n for n, (q, a) in enumerate(pairs, 1) if str(a.question_id) not in (str(q.question_id), str(n))), None)
    if odd or len(asked) != len(given):
        raise VlmFixError(
            f"{len(asked)} questions and {len(given)} answers do not line up{f' in row {odd}' if odd else ''}: give one answer "
            "for each question, in the same order."
        )
    new = [
        (dataclasses.replace(q, question_id=n), dataclasses.replace(a, question_id=n)) for n, (q, a) in enumerate(pairs)
    ]
    return [q for q, _ in new], [a for _, a in new]


def _row(name: str, question: Question, said: Mapping[str, str | None], scorer: str) -> dict[str, Any]:
    """The counts of a question, {} if nobody answered it; all are 0, but for its label, if the script leaves it out."""
    key = str(question.question_id)
    if key not in said:
        return {}
    verdict = read(name, said[key], scorer)
    row = counts(question.image, question.label, verdict)
    if name == "fohe" and scorer == "official" and verdict == "unknown" and said[key] is not None:
        row = {"image": question.image} | dict.fromkeys([column for column in row if column != "image"], 0)
    return {**row, "label": int(question.label == "yes")}


def _subsets(files: str) -> dict[str, list[str]]:
    """File name -> question ids."""
    found = {}
    for path in (part.strip() for part in files.split(",")):
        try:
            found[path] = [str(key) for key in json.loads(read_text(path, "list of question ids"))]
        except VlmFixError:
            raise
        except (ValueError, TypeError, RecursionError):
            raise VlmFixError(f"{path} is not a JSON array of question ids.") from None
    return found


def shown(results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """Return the figures of each part; with subsets also their mean."""
    found = figures_of(results)
    over = [figures for part, figures in found.items() if part != "questions"]
    if over:
        found["mean of the subsets"] = {metric: fmean(figures[metric] for figures in over) for metric in METRICS}
    return found


def _benchmark(name: str, extra: Sequence[Argument] = ()) -> Benchmark:
    return Benchmark(
        name=name,
        title=TITLES[name],
        source_commit=SOURCES[name],
        commits={"official": SOURCES[name]},
        score_what=f"score {TITLES[name]} answers",
        arguments=(
            Argument(
                "questions", {"metavar": "QUESTIONS", "help": "JSON lines or array: question_id, image, text, label"}
            ),
            Argument("answers", {"metavar": "ANSWERS", "help": "JSON lines: question_id, text or answer"}),
            Argument(
                "--scorer",
                {"choices": SCORERS, "default": "official", "help": "its script, or the plain word (%(default)s)"},
            ),
            *extra,
            *KEYS,
        ),
        results=functools.partial(results, name),
        shown=shown,
        asked=False,
        layouts={
            name: Layout(
                columns={"accuracy": "accuracy", **YES_NO_COLUMNS},
                metrics=R_BENCH if name == "r-bench" else METRICS,
                compared=("accuracy", "f1", "yes_ratio"),
                right=lambda row: row["tp"] or row["tn"],
                caption=plain_caption(TITLES[name]),
                answers=YesNo(lambda answer, _, scorer: read(name, answer, scorer)),
                leaderboard={"accuracy": ""},
            )
        },
    )


FOHE = _benchmark("fohe")
R_BENCH_FILES = Argument("--subsets", {"metavar": "A,B", "help": "files of question ids, whose figures are averaged"})
R_BENCHMARK = _benchmark("r-bench", (R_BENCH_FILES,))
