"""POPE: yes/no questions about objects that are, and are not, in an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.benchmark import (
    YES_NO_COLUMNS,
    Argument,
    Benchmark,
    Gain,
    Layout,
    YesNo,
    labels_option,
    scorer_option,
)
from vlm_fix.eval.scorers.choices import Labels, Scorer, one_of

from . import data as files
from . import repope, score


def score_files(questions: str, answers: str, scorer: Scorer, labels: Labels) -> score.PopeResult:
    """Score an answer file against its question file; RePOPE's result stands in `repope` if both labels are asked for."""
    found = results(questions, answers, scorer, labels)["pope"]
    first, *beside = found.values()
    return dataclasses.replace(first, repope=beside[0]) if beside else first


def results(questions: str, answers: str, scorer: Scorer, labels: Labels) -> dict[str, dict[str, score.PopeResult]]:
    """Score an answer file against its question file, with each of the labels; rows in the order of the questions."""
    one_of(labels, Labels, "labels")
    asked, given = files.load_questions(questions), files.load_answers(answers)
    if len(given) > len(asked) and (pope := repope.whole_split(asked)):  # QUESTIONS is RePOPE's own file
        asked = pope
        labels = "repope"
    found = {}
    if labels != "repope":
        found["questions"] = score.score(asked, given, scorer)
    checked = repope.needed(asked) if labels == "repope" else repope.relabelled(asked) if labels == "both" else None
    if checked:
        kept = {q.question_id for q in checked}
        result = score.score(checked, [answer for answer in given if answer.question_id in kept], scorer)
        found["questions" if labels == "repope" else "RePOPE"] = dataclasses.replace(result, labels="repope")
    return {"pope": found}


def _caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    n = ", ".join(f"{n} {split}" for split, n in data["questions"].items())
    return f"{data.get('labels', 'POPE')}: {data['source']}; questions: {n}; scorer {settings['scorer']}"


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    source_commit=score.SOURCE,
    commits={"official": score.SOURCE, **yesno.COMMITS},
    score_what="score POPE answers",
    arguments=(
        Argument(
            "questions",
            {
                "metavar": "QUESTIONS",
                "help": "JSON lines or array: question_id, image, text, label; or coco:random, gqa:popular, aokvqa:...",
            },
        ),
        Argument("answers", {"metavar": "ANSWERS", "help": "JSON lines: question_id, text or answer"}),
        scorer_option(),
        labels_option(),
    ),
    score_files=score_files,
    results=results,
    layouts={
        "pope": Layout(
            columns={"accuracy": "accuracy", **YES_NO_COLUMNS},
            metrics=score.METRICS,
            compared=("accuracy", "f1", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=_caption,
            answers=YesNo(yesno.verdict, balanced=True, groups=repope.PARTS),
            leaderboard={"accuracy": ""},
            leaderboard_means={"yes_ratio": "yes"},
            gain=Gain("accuracy", 1, "POPE accuracy, points gained"),
        )
    },
)
