"""POPE: yes/no questions about objects that are, and are not, in an image.

Source: Y. Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023, arXiv:2305.10355;
official scorer RUCAIBox/POPE@3df3ba1. Other scorers read "no" differently; `yesno.py` has them with their commits.
Question files and the question maker are in `data.py`.

    accuracy  = right answers / questions           yes_ratio = answers of yes / questions
    precision = right yes / answers of yes          recall    = right yes / questions with label yes

Worked example: "Yes." to a question with label yes and "No." to one with label no are a true positive and a true negative,
except for lmms, which accepts only "yes" and "no" and counts both as wrong.

A question file has lines like {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
"text": "Is there a snowboard in the image?", "label": "yes"}.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.answers import same_question
from vlm_fix.eval.scorers.choices import Scorer, one_of
from vlm_fix.eval.scorers.plain import plain
from vlm_fix.eval.scorers.result import told
from vlm_fix.eval.scorers.yesno import Misread, misread, verdict
from vlm_fix.eval.stats import Metric, column_sums, harmonic, ratio

SOURCE = "RUCAIBox/POPE@3df3ba1"
Kind = Literal["random", "popular", "adversarial"]

METRICS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["n"]),
    "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"]),
    "recall": lambda s: ratio(s["tp"], s["tp"] + s["fn"]),
    "f1": lambda s: harmonic(METRICS["precision"](s), METRICS["recall"](s)),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}


@dataclass(frozen=True)
class Question:
    """A question; `image` is a file name, `label` "yes" or "no"."""

    question_id: int | str
    image: str
    text: str
    label: str


@dataclass(frozen=True)
class Answer:
    """A model's answer, None if it failed; `prompt` and `label` are "" if the file does not have them."""

    question_id: int | str
    text: str | None
    prompt: str = ""
    label: str = ""


@dataclass(frozen=True)
class PopeResult:
    """Counts and fractions (0 to 1) of one split.

    With lmms, vlmevalkit and ours tp+fp+tn+fn can be below n, as some answers are neither yes nor no. `unparsed` counts
    the answers without any word for yes or no, however the scorer reads them; `misread` are those it takes against their
    plain word. `correct` and `rows` (counts with their image, for `stats.paired_bootstrap`) are in the order of the
    questions. `repope` is the result with RePOPE's labels, where it was asked for beside POPE's; `labels` says whose a
    result has. `asked` are the texts of the questions.
    """

    scorer: str
    n: int
    tp: int
    fp: int
    tn: int
    fn: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: int
    questions_sha256: str
    correct: list[bool] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    misread: Misread = Misread()
    labels: str = "pope"
    repope: "PopeResult | None" = field(default=None, repr=False)
    asked: Sequence[str] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds: everything but the per-question lists."""
        left_out = ("correct", "rows", "misread", "repope", "asked")
        return {name: value for name, value in vars(self).items() if name not in left_out} | told(self.misread)


def score(questions: Sequence[Question], answers: Sequence[Answer], scorer: Scorer = "official") -> PopeResult:
    """Score answers, matched by question_id, exactly as `scorer` does. Raises VlmFixError if they do not line up.

    An answer of None (the model failed) is wrong under every scorer: neither yes nor no, unparsed, and a miss (FN) if the
    object is in the image.
    """
    one_of(scorer, Scorer, "scorer")
    replies = _aligned(questions, answers)
    rows: list[dict[str, Any]] = []
    verdicts = [
        "failed" if reply is None else verdict(reply, question.label, scorer)
        for question, reply in zip(questions, replies, strict=True)
    ]
    for question, said in zip(questions, verdicts, strict=True):
        yes = question.label == "yes"
        row = {"tp": yes and said == "yes", "fp": not yes and said == "yes", "tn": not yes and said == "no"}
        # VLMEvalKit's recall is over all positives: an unknown answer is a miss there, and no answer for lmms-eval
        row["fn"] = yes and (said in ("no", "failed") or (scorer in ("vlmevalkit", "ours") and said == "unknown"))
        row |= {"yes": yes if scorer == "lmms" else said == "yes", "positive": yes}
        row["unparsed"] = said not in ("yes", "no")
        rows.append({"image": question.image, "n": 1} | {name: int(value) for name, value in row.items()})
    sums = column_sums(rows, ["n", "tp", "fp", "tn", "fn", "yes"])
    figures: dict[str, Any] = {name: int(sums[name]) for name in ("n", "tp", "fp", "tn", "fn")}
    figures |= {name: float(metric(sums)) for name, metric in METRICS.items()}
    return PopeResult(
        scorer=scorer,
        **figures,
        unparsed=sum(reply is None or not _speaks(reply) for reply in replies),
        questions_sha256=questions_sha256(questions),
        correct=[bool(row["tp"] or row["tn"]) for row in rows],
        rows=rows,
        misread=misread(replies, verdicts),
        asked=[question.text for question in questions],
    )


def _speaks(reply: str) -> bool:
    """Whether there is a word for yes or no, in any of the languages that `plain` knows."""
    return bool(re.search(r"\b(yes|no|not)\b|n['’]t\b", reply.lower())) or plain(reply) != "unknown"


def questions_sha256(questions: Iterable[Question]) -> str:
    """Hash the questions as JSON lines. For the official files this is the hash of the file with "\\n" line ends."""
    return hashlib.sha256("".join(json.dumps(asdict(q)) + "\n" for q in questions).encode()).hexdigest()


def _aligned(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str | None]:
    """Return the reply to each question."""
    if not questions or not answers:
        raise VlmFixError(f"There are no {'answers' if questions else 'questions'} to score.")
    by_id = {str(answer.question_id): answer for answer in answers}  # tables and some models write numbers as texts
    mismatch = next((q for q in questions if str(q.question_id) not in by_id), None)
    if mismatch or not len(by_id) == len(answers) == len(questions):
        known = {str(q.question_id) for q in questions}
        times = Counter(str(answer.question_id) for answer in answers)
        if twice := next((id for id, n in times.items() if n > 1 and id in known), None):
            raise VlmFixError(
                f"Questions and answers do not line up: {len(questions)} questions, {len(answers)} answers, of which "
                f"{times[twice]} have the question_id {twice!r}; keep one answer of each question."
            )
        first = (
            mismatch.question_id
            if mismatch
            else next((answer.question_id for answer in answers if str(answer.question_id) not in known), "")
        )
        raise VlmFixError(
            f"Questions and answers do not line up: {len(questions)} questions, {len(answers)} answers, first mismatch "
            f"at question_id {first!r}; give the question file that these answers were made from."
        )
    for question in questions:
        prompt = by_id[str(question.question_id)].prompt
        if prompt and not same_question(question.text, prompt):  # it may hold more, such as "Answer with one word."
            raise VlmFixError(
                f"Questions and answers do not line up: question_id {question.question_id!r} asks {question.text!r} "
                f"but its answer is to {prompt!r}; give the question file that these answers were made from."
            )
    return [by_id[str(question.question_id)].text for question in questions]
