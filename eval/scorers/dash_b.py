"""DASH-B: is an object in an image that was found because models see it there, although it is not?

Source: M. Augustin, Y. Neuhaus and M. Hein, DASH: Detection and Assessment of Systematic Hallucinations of VLMs,
arXiv:2503.23573; official scorer YanNeu/DASH-B@1538d01 src/eval_utils.py. 1341 images without one of 70 objects, and 1341
with it.

    tnr = right answers / images without the object          tpr = right answers / images with it
    accuracy = right answers / images                        harmonic = 2 tnr tpr / (tnr + tpr)

    scorer     a reply is
    official   yes if it holds "yes" in any case, else no if it holds "no" ("I do not know" too), else wrong
    others     as for POPE

Worked example: of two images without a bed the model sees one in the first; in the one image with a bed it sees it.
>>> asked = [Question(name, name, "", "bed", label) for name, label in (("a", "no"), ("b", "no"), ("c", "yes"))]
>>> score(["yes", "No.", "Yes"], asked).figures["harmonic"]
0.6666666666666666
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import counted, read_text
from vlm_fix.eval.stats import Metric, harmonic, ratio

from . import yesno
from .answers import Keys, read
from .benchmark import KEYS, Argument, Benchmark, Layout, YesNo, plain_caption, scorer_option
from .choices import Scorer, one_of
from .replies import counts, either, label_of, needs
from .result import Result, tally

SOURCE = "YanNeu/DASH-B@1538d01"
METRICS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["n"]),
    "tnr": lambda s: ratio(s["tn"], s["n"] - s["positive"]),
    "tpr": lambda s: ratio(s["tp"], s["positive"]),
    "harmonic": lambda s: harmonic(METRICS["tpr"](s), METRICS["tnr"](s)),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}
NEEDS = {"no": ("tnr", "harmonic"), "yes": ("tpr", "harmonic")}
"""The figures that need images with a label."""
IMAGES = 2682
PROMPT = "Can you see a {} in this image? Please answer only with yes or no."


class Question(NamedTuple):
    """A question; `image` is the path in the folder images/ of the benchmark."""

    id: str
    image: str
    text: str
    object: str
    label: str


def questions(folder: str | Path) -> list[Question]:
    """Read the questions from dash_benchmark_neg.json and dash_benchmark_pos.json in the folder."""
    found = []
    for kind, label in (("neg", "no"), ("pos", "yes")):
        path = Path(folder) / f"dash_benchmark_{kind}.json"
        try:
            lists = json.loads(read_text(path, "list of DASH-B's images"))
            for source, objects in lists.items():
                for name, files in objects.items():
                    places = [f"{kind}/{source}/{name}/{file}" for file in files]
                    found += [Question(place, place, PROMPT.format(name), name, label) for place in places]
        except VlmFixError:
            raise
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise VlmFixError(f"{path} is not a list of DASH-B's images: give the one of {SOURCE}.") from None
    return found


def load_answers(
    path: str | Path, answer_key: str | None = None, tell: Callable[[str], Any] = str
) -> tuple[list[Question], list[str | None]]:
    """Read an answer file as the official script writes it: rows with img_id, object_name, gt and response."""
    found: list[Question] = []
    answers: list[str | None] = []
    example = '{"img_id": "2327067188.png", "object_name": "backpack", "gt": "no", "response": "no"}'
    given = read(path, example, Keys(answer_key))
    tell(given.told())
    for answer in given.rows:
        row, number = answer.row, answer.number
        needs(row, ("img_id", "object_name", "gt"), path, number)
        label = label_of(row["gt"], path, number)
        place = f"{label}/{row['object_name']}/{row['img_id']}"
        found.append(Question(place, place, "", row["object_name"], label))
        answers.append(answer.reply)
    twice = len(found) - len({question.id for question in found})
    if twice:
        raise VlmFixError(f"{path}: two answers of {counted(twice, 'image')}; keep one of each.")
    if len(found) != IMAGES:
        tell(f"note: {len(found)} of DASH-B's {IMAGES} images are answered")
    return found, answers


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown."""
    return either(answer) if scorer == "official" else yesno.verdict(answer, label, scorer)


def score(answers: Sequence[str | None], questions: Sequence[Question], scorer: Scorer = "official") -> Result:
    """Score answers; None is an answer that failed, and wrong. Figures about a label that no question has are left out."""
    one_of(scorer, Scorer, "scorer")
    said = [verdict(answer, q.label, scorer) for answer, q in zip(answers, questions, strict=True)]
    rows = [counts(q.image, q.label, one) for q, one in zip(questions, said, strict=True)]
    result = tally(scorer, rows, METRICS, yesno.misread(answers, said), [q.object for q in questions])
    labels = {q.label for q in questions}
    left_out = {name for label, names in NEEDS.items() if label not in labels for name in names}
    return replace(result, figures={name: value for name, value in result.figures.items() if name not in left_out})


def results(
    answers: str,
    scorer: Scorer = "official",
    answer_key: str | None = None,
    tell: Callable[[str], Any] = str,
) -> dict[str, dict[str, Result]]:
    """Score an answer file; rows in the order of the images."""
    both = sorted(zip(*load_answers(answers, answer_key, tell), strict=True), key=lambda pair: pair[0].id)
    labels = {question.label for question, _ in both}
    for label in NEEDS.keys() - labels:
        tell(f"note: no image has the label {label}, so {' and '.join(NEEDS[label])} are left out")
    return {"dash-b": {"questions": score([answer for _, answer in both], [question for question, _ in both], scorer)}}


BENCHMARK = Benchmark(
    name="dash-b",
    title="DASH-B",
    source_commit=SOURCE,
    commits={"official": SOURCE, **yesno.COMMITS},
    score_what="score DASH-B answers",
    arguments=(
        Argument("answers", {"metavar": "ANSWERS", "help": "JSON array or lines: img_id, object_name, gt, response"}),
        scorer_option(),
        KEYS[0],
    ),
    results=results,
    layouts={
        "dash-b": Layout(
            columns={
                "accuracy": "ACC",
                "tnr": "TNR",
                "tpr": "TPR",
                "harmonic": "HM",
                "yes_ratio": "yes",
                "unparsed": "unp.",
            },
            metrics=METRICS,
            compared=("accuracy", "tnr", "tpr", "harmonic", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=plain_caption("DASH-B"),
            answers=YesNo(verdict, balanced=True),
            leaderboard={"accuracy": ""},
        )
    },
)
