"""Which question does each row of an answer file answer? One split, or several in one file as LLaVA writes them.

Questions come from a file, from all files of a folder (LLaVA's `coco/`), or from the package: `gqa` or `aokvqa:random`, and
`coco`, the three official splits with the older `random` of 2910 questions that LLaVA's llava_pope_test.jsonl asks, 8910
in all. A file of questions without labels, such as that one, gets those of the package.

Answers to one split are matched by id, else by image and question, else by order. Those to several, whose ids repeat or are
LLaVA's own, by category, image and question where the rows have them, else by order: a stretch of rows answers a split if
its questions are those of the split, one after the other. The labels of a file with its own (VLMEvalKit, lmms-eval) are
used where its questions are not the official ones.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import get_args

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA, read_rows
from vlm_fix.eval.scorers import answers
from vlm_fix.eval.scorers.answers import plain_text
from vlm_fix.eval.scorers.replies import in_own_order

from .data import PACKAGED, QUESTION, coco_questions, load_questions
from .score import Answer, Kind, Question

Splits = Mapping[str, list[Question]]
OLD = "random (2910)"
"""The split of POPE's first release, RUCAIBox/POPE@e3e3926; it stands for `random` in a file that asks it."""


def official() -> dict[str, list[Question]]:
    """Return the splits in the package."""
    old = load_questions(DATA / "pope/coco_pope_random_2910.jsonl.gz")
    return {kind: coco_questions(kind) for kind in get_args(Kind)} | {OLD: old}


def load(source: str) -> Splits:
    """Return the questions of a file, of the files of a folder or, for "coco", of the package, by split."""
    if source == "coco":
        return official()
    name, _, kind = source.partition(":")
    if name in PACKAGED and not Path(source).exists():
        return {each: load_questions(f"{name}:{each}") for each in ([kind] if kind else get_args(Kind))}
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl"))
        if not files:
            raise VlmFixError(f"{path} holds no question files: put coco_pope_random.json and the like there.")
        return {file.stem.removeprefix("coco_pope_"): load_questions(file) for file in files}
    rows = read_rows(path, "POPE question file", QUESTION)
    if "label" in rows[0] or "category" not in rows[0]:
        return {path.stem: load_questions(path)}
    splits: dict[str, list[Question]] = {}
    for number, row in enumerate(rows, 1):
        key = _key(str(row.get("image", "")), str(row.get("text", "")).split("\n")[0])
        if key not in _labels():
            raise VlmFixError(
                f'{path}, row {number}: no "label", and no official question about its image; give a folder of question files '
                "with labels instead."
            )
        question = Question(row["question_id"], row["image"], row["text"].split("\n")[0], _labels()[key])
        splits.setdefault(str(row["category"]), []).append(question)
    return splits


def match(splits: Splits, given: answers.Answers) -> dict[str, tuple[list[Question], list[Answer]]]:
    """Return split -> questions and their answers. Raises VlmFixError saying how far they line up if they do not."""
    rows = given.rows
    if len(splits) == 1:
        ((split, questions),) = splits.items()
        return {split: (questions, _one(questions, rows, given.path))}
    ids = [str(question.question_id) for questions in splits.values() for question in questions]
    by_id = {row.id: row for row in rows}
    if len({*ids}) == len(ids) == len(rows) and {*ids} == by_id.keys():
        return {
            split: (each, _answers(each, [by_id[str(q.question_id)] for q in each])) for split, each in splits.items()
        }
    named = {split: [row for row in rows if split in row.category.split(",")] for split in _categories(rows)}
    if named and named.keys() <= splits.keys():
        found = {split: (splits[split], _aligned(splits[split], mine)) for split, mine in named.items()}
        whole = {split: (asked, replies) for split, (asked, replies) in found.items() if replies}
        if len(whole) == len(named):
            return whole
    return _in_order(splits, rows, given.path)


def own(given: answers.Answers) -> dict[str, tuple[list[Question], list[Answer]]]:
    """Return split -> questions and answers of a file that has labels, in the order of the ids; a question of several
    splits counts in each."""
    found: dict[str, tuple[list[Question], list[Answer]]] = {}
    seen: set[tuple[str, ...]] = set()
    for row in in_own_order(given.rows):
        label = row.label.strip().lower()
        if label not in ("yes", "no"):
            raise VlmFixError(f'{given.path}, row {row.number}: the label {row.label!r} is neither "yes" nor "no".')
        for split in _categories([row]) or ["all"]:
            key = split, row.id, row.image, row.question
            if (row.id or row.question) and key in seen:
                raise VlmFixError(
                    f"{given.path}, row {row.number}: the question {row.id or row.question!r} of {split} comes twice; keep one "
                    "answer."
                )
            seen.add(key)
            questions, replies = found.setdefault(split, ([], []))
            questions.append(Question(row.number, row.image or row.id or str(row.number), row.question, label))
            replies.append(Answer(row.number, row.reply))
    return found


def labelled(given: answers.Answers) -> bool:
    """Whether every row of a file has a label."""
    return all(row.label for row in given.rows)


def _one(questions: Sequence[Question], rows: Sequence[answers.Answer], path: str) -> list[Answer]:
    """The answers to the questions of one split, or all answers if they do not line up: `score` says so."""
    bare = next((row for row in rows if not row.id and not row.question), None)
    if bare:
        raise VlmFixError(
            f'{path}, row {bare.number}: neither "question_id" nor "question", so it fits no question: give it the id.'
        )
    return _aligned(questions, rows) or [Answer(row.id or row.number, row.reply, row.question) for row in rows]


def _aligned(questions: Sequence[Question], rows: Sequence[answers.Answer]) -> list[Answer] | None:
    """The answers to the questions of one split by id, else by image and question; None if they do not line up."""
    by_id = {row.id: row for row in rows}
    if by_id.keys() == {str(question.question_id) for question in questions} and len(by_id) == len(rows):
        return _answers(questions, [by_id[str(question.question_id)] for question in questions])
    keyed = {_key(row.image, row.question): row for row in rows if row.image and row.question}
    if not len(keyed) == len(rows) == len(questions):
        return None
    images: dict[str, list[tuple[str, answers.Answer]]] = {}
    for (image, prompt), row in keyed.items():
        images.setdefault(image, []).append((prompt, row))
    found = [
        [row for prompt, row in images.get(image, ()) if text in prompt]
        for image, text in (_key(question.image, question.text) for question in questions)
    ]
    return _answers(questions, [mine[0] for mine in found]) if all(len(mine) == 1 for mine in found) else None


def _answers(questions: Sequence[Question], rows: Sequence[answers.Answer]) -> list[Answer]:
    return [
        Answer(q.question_id, row.reply, row.question, row.label.strip().lower())
        for q, row in zip(questions, rows, strict=True)
    ]


def _in_order(
    splits: Splits, rows: Sequence[answers.Answer], path: str
) -> dict[str, tuple[list[Question], list[Answer]]]:
    """Find the splits one after the other in the rows, as they stand or in the order of their ids."""
    prompts = [plain_text(row.question) for row in rows]
    orders = [list(range(len(rows)))]
    numbers = [answers.whole_number(row.id) for row in rows]
    if None not in numbers:
        orders.append(sorted(orders[0], key=lambda place: numbers[place] or 0))
    best: list[tuple[str, int]] = []
    for order in orders:
        asked = [prompts[place] for place in order]
        found = _stretches({name: [plain_text(q.text) for q in each] for name, each in splits.items()}, asked)
        if found and sum(size for _, size in found) == len(rows):
            result, start = {}, 0
            for name, size in found:
                mine = [rows[place] for place in order[start : start + size]]
                result["random" if name == OLD else name] = (splits[name], _answers(splits[name], mine))
                start += size
            return result
        best = max(best, found, key=lambda each: sum(size for _, size in each))
    done = sum(size for _, size in best)
    if not best and (near := _nearest(splits, rows)):
        split, lost = near
        raise VlmFixError(
            f"Questions and answers do not line up: {path} has {len(rows)} answers, most of them to the split {split}, but none "
            f"to {len(lost)} of its {len(splits[split])} questions, the first with question_id {lost[0]}; give all answers of "
            "the split, or the questions that were asked as QUESTIONS (a file, or a name such as coco:random)."
        )
    told = ", ".join(f"{size} of {name}" for name, size in best) or "none of a split"
    raise VlmFixError(
        f"Questions and answers do not line up: {path} has {len(rows)} answers, of which the first {done} are those to whole "
        f"splits ({told}); give all answers of each split in the order of its questions, with the question in each row, and "
        "QUESTIONS of the data set they come from (a file, or a folder with a file for each split)."
    )


def _nearest(splits: Splits, rows: Sequence[answers.Answer]) -> tuple[str, list[int | str]] | None:
    """The split whose questions most rows answer under its ids, and the ids without an answer; None if half have none."""
    by_id = {row.id: plain_text(row.question) for row in rows if row.question}
    lost = {
        name: [q.question_id for q in each if plain_text(q.text) not in by_id.get(str(q.question_id), "")]
        for name, each in splits.items()
    }
    name = min(lost, key=lambda split: len(lost[split]))
    return (name, lost[name]) if 0 < 2 * len(lost[name]) < len(splits[name]) else None


def _stretches(splits: Mapping[str, list[str]], prompts: Sequence[str]) -> list[tuple[str, int]]:
    """The longest run of splits from the first row on, as (split, rows)."""
    best: list[tuple[str, int]] = []
    for name, asked in splits.items():
        size = len(asked)
        if size <= len(prompts) and all(text in prompt for text, prompt in zip(asked, prompts, strict=False)):
            left = {n: each for n, each in splits.items() if n != name and {n, name} != {OLD, "random"}}
            found = [(name, size), *_stretches(left, prompts[size:])]
            best = max(best, found, key=lambda each: sum(rows for _, rows in each))
    return best


def _categories(rows: Sequence[answers.Answer]) -> list[str]:
    parts = (part.strip() for row in rows for part in row.category.split(","))
    return [*dict.fromkeys(part for part in parts if part)]


def _key(image: str, text: str) -> tuple[str, str]:
    return image_key(image), plain_text(text)


def image_key(image: str) -> str:
    """What names an image, however its path is written: its number, or the name without folder and ending."""
    number = answers.image_number(image)
    return Path(image.replace("\\", "/")).stem if number is None else str(number)


@cache
def _labels() -> dict[tuple[str, str], str]:
    """(image, question) -> label of all questions in the package."""
    return {_key(q.image, q.text): q.label for questions in official().values() for q in questions}
