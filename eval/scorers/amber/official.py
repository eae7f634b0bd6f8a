"""AMBER's official answer files, and their figures as the official script prints them.

A file is a JSON array or JSON lines of {"id": 1, "response": "..."}: ids up to 1004 are captions, the others answers to
questions. The script (junyangwang0410/AMBER@534babf inference.py) prints percentages rounded to .1, computes F1 from the
rounded figures, and adds small terms to the denominators.

Worked example: one of three mentions is hallucinated (33.3 %), one of two objects covered, one of two typical ones named.
>>> from .data import Scene
>>> scene = Scene(1, "AMBER_1.jpg", ("tree", "dog"), ("cat", "bird"))
>>> printed(score_captions(["A dog and two cats near a bench."], [scene], lexicon("official", "pattern")))
{'CHAIR': 33.3, 'Cover': 50.0, 'Hal': 100.0, 'Cog': 50.0}
"""

from pathlib import Path

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_rows
from vlm_fix.eval.scorers.choices import Scorer, Variant
from vlm_fix.eval.scorers.result import Result, paired

from .data import Question, lexicon, questions, scenes
from .score import score_captions, score_questions

ANSWER = '{"id": 1, "response": "A tree in a park."}'


def score_file(path: str | Path, scorer: Scorer = "official", variant: Variant = "nltk") -> dict[str, Result]:
    """Score an official answer file, rows with id and response, by part.

    Parts are captions, existence, attribute, relation and, if those three are present, questions. A part is scored if the
    file has answers to it, and must then be complete.
    """
    said: dict[int, str | None] = {}
    for number, row in enumerate(read_rows(path, "answer file", ANSWER), 1):
        if not isinstance(row.get("id"), int) or not isinstance(row.get("response"), str):
            raise VlmFixError(f'{path}, row {number}: AMBER wants "id", a number, and "response", a text; add them.')
        if row["id"] in said:
            raise VlmFixError(f"{path}, row {number}: id {row['id']} comes twice; keep one answer.")
        said[row["id"]] = row["response"]
    found = {}
    every: list[Question] = []
    if captioned := {id: text for id, text in said.items() if id <= 1004}:
        shown = scenes()
        texts = paired(shown, captioned, "AMBER caption")
        found["captions"] = score_captions(texts, shown, lexicon(scorer, variant))
    asked = questions()
    kind_of = {question.id: question.kind for question in asked}
    for kind in ("existence", "attribute", "relation"):
        mine = [question for question in asked if question.kind == kind]
        if replies := {id: text for id, text in said.items() if id > 1004 and kind_of.get(id, kind) == kind}:
            found[kind] = score_questions(paired(mine, replies, f"AMBER {kind}"), mine, scorer)
            every += mine
    if len(every) == len(asked):
        found["questions"] = score_questions([said[question.id] for question in every], every, scorer)
    return found


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
