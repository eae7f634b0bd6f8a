"""AMBER's official answer files, and their figures as the official script prints them.

An official file is a JSON array of {"id": 1, "response": "..."}: ids up to 1004 are captions, the others answers to
questions. The script (junyangwang0410/AMBER@534babf inference.py) prints percentages rounded to .1, computes F1 from the
rounded figures, and adds small terms to the denominators.

Worked example: one of three mentions is hallucinated (33.3 %), one of two objects covered, one of two typical ones named.
>>> from .data import Scene
>>> scene = Scene(1, "AMBER_1.jpg", ("tree", "dog"), ("cat", "bird"))
>>> printed(score_captions(["A dog and two cats near a bench."], [scene], lexicon("official", "pattern")))
{'CHAIR': 33.3, 'Cover': 50.0, 'Hal': 100.0, 'Cog': 50.0}
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.answers import USUAL, Answers, Keys, Tell, read, whole_number
from vlm_fix.eval.scorers.choices import Scorer, Variant
from vlm_fix.eval.scorers.replies import asks, in_own_order
from vlm_fix.eval.scorers.result import Result

from .data import KINDS, Question, Scene, lexicon, questions, scenes
from .score import score_captions, score_questions

YES_NO = re.compile(r"\s*(?:is|are|do|does|did|has|have)\b", re.IGNORECASE)
ANSWER = '{"id": 1, "response": "A tree in a park."}'


def score_file(
    path: str | Path,
    scorer: Scorer = "official",
    variant: Variant = "nltk",
    keys: Keys = USUAL,
    tell: Tell = str,
) -> dict[str, Result]:
    """Score an answer file by part; `answers.py` says what rows may be.

    Parts are captions, existence, attribute, relation and, if those three are whole, questions. Each is scored on its own
    if all of it is answered; `tell` says which are left out. VLMEvalKit's rows are scored by their own labels.
    """
    given = read(path, ANSWER, keys)
    tell(given.told())
    if given.layout == "rows of VLMEvalKit":
        return _labelled(given, scorer, tell)
    said = _by_number(given)
    found: dict[str, Result] = {}
    shown, asked = scenes(), questions()
    _about_amber(given, shown, asked)
    known = {scene.id for scene in shown} | {question.id for question in asked}
    strange = next((number for number in said if number not in known), None)
    if strange is not None:
        raise VlmFixError(
            f"{path} has an answer to {strange}, which is no question of AMBER (1 to 15220): name the right key with --id-key."
        )
    lacking = []
    for kind in ("captions", "existence", "attribute", "relation"):
        mine: Sequence[Any] = shown if kind == "captions" else [q for q in asked if q.kind == kind]
        lost = [item.id for item in mine if item.id not in said]
        if lost:
            n = len(mine) - len(lost)
            lacking += [f"{kind}: {n} of {len(mine)} answered, no answer to {lost[0]}"] if n else []
        elif kind == "captions":
            texts = {scene.id: text for scene in shown if (text := said[scene.id]) is not None}
            there = [scene for scene in shown if scene.id in texts]
            if len(there) < len(shown):  # an empty caption would have no hallucination
                tell(f"note: {counted(len(shown) - len(there), 'image')} left out of captions, as the caption is null")
            lacking += [] if there else ["captions: all are null"]
            if there:
                found[kind] = score_captions([*texts.values()], there, lexicon(scorer, variant))
        else:
            found[kind] = score_questions([said[question.id] for question in mine], mine, scorer)
    if not found:
        raise VlmFixError(f"{path} answers no part of AMBER wholly ({'; '.join(lacking)}): give all answers of a part.")
    for line in lacking:
        tell(f"not scored: {line}")
    if {question.id for question in asked} <= said.keys():
        found["questions"] = score_questions([said[question.id] for question in asked], asked, scorer)
    return found


def _by_number(given: Answers) -> dict[int, str | None]:
    """Id -> reply."""
    said: dict[int, str | None] = {}
    for row in given.rows:
        number = whole_number(row.id)
        if number is None:
            has = f"{row.id!r} is no number" if row.id else "there is none"
            raise VlmFixError(f'{given.path}, row {row.number}: AMBER wants "id", 1 to 15220, but {has}; see --id-key.')
        if number in said:
            raise VlmFixError(f"{given.path}, row {row.number}: id {row.id} comes twice; keep one answer.")
        said[number] = row.reply
    return said


def _about_amber(given: Answers, shown: Sequence[Scene], asked: Sequence[Question]) -> None:
    """Raise VlmFixError for a row whose question or image is not the one that its id has in AMBER."""
    known: dict[int, Scene | Question] = {scene.id: scene for scene in shown}
    known |= {question.id: question for question in asked}
    for row in given.rows:
        item = known.get(int(row.id))
        if isinstance(item, Question):
            asks(row, item.text, given.path, "AMBER's question")
        elif item and YES_NO.match(row.question):
            raise VlmFixError(
                f"{given.path}, row {row.number} answers {row.question[:60]!r}, but {row.id} is an image of AMBER to describe: "
                "give AMBER's answers, or say which key is the id with --id-key."
            )
        image = Path(row.image.replace("\\", "/"))
        if item and image.suffix.lower() in (".jpg", ".jpeg", ".png") and image.stem != Path(item.image).stem:
            raise VlmFixError(
                f"{given.path}, row {row.number} is about {image.name}, but {row.id} is about {item.image} in AMBER: give "
                "AMBER's answers, or say which key is the id with --id-key."
            )


def _labelled(given: Answers, scorer: Scorer, tell: Tell) -> dict[str, Result]:
    """Score rows that have a type of question and a label; `tell` says of which kinds some questions are missing."""
    asked, replies = [], []
    seen: set[tuple[str, ...]] = set()
    for row in in_own_order(given.rows):
        key = row.id, row.image, row.question
        if any(key) and key in seen:
            raise VlmFixError(f"{given.path}, row {row.number}: id {row.id} comes twice; keep one answer.")
        seen.add(key)
        label = row.label.strip().lower()
        if row.category not in KINDS or label not in ("yes", "no"):
            raise VlmFixError(
                f"{given.path}, row {row.number}: category {row.category!r} and answer {row.label!r} are not those of AMBER's "
                "questions, such as discriminative-relation and Yes."
            )
        asked.append(
            Question(row.number, row.image or row.id or str(row.number), row.question, KINDS[row.category], label)
        )
        replies.append(row.reply)
    found = {}
    whole = Counter(question.kind for question in questions())
    for kind in dict.fromkeys(KINDS.values()):
        both = [(reply, question) for reply, question in zip(replies, asked, strict=True) if question.kind == kind]
        if both:
            if len(both) != whole[kind]:
                tell(f"note: {kind}: {len(both)} answers, where AMBER asks {whole[kind]} questions")
            found[kind] = score_questions([reply for reply, _ in both], [question for _, question in both], scorer)
    return found | {"questions": score_questions(replies, asked, scorer)}


def printed(result: Result, small: float = 0.0001) -> dict[str, float]:
    """Return the figures as the official script prints them; `small` is added to F1's denominator (existence: .001)."""
    s = result.sums()

    def percent(part: str, whole: float) -> float:
        return round(s[part] / (whole + 0.001) * 100, 1)

    if "truth" in s:
        hal = round(100 - (s["n"] - s["hallucinating"]) / (s["n"] + 0.001) * 100, 1)
        figures = {"CHAIR": percent("hallucinated", s["mentions"]), "Cover": percent("covered", s["truth"])}
        return figures | {"Hal": hal, "Cog": percent("imagined", s["hallu"])}
    right = round((s["tp"] + s["tn"]) / (s["n"] + 0.001) * 100, 1)
    precision, recall = percent("tn", s["tn"] + s["fn"]), percent("tn", s["no"])
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + small) * 100, 1)
    return {"Accuracy": right, "Precision": precision, "Recall": recall, "F1": f1}
