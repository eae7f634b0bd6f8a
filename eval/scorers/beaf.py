"""BEAF: the same question before and after the object it is about was removed from the image.

Source: M. Ye-Bin et al., BEAF: Observing BEfore-AFter Changes to Evaluate Hallucination in Vision-language Models, ECCV
2024; official scorer postech-ami/BEAF@41b71d5 beaf_metric.py. 26,118 questions about 500 images and their edited copies.
1727 of them are about the removed object (yes before, no after), the others about objects that stay.

    TU   = removed objects with yes before and no after                       right both times, true understanding
    IG   = removed objects with no before and yes after                       wrong both times, ignorance
    SB+  = removed objects with yes both times, SB- = with no both times      stubbornness
    ID   = other questions that are right before and wrong after, or wrong before and right after: indecision
    F1 (TU, ID) = 2 TU (1 - ID) / (TU + 1 - ID)

TU, IG, SB+ and SB- are shares of the removed objects. A reply is yes if it holds "yes" in any case, else no if it holds
"no". Deviation: one with neither gets the answer of the question before it in the official script; here it is wrong, and a
removed object with such an answer is in none of the four.

Worked example: the dog is removed and the model still sees it (SB+); on the edited copy it also denies the car.
>>> asked = [Question("0", "1.jpg", "dog?", "yes", True, False), Question("1", "1_00.jpg", "dog?", "no", False, True),
...          Question("2", "1.jpg", "car?", "yes", True, False), Question("3", "1_00.jpg", "car?", "yes", False, False)]
>>> figures = score(["Yes", "Yes", "Yes", "No"], asked).figures
>>> [figures[name] for name in ("tu", "sb_yes", "id")]
[0.0, 1.0, 1.0]
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_rows
from vlm_fix.eval.stats import Metric, harmonic, ratio

from . import yesno
from .answers import Keys, read
from .benchmark import KEYS, YES_NO_COLUMNS, Argument, Benchmark, Layout, YesNo, plain_caption, scorer_option
from .choices import Scorer, one_of
from .replies import METRICS as YES_NO
from .replies import counts, either, label_of, needs, paired
from .result import Result, tally

SOURCE = "postech-ami/BEAF@41b71d5"
CHANGES = {("yes", "no"): "tu", ("no", "yes"): "ig", ("yes", "yes"): "sb_yes", ("no", "no"): "sb_no"}
METRICS: dict[str, Metric] = {
    **YES_NO,
    "tu": lambda s: ratio(s["n_tu"], s["removed"]),
    "ig": lambda s: ratio(s["n_ig"], s["removed"]),
    "sb_yes": lambda s: ratio(s["n_sb_yes"], s["removed"]),
    "sb_no": lambda s: ratio(s["n_sb_no"], s["removed"]),
    "id": lambda s: ratio(s["n_id"], s["kept"]),
    "f1_tu_id": lambda s: harmonic(METRICS["tu"](s), 1 - METRICS["id"](s)),
}


class Question(NamedTuple):
    """A question; `original` says that the image is not edited, `removed` that the question is about what was removed."""

    id: str
    image: str
    text: str
    label: str
    original: bool
    removed: bool

    @property
    def before(self) -> str:
        """The name of the image before it was edited."""
        return self.image if self.original else self.image[:-7] + ".jpg"


def load_questions(path: str | Path) -> list[Question]:
    """Read beaf_qna.json: rows with id, image, question, gt, orig_img and removed_q."""
    found = []
    for number, row in enumerate(read_rows(path, "BEAF question file"), 1):
        needs(row, ("id", "image", "question", "gt", "orig_img", "removed_q"), path, number)
        label = label_of(row["gt"], path, number)
        flags = bool(row["orig_img"]), bool(row["removed_q"])
        found.append(Question(str(row["id"]), row["image"], row["question"], label, *flags))
    return found


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown."""
    return either(answer) if scorer == "official" else yesno.verdict(answer, label, scorer)


def score(answers: Sequence[str | None], questions: Sequence[Question], scorer: Scorer = "official") -> Result:
    """Score answers; None is an answer that failed. Raises VlmFixError if a question was not asked before the edit."""
    one_of(scorer, Scorer, "scorer")
    said = [verdict(answer, q.label, scorer) for answer, q in zip(answers, questions, strict=True)]
    before = {(q.image, q.text): (one, q.label) for q, one in zip(questions, said, strict=True) if q.original}
    rows = []
    for question, one in zip(questions, said, strict=True):
        row = counts(question.before, question.label, one)
        row |= dict.fromkeys(("removed", "kept", "n_id", *(f"n_{change}" for change in CHANGES.values())), 0)
        if not question.original:
            if (question.before, question.text) not in before:
                raise VlmFixError(
                    f"{question.text!r} is asked of {question.image} but not of {question.before}, from which it was made: "
                    "give all questions of BEAF."
                )
            first, label = before[question.before, question.text]
            row["removed" if question.removed else "kept"] = 1
            if not question.removed:
                row["n_id"] = int((first == label) != (one == question.label))
            elif (first, one) in CHANGES:
                row[f"n_{CHANGES[first, one]}"] = 1
        rows.append(row)
    return tally(scorer, rows, METRICS, yesno.misread(answers, said), [q.text for q in questions])


def results(
    questions: str,
    answers: str,
    scorer: Scorer = "official",
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Callable[[str], Any] = str,
) -> dict[str, dict[str, Result]]:
    """Score an answer file against beaf_qna.json."""
    asked, given = load_questions(questions), read(answers, '{"id": 0, "answer": "No."}', Keys(answer_key, id_key))
    tell(given.told())
    return {"beaf": {"questions": score(paired(asked, given, "BEAF"), asked, scorer)}}


BENCHMARK = Benchmark(
    name="beaf",
    title="BEAF",
    source_commit=SOURCE,
    commits={"official": SOURCE, **yesno.COMMITS},
    score_what="score BEAF answers",
    arguments=(
        Argument("questions", {"metavar": "QUESTIONS", "help": "beaf_qna.json"}),
        Argument("answers", {"metavar": "ANSWERS", "help": "JSON array or lines: id, answer"}),
        scorer_option(),
        *KEYS,
    ),
    results=results,
    layouts={
        "beaf": Layout(
            columns={
                "tu": "TU",
                "ig": "IG",
                "sb_yes": "SB+",
                "sb_no": "SB-",
                "id": "ID",
                "f1_tu_id": "F1 (TU, ID)",
                "accuracy": "acc",
                **YES_NO_COLUMNS,
            },
            metrics=METRICS,
            compared=("tu", "ig", "sb_yes", "sb_no", "id", "accuracy", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=plain_caption("BEAF"),
            answers=YesNo(verdict),
            leaderboard={"tu": ""},
        )
    },
)
