"""HallusionBench: yes/no questions about illusions, charts and maps, and about edited copies of the same figures.

Source: T. Guan et al., HallusionBench, CVPR 2024, arXiv:2310.14566; official scorer tianyi-lab/HallusionBench@744007c
utils.py. 1129 questions: VD need the figure; VS can be answered without it, and 178 of them (figure 0) are asked so.

    aAcc = right answers / questions
    qAcc = question pairs all right / pairs; a pair is one question about all figures of its set
    fAcc = figures all right / figures; VS questions without a figure are in none
    easy = qAcc over what is asked without a figure or of an original one (visual_input 0 and 1)
    hard = qAcc over edited figures (visual_input 2)

The official judge is GPT-4, which is not called here:

    scorer       right if
    official     GPT-4's mark is 1; `load_answers` reads it from gpt4v_output_gpt_check
    vlmevalkit   (default) the answer has the word yes and not no, or no and not yes, and that is the truth
    ours         the first of the words yes and no is the truth; the other scorers as for POPE

In every scorer a VS question without a figure is also right if the answer is uncertain (mark 2, or neither yes nor no).
lmms-eval, VLMEvalKit and `vlm-fix eval` leave those 178 questions out.

Worked example, a question about a figure and its edited copy, only the first right: aAcc 1/2, qAcc 0, fAcc 1/2.
>>> asked = [Question(f"{f}", f"{f}.png", "?", "VD", "map", "0", f, "0", "12"[i], ("yes", "no")[i]) for i, f in enumerate("01")]
>>> score(["Yes.", "Yes."], asked)["overall"].figures
{'aAcc': 0.5, 'qAcc': 0.0, 'fAcc': 0.5, 'easy': 1.0, 'hard': 0.0, 'yes_ratio': 1.0}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA, read_rows
from vlm_fix.eval.stats import Metric, ratio

from . import yesno
from .benchmark import Argument, Benchmark, Layout, YesNo, plain_caption, scorer_option
from .choices import Scorer, one_of
from .result import Result, all_right, tally

METRICS: dict[str, Metric] = {
    "aAcc": lambda s: ratio(s["right"], s["n"]),
    "qAcc": lambda s: ratio(s["pairs_right"], s["pairs"]),
    "fAcc": lambda s: ratio(s["figures_right"], s["figures"]),
    "easy": lambda s: ratio(s["easy_right"], s["easy"]),
    "hard": lambda s: ratio(s["hard_right"], s["hard"]),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}
MARK = "gpt4v_output_gpt_check"
ROW = (
    '"category": "VD", "subcategory": "map", "set_id": "0", "figure_id": "1", "question_id": "0", "visual_input": "2", '
    '"question": "Is it a river?", "gt_answer": "0"'
)
SOURCE = "tianyi-lab/HallusionBench@744007c"


class Question(NamedTuple):
    """A question. `image` is relative to the benchmark's folder, or "" if the question is asked without a figure;
    `visual` is visual_input: 0 no figure, 1 the original, 2 an edited one."""

    id: str
    image: str
    text: str
    category: str
    subcategory: str
    set: str
    figure: str
    question: str
    visual: str
    label: str


def questions(path: str | Path = DATA / "hallusion/hallusionbench.jsonl.gz") -> list[Question]:
    """Return the 1129 questions in the package, or those of another file in the format of HallusionBench.json."""
    rows = read_rows(path, "HallusionBench file", f"{{{ROW}}}")
    return [_question(row, path, number) for number, row in enumerate(rows, 1)]


def load_answers(path: str | Path, scorer: Scorer = "vlmevalkit") -> tuple[list[Question], list[str | None]]:
    """Read questions and answers from HallusionBench.json with model_prediction in each row, as the official script does.

    For the scorer official each row also has GPT-4's mark, which is returned as the answer.
    """
    found: list[Question] = []
    answers: list[str | None] = []
    key = MARK if scorer == "official" else "model_prediction"
    example = f'{{{ROW}, "{key}": "{"1" if key == MARK else "No."}"}}'
    for number, row in enumerate(read_rows(path, "HallusionBench answer file", example), 1):
        if key not in row:
            judged = "; the official scorer needs GPT-4's marks, --scorer vlmevalkit does not" if key == MARK else ""
            raise VlmFixError(f'{path}, row {number}: no "{key}" in its keys {", ".join(row)}{judged}.')
        found.append(_question(row, path, number))
        answers.append(str(row[key]))
    return found, answers


def _question(row: dict[str, Any], path: Any, number: int) -> Question:
    try:
        place = [str(row[key]) for key in ("category", "subcategory", "set_id", "figure_id", "question_id")]
        visual = str(row["visual_input"])
        image = "" if visual == "0" else "{}/{}/{}_{}.png".format(*place)
        label = {"0": "no", "1": "yes"}[str(row["gt_answer"])]
        return Question._make(("_".join(place), image, row["question"], *place, visual, label))
    except KeyError as error:
        raise VlmFixError(
            f"{path}, row {number}: {error} is missing or unknown; rows are those of HallusionBench.json."
        ) from None


def score(
    answers: Sequence[str | None], questions: Sequence[Question], scorer: Scorer = "vlmevalkit"
) -> dict[str, Result]:
    """Score by part: overall, and VD and VS if present. None is an answer that failed; it is always wrong."""
    one_of(scorer, Scorer, "scorer")
    twice = len(questions) - len({question.id for question in questions})
    if twice:
        raise VlmFixError(f"{twice} questions come twice: give each (category, set, figure, question) once.")
    said = [verdict(answer, q.label, scorer) for answer, q in zip(answers, questions, strict=True)]
    right = [
        one == question.label or (one == "unknown" and answer is not None and not _seen(question))
        for one, answer, question in zip(said, answers, questions, strict=True)
    ]
    sets = [f"{q.category}_{q.subcategory}_{q.set}" for q in questions]
    pairs = [f"{each}_{q.question}" for each, q in zip(sets, questions, strict=True)]
    figures = [f"{each}_{q.figure}" if _seen(q) else None for each, q in zip(sets, questions, strict=True)]
    edited = [q.visual == "2" for q in questions]
    groups: dict[str, list[Any]] = {
        "pairs": pairs,
        "figures": figures,
        "easy": [None if e else p for p, e in zip(pairs, edited, strict=True)],
        "hard": [p if e else None for p, e in zip(pairs, edited, strict=True)],
    }
    columns = [all_right(name, keys, right) for name, keys in groups.items()]
    rows = []
    for place, (one, ok) in enumerate(zip(said, right, strict=True)):
        row: dict[str, Any] = {"image": sets[place], "n": 1, "right": int(ok), "yes": int(one == "yes")}
        row |= {"unparsed": int(one == "unknown"), "positive": int(questions[place].label == "yes")}
        rows.append(row | {name: n for column in columns for name, n in column[place].items()})
    kinds = [q.category for q in questions]
    parts = {"overall": rows} | {
        kind: [row for row, k in zip(rows, kinds, strict=True) if k == kind] for kind in ("VD", "VS") if kind in kinds
    }
    return {part: tally(scorer, each, METRICS) for part, each in parts.items()}


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown. For official the answer is GPT-4's mark: 1 the truth, 0 its opposite, 2 unknown."""
    if answer is None or scorer != "official":
        return yesno.verdict(answer, label, scorer)
    if answer not in ("0", "1", "2"):
        raise VlmFixError(
            f"{answer[:20]!r} is no mark of GPT-4 (0, 1 or 2): use --scorer vlmevalkit for plain answers."
        )
    return "unknown" if answer == "2" else label if answer == "1" else {"yes": "no", "no": "yes"}[label]


def _seen(question: Question) -> bool:
    return question.category != "VS" or question.figure != "0"


def score_files(answers: str, scorer: Scorer) -> dict[str, dict[str, Any]]:
    """Score an answer file, by part."""
    return {part: result.to_dict() for part, result in results(answers, scorer)["hallusion"].items()}


def results(answers: str, scorer: Scorer) -> dict[str, dict[str, Result]]:
    """Score an answer file, by task and part; rows in the order of the questions' ids."""
    both = sorted(zip(*load_answers(answers, scorer), strict=True), key=lambda pair: pair[0].id)
    return {"hallusion": score([answer for _, answer in both], [question for question, _ in both], scorer)}


BENCHMARK = Benchmark(
    name="hallusion",
    title="HallusionBench",
    source_commit=SOURCE,
    commits=yesno.COMMITS,
    score_what="score HallusionBench answers",
    arguments=(
        Argument("answers", {"metavar": "ANSWERS", "help": "HallusionBench.json with model_prediction in each row"}),
        scorer_option("vlmevalkit", "%(default)s; official reads GPT-4's marks in the file"),
    ),
    score_files=score_files,
    results=results,
    layouts={
        "hallusion": Layout(
            columns={"aAcc": "aAcc", "qAcc": "qAcc", "fAcc": "fAcc", "yes_ratio": "yes", "unparsed": "unp."},
            metrics=METRICS,
            compared=("aAcc", "qAcc", "fAcc", "yes_ratio"),
            right=lambda row: row["right"],
            caption=plain_caption("HallusionBench"),
            answers=YesNo(verdict, accuracy="aAcc", total="overall"),
            leaderboard={"aAcc": ""},
        )
    },
)
