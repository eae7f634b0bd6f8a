"""POPE: yes/no questions about objects that are, and are not, in an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.benchmark import YES_NO_COLUMNS, Argument, Benchmark, Gain, Layout, YesNo, scorer_option
from vlm_fix.eval.scorers.choices import Scorer

from . import data as files
from . import score


def score_files(questions: str, answers: str, scorer: Scorer) -> score.PopeResult:
    """Score an answer file against its question file."""
    return score.score(files.load_questions(questions), files.load_answers(answers), scorer)


def _caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    n = ", ".join(f"{n} {split}" for split, n in data["questions"].items())
    return f"POPE: {data['source']}; questions: {n}; scorer {settings['scorer']}"


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    source_commit=score.SOURCE,
    commits={"official": score.SOURCE, **yesno.COMMITS},
    score_what="score POPE answers",
    arguments=(
        Argument(
            "questions",
            {"metavar": "QUESTIONS", "help": "JSON lines or array: question_id, image, text, label"},
        ),
        Argument("answers", {"metavar": "ANSWERS", "help": "JSON lines: question_id, text or answer"}),
        scorer_option(),
    ),
    score_files=score_files,
    results=lambda **files: {"pope": {"questions": score_files(**files)}},
    layouts={
        "pope": Layout(
            columns={"accuracy": "accuracy", **YES_NO_COLUMNS},
            metrics=score.METRICS,
            compared=("accuracy", "f1", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=_caption,
            answers=YesNo(yesno.verdict, balanced=True),
            leaderboard={"accuracy": ""},
            leaderboard_means={"yes_ratio": "yes"},
            gain=Gain("accuracy", 1, "POPE accuracy, points gained"),
        )
    },
)
