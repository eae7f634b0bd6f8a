"""RePOPE: POPE's questions about COCO with labels that were checked by hand.

Source: Y. Neuhaus and M. Hein, RePOPE: Impact of Annotation Errors on the POPE Benchmark, arXiv:2504.15707; annotations of
YanNeu/RePOPE@bcf22e5. Questions without a clear answer are dropped (226, 273 and 316 of the 3000 in random, popular and
adversarial), and labels are corrected: 139 of the 1500 "yes" in each, and 5, 39 and 33 of the "no". So a method that says
yes more often gains on POPE and loses here. `data/pope/repope.json` holds the ids of both kinds.

Worked example: question 23 of random, about a car, is dropped.
>>> from .data import coco_questions
>>> asked = coco_questions("random")
>>> kind, kept = relabelled(asked)
>>> len(kept), {q.question_id for q in asked[:30]} - {q.question_id for q in kept}
(2774, {23})
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import get_args

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA

from .data import coco_questions
from .score import Kind, Question

SOURCE = "YanNeu/RePOPE@bcf22e5"
PARTS = tuple(f"{kind} RePOPE" for kind in get_args(Kind))
"""The names of its splits where they stand beside POPE's."""
OTHER = {"yes": "no", "no": "yes"}


def relabelled(questions: Sequence[Question]) -> tuple[Kind, list[Question]] | None:
    """Return the split of official COCO questions, and them with RePOPE's labels, without those it drops; None for others."""
    official, _ = _ids()
    for kind, known in official.items():
        if questions and all(known.get(str(q.question_id)) == _key(q) for q in questions):
            return kind, _relabelled(kind, questions)
    return None


def whole_split(questions: Sequence[Question]) -> list[Question] | None:
    """Return POPE's split if the questions are those of a file of RePOPE, so that answers made for POPE fit; else None."""
    asked = [_key(q) for q in questions]
    for kind in get_args(Kind):
        pope = coco_questions(kind)
        if [_key(q) for q in _relabelled(kind, pope)] == asked:
            return pope
    return None


def needed(questions: Sequence[Question]) -> tuple[Kind, list[Question]]:
    """Return `relabelled`. Raises VlmFixError if the questions are not POPE's about COCO."""
    found = relabelled(questions)
    if found is None:
        raise VlmFixError(
            "RePOPE labels POPE's own questions about COCO (coco_pope_random.json and so on), and these are others: "
            "leave out --labels repope."
        )
    return found


def _relabelled(kind: Kind, questions: Sequence[Question]) -> list[Question]:
    import dataclasses

    _, changed = _ids()
    dropped, flipped = ({*map(str, changed[kind][what])} for what in ("dropped", "flipped"))
    return [
        dataclasses.replace(q, label=OTHER[q.label]) if str(q.question_id) in flipped else q
        for q in questions
        if str(q.question_id) not in dropped
    ]


def _key(question: Question) -> tuple[str, str, str]:
    return question.image, question.text, question.label


@cache
def _ids() -> tuple[dict[Kind, dict[str, tuple[str, str, str]]], dict[str, dict[str, list[int]]]]:
    """Return kind -> id -> key of POPE's questions, and kind -> dropped and flipped ids."""
    official = {kind: {str(q.question_id): _key(q) for q in coco_questions(kind)} for kind in get_args(Kind)}
    return official, json.loads((DATA / "pope/repope.json").read_text())
