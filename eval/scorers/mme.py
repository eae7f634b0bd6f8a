"""MME: two yes/no questions per image, one of each answer, in ten tasks of perception and four of cognition.

Source: C. Fu et al., MME: A Comprehensive Evaluation Benchmark for Multimodal LLMs, arXiv:2306.13394; official scorer
eval_tool/calculation.py of the MME release (BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation). The
data may not be redistributed: ask its authors for it, and give the folder MME_Benchmark_release_version.

    accuracy = right answers / answers    accuracy_plus = images with both right / images
    score    = sum over tasks of (accuracy + accuracy_plus), as a fraction of 1: 2 per task, which are 200 points in papers,
               in the tables of `vlm-fix eval` and as `vlm-fix score` prints it

A part is a task or a group of tasks: hallucination (existence, count, position, color: 800 points at most), perception
(2000) and cognition (800). The accuracy of a part weights all its answers equally.

    scorer     a lower-cased answer is yes or no if
    official   it is that word, or its first four characters contain "yes", or else "no" ("know" is no)
    others     as for POPE; ours: the first of its words yes and no

Files: DIR/TASK/images/NAME.jpg with DIR/TASK/questions_answers_YN/NAME.txt, or both in DIR/TASK; each line of a text file
is a question, a tab and Yes or No. The official scorer reads TASK.txt with image, question, truth and answer per line;
files with all tasks (JSON lines, CSV, ..., see `answers.py`) are read too: each row names its task (category, or as LLaVA
writes question_id: existence/000000006040.jpg), its image, and the truth, which the release has if the row has not.

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
from .answers import Answers, Keys, Tell, plain_text, read
from .benchmark import KEYS, Argument, Benchmark, Layout, YesNo, figures_of, plain_caption, scorer_option
from .choices import Scorer, one_of
from .result import Result, all_right, tally

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
GROUPS = {"hallucination": HALLUCINATION, "perception": PERCEPTION, "cognition": COGNITION}
SOURCE = "MME eval_tool/calculation.py"
ROW = '{"category": "existence", "image": "a.jpg", "question": "Is there a dog?", "label": "Yes", "response": "Yes."}'


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
            for number, line in enumerate(filter(str.strip, read_text(file, "MME question file").split("\n")), 1):
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


def load_results(folder: str | Path) -> tuple[list[Question], list[str | None]]:
    """Read questions and answers from a folder of TASK.txt files, as the official scorer does."""
    found: list[Question] = []
    answers: list[str | None] = []
    for task in (*PERCEPTION, *COGNITION):
        path = Path(folder) / f"{task}.txt"
        lines = read_text(path, "MME results").rstrip("\n").split("\n") if path.is_file() else []
        for number, line in enumerate(lines):
            fields = line.removesuffix("\r").split("\t")
            if len(fields) != 4 or fields[2].lower() not in ("yes", "no"):
                raise VlmFixError(f"{path}, line {number + 1}: not image, question, Yes or No, and answer with tabs.")
            found.append(Question(f"{task}/{number}", task, fields[0], fields[1], fields[2].lower()))
            answers.append(fields[3] if fields[3].strip() else None)
    if not found:
        raise VlmFixError(f"{folder} holds no results of MME: put one TASK.txt per task there, such as existence.txt.")
    return _in_pairs(found), answers


def load_rows(given: Answers, release: str | None = None) -> tuple[list[Question], list[str | None]]:
    """Return questions and answers of a file with all tasks; `release` is the folder with the truth, if rows lack it."""
    truth = {_key(q.task, q.image, q.text): q.label for q in load(release)} if release else {}
    found: list[Question] = []
    for row in given.rows:
        task, slash, image = row.id.partition("/")
        task, image = (
            (task, image.rpartition("/")[2]) if slash and not row.category else (row.category, row.image or row.id)
        )
        if task not in (*PERCEPTION, *COGNITION):
            raise VlmFixError(
                f"{given.path}, row {row.number}: {task!r} is no task of MME: give each row its category, such as existence."
            )
        label = row.label.strip().lower() or truth.get(_key(task, image, row.question), "")
        if label not in ("yes", "no"):
            lost = f"the truth {row.label!r} is neither Yes nor No" if row.label else "no truth"
            lost = f"{row.question[:60]!r} is no question about {task}/{image} in {release}" if truth else lost
            raise VlmFixError(
                f"{given.path}, row {row.number}: {lost}; add it, or give MME's folder with --questions "
                "MME_Benchmark_release_version."
            )
        found.append(Question(f"{task}/{row.number}", task, image, row.question, label))
    return _in_pairs(found), [row.reply for row in given.rows]


def _key(task: str, image: str, text: str) -> tuple[str, str, str]:
    """A question without what prompts add to it."""
    text = plain_text(text.split("\n")[0])
    return task, Path(image).stem, text.removesuffix("please answer yes or no.").strip()


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
    counted = {part: misread(part, questions, answers, said) for part in parts}
    texts = {
        part: [q.text for task in GROUPS.get(part, (part,)) for q in questions if q.task == task] for part in parts
    }
    return {part: tally(scorer, each, METRICS, counted[part], texts[part]) for part, each in parts.items()}


def misread(
    part: str, questions: Sequence[Question], answers: Sequence[str | None], said: Sequence[str]
) -> yesno.Misread:
    """Count the answers of a task, or of a group of tasks, that are taken against their plain word."""
    mine = [place for place, question in enumerate(questions) if question.task in GROUPS.get(part, (part,))]
    return yesno.misread([answers[place] for place in mine], [said[place] for place in mine])


def verdict(answer: str | None, label: str, scorer: Scorer) -> str:
    """Return yes, no or unknown."""
    if answer is None or scorer != "official":
        return yesno.verdict(answer, label, scorer)
    text = answer.lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), "unknown")


def results(
    answers: str,
    scorer: Scorer = "official",
    questions: str | None = None,
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Tell = str,
) -> dict[str, dict[str, Result]]:
    """Score a folder of TASK.txt files, or a file with all tasks, as fractions; rows in the order of images and questions."""
    given: Sequence[str | None]
    if Path(answers).is_file():
        rows = read(answers, ROW, Keys(answer_key, id_key))
        tell(rows.told())
        asked, given = load_rows(rows, questions)
    else:
        if questions or answer_key or id_key:
            given_option = "--questions" if questions else "--answer-key" if answer_key else "--id-key"
            raise VlmFixError(f"{given_option} has no effect on a folder of TASK.txt: leave it out, or give a file.")
        asked, given = load_results(answers)
        lost = sum(answer is None for answer in given)
        failed = f"; {lost} of them empty, which count as failed" if lost else ""
        tell(f"read {len(given)} answers from {answers}: TASK.txt files (image, question, truth, answer){failed}")
    order = sorted(range(len(asked)), key=lambda place: asked[place][1:])
    return {"mme": score([given[place] for place in order], [asked[place] for place in order], scorer)}


def in_points(found: Mapping[str, Mapping[str, Result]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each part, with the score as papers give it."""
    return {part: {**figures, "score": 100 * figures["score"]} for part, figures in figures_of(found).items()}


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    source_commit=SOURCE,
    commits=yesno.COMMITS,
    score_what="score MME answers",
    arguments=(
        Argument(
            "answers",
            {
                "metavar": "ANSWERS",
                "help": "folder with TASK.txt (image, question, truth, answer with tabs), or a file with all tasks",
            },
        ),
        Argument(
            "--questions", {"metavar": "DIR", "help": "MME_Benchmark_release_version, for a file that lacks the truth"}
        ),
        scorer_option(),
        *KEYS,
    ),
    results=results,
    shown=in_points,
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
