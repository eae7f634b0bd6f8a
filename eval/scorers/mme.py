"""MME: two yes/no questions per image, one of each answer, in ten tasks of perception and four of cognition.

Source: C. Fu et al., MME: A Comprehensive Evaluation Benchmark for Multimodal LLMs, arXiv:2306.13394; official scorer
eval_tool/calculation.py of the MME release (BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation). The
data may not be redistributed: ask its authors for it, and give the folder MME_Benchmark_release_version.

    accuracy = right answers / answers    accuracy_plus = images with both right / images
    score    = sum over tasks of (accuracy + accuracy_plus), here as a fraction: 2 per task, 200 in the paper's points

A part is a task or a group of tasks: hallucination (existence, count, position, color: 800 points at most), perception
(2000) and cognition (800). The accuracy of a part weights all its answers equally.

    scorer     a lower-cased answer is yes or no if
    official   it is that word, or its first four characters contain "yes", or else "no" ("know" is no)
    others     as for POPE; ours: the first of its words yes and no

Files: DIR/TASK/images/NAME.jpg with DIR/TASK/questions_answers_YN/NAME.txt, or both in DIR/TASK; each line of a text file
is a question, a tab and Yes or No. The official scorer reads TASK.txt with image, question, truth and answer per line.

Worked example: both questions right for one image, one of two for another: accuracy 3/4, accuracy_plus 1/2, score 1.25
(125 points).
>>> asked = [Question(f"{i}", "count", f"{i // 2}.jpg", "?", ("yes", "no")[i % 2]) for i in range(4)]
>>> score(["Yes", "No", "Yes", "Yes"], asked)["count"].figures
{'accuracy': 0.75, 'accuracy_plus': 0.5, 'score': 1.25, 'yes_ratio': 0.75}
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_text
from vlm_fix.eval.stats import Metric, ratio

from . import yesno
from .benchmark import Argument, Benchmark, Layout, YesNo, plain_caption, scorer_option
from .choices import Scorer, one_of
from .result import Result, all_right, tally

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
GROUPS = {"hallucination": HALLUCINATION, "perception": PERCEPTION, "cognition": COGNITION}
SOURCE = "MME eval_tool/calculation.py"


def _score(s: Mapping[str, Any]) -> Any:
    tasks = [name.removeprefix("n ") for name in s if name.startswith("n ")]
    return sum(ratio(s[f"right {t}"], s[f"n {t}"]) + ratio(s[f"images_right {t}"], s[f"images {t}"]) for t in tasks) + (
        0 if tasks else METRICS["accuracy"](s) + METRICS["accuracy_plus"](s)
    )


METRICS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["right"], s["n"]),
    "accuracy_plus": lambda s: ratio(s["images_right"], s["images"]),
    "score": _score,
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}


class Question(NamedTuple):
    """A question of a task; `image` is a path or a name, `label` is "yes" or "no"."""

    id: str
    task: str
    image: str
    text: str
    label: str


def load(folder: str | Path) -> list[Question]:
    """Read the questions of an MME folder, task by task. Raises VlmFixError naming what is missing or malformed."""
    root, found = Path(folder), []
    for task in (*PERCEPTION, *COGNITION):
        texts = next((p for p in (root / task / "questions_answers_YN", root / task) if p.is_dir()), None)
        for file in sorted(texts.glob("*.txt")) if texts else []:
            places = (root / task / "images", root / task)
            names = [p / f"{file.stem}{end}" for p in places for end in (".jpg", ".png", ".jpeg")]
            image = next((name for name in names if name.is_file()), None)
            if image is None:
                raise VlmFixError(f"{file} asks about an image that is not at {names[0]}: put it there.")
            for number, line in enumerate(filter(str.strip, read_text(file, "MME question file").splitlines()), 1):
                text, tab, label = line.strip().rpartition("\t")
                if not tab or label.lower() not in ("yes", "no"):
                    raise VlmFixError(f"{file}, line {number}: not a question, a tab, and Yes or No.")
                found.append(Question(f"{task}/{file.stem}/{number}", task, str(image), text, label.lower()))
    if not found:
        raise VlmFixError(
            f"{folder} holds none of MME's tasks: give its folder MME_Benchmark_release_version, which has one folder "
            f"per task ({', '.join(HALLUCINATION)} and more)."
        )
    return _in_pairs(found)


def load_results(folder: str | Path) -> tuple[list[Question], list[str]]:
    """Read questions and answers from a folder of TASK.txt files, as the official scorer does."""
    found, answers = [], []
    for task in (*PERCEPTION, *COGNITION):
        path = Path(folder) / f"{task}.txt"
        lines = read_text(path, "MME results").splitlines() if path.is_file() else []
        for number, line in enumerate(lines):
            fields = line.split("\t")
            if len(fields) != 4 or fields[2].lower() not in ("yes", "no"):
                raise VlmFixError(f"{path}, line {number + 1}: not image, question, Yes or No, and answer with tabs.")
            found.append(Question(f"{task}/{number}", task, fields[0], fields[1], fields[2].lower()))
            answers.append(fields[3])
    if not found:
        raise VlmFixError(f"{folder} holds no results of MME: put one TASK.txt per task there, such as existence.txt.")
    return _in_pairs(found), answers


def _in_pairs(questions: list[Question]) -> list[Question]:
    times = Counter((question.task, question.image) for question in questions)
    odd = next((key for key, n in times.items() if n != 2), None)
    if odd:
        raise VlmFixError(
            f"MME asks two questions per image, but {times[odd]} are about {odd[1]} in {odd[0]}: give two."
        )
    return questions


def score(
    answers: Sequence[str | None], questions: Sequence[Question], scorer: Scorer = "official"
) -> dict[str, Result]:
    """Score by task, and by group of tasks if all of them are present. An answer of None is wrong."""
    one_of(scorer, Scorer, "scorer")
    said = [verdict(answer, q.label, scorer) for answer, q in zip(answers, questions, strict=True)]
    right = [one == question.label for one, question in zip(said, questions, strict=True)]
    pairs = all_right("images", [(question.task, question.image) for question in questions], right)
    rows: dict[str, list[dict[str, Any]]] = {}
    for question, one, ok, pair in zip(questions, said, right, pairs, strict=True):
        row = {"image": f"{question.task}/{Path(question.image).name}", "n": 1, "right": int(ok), **pair}
        row["positive"] = int(question.label == "yes")
        rows.setdefault(question.task, []).append({**row, "yes": int(one == "yes"), "unparsed": int(one == "unknown")})
    parts = dict(rows)
    for group, tasks in GROUPS.items():
        if rows.keys() >= {*tasks}:
            parts[group] = [
                row | {f"{name} {t}": row[name] * (t == task) for t in tasks for name in ("n", "right", *pairs[0])}
                for task in tasks
                for row in rows[task]
            ]
    return {part: tally(scorer, each, METRICS) for part, each in parts.items()}


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown."""
    if answer is None or scorer != "official":
        return yesno.verdict(answer, label, scorer)
    text = answer.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), "unknown")


def score_files(answers: str, scorer: Scorer) -> dict[str, dict[str, Any]]:
    """Score a folder of TASK.txt files, by part."""
    return {part: result.to_dict() for part, result in results(answers, scorer)["mme"].items()}


def results(answers: str, scorer: Scorer) -> dict[str, dict[str, Result]]:
    """Score a folder of TASK.txt files, by task and part; rows in the order of images and questions."""
    both = sorted(zip(*load_results(answers), strict=True), key=lambda pair: pair[0][1:])
    return {"mme": score([answer for _, answer in both], [question for question, _ in both], scorer)}


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    source_commit=SOURCE,
    commits=yesno.COMMITS,
    score_what="score MME answers",
    arguments=(
        Argument(
            "answers", {"metavar": "DIR", "help": "folder with TASK.txt: image, question, truth, answer with tabs"}
        ),
        scorer_option(),
    ),
    score_files=score_files,
    results=results,
    layouts={
        "mme": Layout(
            columns={
                "score": "score",
                "accuracy": "acc",
                "accuracy_plus": "acc+",
                "yes_ratio": "yes",
                "unparsed": "unp.",
            },
            metrics=METRICS,
            compared=("score", "accuracy", "yes_ratio"),
            right=lambda row: row["right"],
            caption=plain_caption("MME; score in its points"),
            answers=YesNo(verdict, balanced=True, groups=GROUPS),
            leaderboard={"score": ""},
        )
    },
)
