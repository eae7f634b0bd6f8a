"""HallusionBench: yes/no questions about illusions, charts and maps, and about edited copies of the same figures.

Source: T. Guan et al., HallusionBench, CVPR 2024, arXiv:2310.14566; official scorer tianyi-lab/HallusionBench@744007c
utils.py. 1129 questions: VD need the figure; VS can be answered without it, and 178 of them (figure 0) are asked so.

    aAcc = right answers / questions
    qAcc = question pairs all right / pairs; a pair is one question about all figures of its set
    fAcc = figures all right / figures; VS questions without a figure are in none
    easy = qAcc over what is asked without a figure or of an original one (visual_input 0 and 1)
    hard = qAcc over edited figures (visual_input 2)
    mean = (aAcc + fAcc + qAcc) / 3, the figure of the OpenVLM leaderboard (VLMEvalKit)

The official judge is GPT-4, which is not called here:

    scorer       right if
    official     GPT-4's mark is 1; it is in gpt4v_output_gpt_check or another key that ends in gpt_check or correctness
    vlmevalkit   (default) the answer has the word yes and not no, or no and not yes, and that is the truth
    ours         the first of the words yes and no is the truth; the other scorers as for POPE

In every scorer a VS question without a figure is also right if the answer is uncertain (mark 2, or neither yes nor no, in
words: an empty reply or "nan" is wrong).
lmms-eval, VLMEvalKit and `vlm-fix eval` leave those 178 questions out.

Worked example, a question about a figure and its edited copy, only the first right: aAcc 1/2, qAcc 0, fAcc 1/2.
>>> asked = [Question(f"{f}", f"{f}.png", "?", "VD", "map", "0", f, "0", "12"[i], ("yes", "no")[i]) for i, f in enumerate("01")]
>>> score(["Yes.", "Yes."], asked)["overall"].figures
{'aAcc': 0.5, 'qAcc': 0.0, 'fAcc': 0.5, 'easy': 1.0, 'hard': 0.0, 'yes_ratio': 1.0, 'mean': 0.3333333333333333}
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA, counted, read_rows
from vlm_fix.eval.stats import Metric, ratio

from . import yesno
from .answers import REPLIES, USUAL, Answer, Keys, Tell, read, same_question
from .benchmark import KEYS, Argument, Benchmark, Layout, YesNo, plain_caption, scorer_option
from .choices import Scorer, one_of
from .result import Result, all_right, tally

METRICS: dict[str, Metric] = {
    "aAcc": lambda s: ratio(s["right"], s["n"]),
    "qAcc": lambda s: ratio(s["pairs_right"], s["pairs"]),
    "fAcc": lambda s: ratio(s["figures_right"], s["figures"]),
    "easy": lambda s: ratio(s["easy_right"], s["easy"]),
    "hard": lambda s: ratio(s["hard_right"], s["hard"]),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
    "mean": lambda s: (METRICS["aAcc"](s) + METRICS["fAcc"](s) + METRICS["qAcc"](s)) / 3,
}
NO_ANSWER = ("failed to obtain answer", "error ")  # what VLMEvalKit and others write where a call failed
MARK = "gpt4v_output_gpt_check"
ROW = (
    '"category": "VD", "subcategory": "map", "set_id": "0", "figure_id": "1", "question_id": "0", "visual_input": "2", '
    '"question": "Is it a river?", "gt_answer": "0"'
)
EXAMPLE = f'{{{ROW}, "model_prediction": "No."}}'
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


def load_answers(
    path: str | Path,
    scorer: Scorer = "vlmevalkit",
    keys: Keys = USUAL,
    tell: Tell = str,
) -> tuple[list[Question], list[str | None]]:
    """Read questions and answers; for the scorer official an answer is a judge's mark, 0, 1 or 2.

    Rows are those of HallusionBench.json with model_prediction or a mark, or rows of any layout of `answers.py` whose id is
    category_subcategory_set_figure_question, VLMEvalKit's with visual_input after the subcategory; or they ask all
    questions, or all about figures, in order. Rows without a reply are questions that were not asked.
    """
    names, marks = _columns(path)
    if scorer == "official" and not keys.answer:
        if len(marks) != 1:
            has = f"it has {' and '.join(marks)}: name one with --answer-key" if marks else "it has none"
            raise VlmFixError(
                f"{path}: the official scorer needs GPT-4's marks, --scorer vlmevalkit does not; {has} (its keys are "
                f"{', '.join(names)})."
            )
        keys = Keys(marks[0], keys.id)
    given = read(path, EXAMPLE, keys, numbers=True, sparse=True, what="HallusionBench answer file")
    tell(given.told())
    if marks and scorer != "official":
        tell(f"note: {marks[0]} holds the marks of a judge; --scorer official counts them")
    replies = [row.reply for row in given.rows]
    if scorer != "official" and {None} < {*replies, None} <= {"0", "1", "2", None}:
        raise VlmFixError(
            f"{path}: all replies in {given.keys[0]} are 0, 1 or 2: if a judge gave these marks, add --scorer official "
            f"--answer-key {given.keys[0]}; if they are answers, write yes and no."
        )
    known = {question.id: question for question in questions()}
    asked = _in_order(given.rows, known) or [_asked(row, known, path) for row in given.rows]
    lost = [id for id in known if id not in {question.id for question in asked}]
    if lost and len(lost) < len(known):
        tell(
            f"note: {len(known) - len(lost)} of HallusionBench's {len(known)} questions are answered; the others (first "
            f"{lost[0]}) are left out, also of pairs and figures"
        )
    return asked, replies


def usual_scorer(path: str | Path) -> Scorer:
    """Return official for a file that has a judge's marks and no replies, else vlmevalkit."""
    names, marks = _columns(path)
    return "official" if marks and not {*names} & {*REPLIES, "filtered_resps"} else "vlmevalkit"


def _columns(path: str | Path) -> tuple[list[str], list[str]]:
    """All keys of a file's rows, and those that hold marks."""
    rows = read_rows(path, "HallusionBench answer file", EXAMPLE)
    names = [*dict.fromkeys(name for row in rows for name in row)]
    return names, [name for name in names if _is_mark(name)]


def _is_mark(name: str) -> bool:
    return name.endswith(("gpt_check", "correctness"))


def _in_order(rows: Sequence[Answer], known: Mapping[str, Question]) -> list[Question] | None:
    """The questions of rows that name none: all of them, or all about figures, in the order of HallusionBench.json."""
    if any("set_id" in row.row or row.id.count("_") >= 4 for row in rows):
        return None
    for every in ([*known.values()], [question for question in known.values() if question.image]):
        same = (row.question and same_question(q.text, row.question) for row, q in zip(rows, every, strict=False))
        if len(every) == len(rows) and all(same):
            return every
    return None


def _asked(row: Answer, known: Mapping[str, Question], path: Any) -> Question:
    """The question of a row, by its own fields or by its id."""
    parts = row.id.split("_")
    if len(parts) < 5:
        return _question(row.row, path, row.number)
    id = "_".join(parts[:2] + parts[-3:])
    if id not in known:
        raise VlmFixError(
            f"{path}, row {row.number}: {row.id!r} is no question of HallusionBench, such as {next(iter(known))}."
        )
    return known[id]


def _question(row: Mapping[str, Any], path: Any, number: int) -> Question:
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
        raise VlmFixError(
            f"{counted(twice, 'question')} asked twice: give each (category, set, figure, question) once."
        )
    said = [verdict(answer, q.label, scorer) for answer, q in zip(answers, questions, strict=True)]
    right = [
        one == question.label or (one == "unknown" and _answered(answer) and not _seen(question))
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
    parts = {"overall": [*range(len(rows))]}
    parts |= {kind: [p for p, k in enumerate(kinds) if k == kind] for kind in ("VD", "VS") if kind in kinds}
    words = [None if scorer == "official" else answer for answer in answers]  # marks are no words
    return {
        part: tally(
            scorer,
            [rows[place] for place in places],
            METRICS,
            yesno.misread([words[place] for place in places], [said[place] for place in places]),
            [questions[place].id for place in places],
        )
        for part, places in parts.items()
    }


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown. For official the answer is GPT-4's mark: 1 the truth, 0 its opposite, 2 unknown."""
    if answer is None or scorer != "official":
        return yesno.verdict(answer, label, scorer)
    if answer not in ("0", "1", "2"):
        raise VlmFixError(
            f"{answer[:20]!r} is no mark of GPT-4 (0, 1 or 2): use --scorer vlmevalkit for plain answers."
        )
    return "unknown" if answer == "2" else label if answer == "1" else {"yes": "no", "no": "yes"}[label]


def _answered(answer: str | None) -> bool:
    """Whether an answer without yes and no is one in words, not what programs write for none."""
    text = re.sub(r"[\W_]+", " ", answer or "").strip().lower()
    return text not in ("", "nan", "none", "null", "n a") and not text.startswith(NO_ANSWER)


def _seen(question: Question) -> bool:
    return question.category != "VS" or question.figure != "0"


def results(
    answers: str,
    scorer: Scorer | None = None,
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Tell = str,
) -> dict[str, dict[str, Result]]:
    """Score an answer file, by task and part; rows in the order of the questions' ids."""
    chosen: Scorer = scorer or ("official" if answer_key and _is_mark(answer_key) else usual_scorer(answers))
    asked, given = load_answers(answers, chosen, Keys(answer_key, id_key), tell)
    order = sorted(range(len(asked)), key=lambda place: asked[place].id)
    return {"hallusion": score([given[place] for place in order], [asked[place] for place in order], chosen)}


BENCHMARK = Benchmark(
    name="hallusion",
    title="HallusionBench",
    source_commit=SOURCE,
    commits=yesno.COMMITS,
    score_what="score HallusionBench answers",
    arguments=(
        Argument(
            "answers", {"metavar": "ANSWERS", "help": "HallusionBench.json with model_prediction or marks in each row"}
        ),
        scorer_option(None, "official counts a judge's marks (vlmevalkit, or official for a file with marks alone)"),
        *KEYS,
    ),
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
