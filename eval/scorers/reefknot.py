"""Reefknot: relations between objects, as yes/no questions and as a choice of four.

Source: K. Zheng et al., Reefknot: A Comprehensive Benchmark for Relation Hallucination Evaluation, ACL 2025 Findings,
arXiv:2408.09429; questions JackChen-seu/Reefknot@310ec0c Dataset/ (9740 yes/no, 98 of them twice, and 6950 choices), rules
RLC-bench/neok_code/utils.py of its commit 06c35f9. Relations are "perception" (on, behind) or "cognitive" (eating, using).
The third kind of question, open ones, needs a language model as judge and is not scored.

    accuracy = right answers / questions; the hallucination rate of the paper is 1 - accuracy

    scorer     yes/no                                       choice
    official   yes if the reply holds "yes", else no        the first character of the reply, in any case
    ours       the first of the words yes and no            the first of the letters A to D that stands alone
    others     as for POPE                                  as official

Worked example:
>>> verdict("It is.", "yes", "official"), choice("d. into", "official"), choice("Answer: D", "official")
('no', 'D', 'A')
>>> choice("Answer: D", "ours")
'D'
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_rows
from vlm_fix.eval.stats import Metric, ratio

from . import yesno
from .answers import Keys, read
from .benchmark import KEYS, YES_NO_COLUMNS, Argument, Benchmark, Choice, Layout, YesNo, plain_caption, scorer_option
from .choices import Scorer, one_of
from .replies import METRICS, counts, needs
from .result import Result, tally

SOURCE = "JackChen-seu/Reefknot@06c35f9"
TYPES = {"Yes/No": "reefknot", "Multichoice": "reefknot-choice"}
CHOICE: dict[str, Metric] = {"accuracy": lambda s: ratio(s["right"], s["n"])}


ROW = '{"image_id": "1592267", "query_prompt": "Is the cup on the table?", "label": "yes", "type": "Yes/No", "response": "Yes"}'


class Question(NamedTuple):
    """A question; `type` is a task, `relation` perception or cognitive, `label` yes, no or a letter."""

    id: str
    image: str
    text: str
    type: str
    relation: str
    label: str


def load(
    path: str | Path,
    answered: bool = True,
    answer_key: str | None = None,
    tell: Callable[[str], Any] = str,
) -> tuple[list[Question], list[str | None]]:
    """Read YESNO.jsonl, Multichoice.jsonl or both in one file; with `answered` each row has its `response`."""
    found: list[Question] = []
    answers: list[str | None] = []
    times: Counter[str] = Counter()
    rows: Sequence[Any] = read_rows(path, "Reefknot file") if not answered else []
    if answered:
        given = read(path, ROW, Keys(answer_key))
        tell(given.told())
        rows, answers = [answer.row for answer in given.rows], [answer.reply for answer in given.rows]
    for number, row in enumerate(rows, 1):
        needs(row, ("image_id", "query_prompt", "label", "type", "relation_type"), path, number)
        kind, label = TYPES.get(row["type"]), str(row["label"]).strip()
        label = label.lower() if kind == "reefknot" else label.upper()
        if kind is None or label not in (("yes", "no") if kind == "reefknot" else tuple("ABCD")):
            raise VlmFixError(
                f"{path}, row {number}: type {row['type']!r} with label {row['label']!r} is not scored: give yes/no questions "
                "(Yes/No) and choices (Multichoice); open questions need a judge."
            )
        place = f"{row['image_id']}|{row['query_prompt']}"
        times[place] += 1
        place += f"|{times[place]}" if times[place] > 1 else ""
        found.append(Question(place, str(row["image_id"]), row["query_prompt"], kind, row["relation_type"], label))
    if answered and not any(answers):
        raise VlmFixError(f'{path}: every "response" is empty; put the answers of a model there.')
    return found, answers


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown."""
    if answer is None or scorer != "official":
        return yesno.verdict(answer, label, scorer)
    return "yes" if "yes" in answer.lower() else "no"


def choice(answer: str | None, scorer: Scorer) -> str:
    """Return the letter that was chosen, or ""."""
    if scorer == "ours":
        first = re.search(r"\b[A-D]\b", answer or "")
        return first[0] if first else ""
    return (answer or "")[:1].upper()


def letter(answer: str) -> str:
    """Return the one letter that stands alone in an answer; unknown if there is none, or several."""
    found = {*re.findall(r"\b[A-D]\b", answer)}
    return found.pop() if len(found) == 1 else "unknown"


def score(
    answers: Sequence[str | None], questions: Sequence[Question], scorer: Scorer = "official"
) -> dict[str, Result]:
    """Score the questions of one task by part: each kind of relation, and all. None is an answer that failed: wrong."""
    one_of(scorer, Scorer, "scorer")
    asked = len({q.type for q in questions})
    if asked != 1:
        raise VlmFixError("Score yes/no questions and choices apart.")
    rows, words = [], []
    for answer, q in zip(answers, questions, strict=True):
        if q.type == "reefknot":
            words.append(verdict(answer, q.label, scorer))
            rows.append(counts(q.image, q.label, words[-1]))
        else:
            said = choice(answer, scorer)
            words.append(said if said in tuple("ABCD") else "unknown")
            marks = {"right": int(said == q.label), "unparsed": int(words[-1] == "unknown")}
            rows.append({"image": q.image, "n": 1, **marks})
    plain = questions[0].type == "reefknot"
    metrics = METRICS if plain else CHOICE
    how: dict[str, Any] = {} if plain else {"read": letter, "neither": "none of A to D"}
    kinds = dict.fromkeys(q.relation for q in questions)
    parts = {kind: [n for n, q in enumerate(questions) if q.relation == kind] for kind in kinds}
    parts |= {"questions": [*range(len(rows))]} if len(parts) > 1 else {}
    found = {}
    for part, its in parts.items():
        misread = yesno.misread([answers[n] for n in its], [words[n] for n in its], **how)
        found[part] = tally(scorer, [rows[n] for n in its], metrics, misread, [questions[n].text for n in its])
    return found


def results(
    answers: str,
    scorer: Scorer = "official",
    answer_key: str | None = None,
    tell: Callable[[str], Any] = str,
) -> dict[str, dict[str, Result]]:
    """Score an answer file by task and part; rows in the order of images and questions."""
    both = sorted(zip(*load(answers, True, answer_key, tell), strict=True), key=lambda pair: pair[0])
    found = {}
    for task in TYPES.values():
        mine = [(answer, question) for question, answer in both if question.type == task]
        if mine:
            found[task] = score([answer for answer, _ in mine], [question for _, question in mine], scorer)
    return found


def shown(results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """Return the figures of each part of both tasks."""
    return {
        part if task == "reefknot" else f"choice, {part}": result.to_dict()
        for task, parts in results.items()
        for part, result in parts.items()
    }


BENCHMARK = Benchmark(
    name="reefknot",
    title="Reefknot",
    source_commit=SOURCE,
    commits={"official": SOURCE, **yesno.COMMITS},
    score_what="score Reefknot answers",
    arguments=(
        Argument(
            "answers", {"metavar": "ANSWERS", "help": "YESNO.jsonl or Multichoice.jsonl with response in each row"}
        ),
        scorer_option(),
        KEYS[0],
    ),
    results=results,
    shown=shown,
    layouts={
        "reefknot": Layout(
            columns={"accuracy": "acc", **YES_NO_COLUMNS},
            metrics=METRICS,
            compared=("accuracy", "f1", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=plain_caption("Reefknot, yes/no questions about relations"),
            answers=YesNo(verdict, balanced=True, total="questions"),
            leaderboard={"accuracy": ""},
        ),
        "reefknot-choice": Layout(
            columns={"accuracy": "acc", "unparsed": "unp."},
            metrics=CHOICE,
            compared=("accuracy",),
            right=lambda row: row["right"],
            caption=plain_caption("Reefknot, relations as a choice of four"),
            answers=Choice(lambda answer, _, scorer: choice(answer, scorer)),
            leaderboard={"accuracy": ""},
        ),
    },
)
