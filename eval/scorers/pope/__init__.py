"""POPE: yes/no questions about objects that are, and are not, in an image."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.answers import Answers, Keys, Tell, read
from vlm_fix.eval.scorers.benchmark import KEYS, YES_NO_COLUMNS, Argument, Benchmark, Gain, Layout, YesNo, scorer_option
from vlm_fix.eval.scorers.choices import Scorer
from vlm_fix.eval.stats import column_sums

from . import data, files, score


def score_files(
    answers: str,
    questions: str | None = None,
    scorer: Scorer = "official",
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Tell = str,
) -> score.PopeResult | dict[str, Any]:
    """Score an answer file: one split, or the parts of a file with several.

    `mean` is the mean over splits, as in LLaVA's paper, `overall` the figures of all answers, as VLMEvalKit prints them.
    """
    given = read(answers, data.ANSWER, Keys(answer_key, id_key))
    tell(given.told())
    pairs, source = _matched(questions, given)
    tell(f"questions and labels: {source}; splits: {', '.join(f'{name} ({len(q)})' for name, (q, _) in pairs.items())}")
    other = sum(
        reply.label in ("yes", "no") and reply.label != question.label
        for asked, replies in pairs.values()
        for question, reply in zip(asked, replies, strict=False)
    )
    if other:
        tell(f"note: {other} labels of the answer file differ from those of the questions, which are used")
    results = {split: score.score(asked, replies, scorer) for split, (asked, replies) in pairs.items()}
    if len(results) == 1:
        return next(iter(results.values()))
    parts: dict[str, Any] = {split: result.to_dict() for split, result in results.items()}
    n = sum(result.n for result in results.values())
    mean = {name: fmean(getattr(result, name) for result in results.values()) for name in score.METRICS}
    sums = column_sums(
        [row for result in results.values() for row in result.rows], ["n", "tp", "fp", "tn", "fn", "yes"]
    )
    overall = {name: float(metric(sums)) for name, metric in score.METRICS.items()}
    return parts | {"mean": {"n": n, **mean}, "overall": {"n": n, **overall}}


def _matched(questions: str | None, given: Answers) -> tuple[dict[str, Any], str]:
    """Return the matched questions and answers, and where the questions come from."""
    if questions:
        return files.match(files.load(questions), given), "POPE's own of COCO" if questions == "coco" else questions
    try:
        found = files.match(files.official(), given)
    except VlmFixError:
        if not files.labelled(given):
            raise
        return files.own(given), "those of the answer file"
    return found, "POPE's own of COCO"


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
            {
                "metavar": "QUESTIONS",
                "nargs": "?",
                "help": "file (question_id, image, text, label), folder with one for each split, or coco, POPE's own (those)",
            },
        ),
        Argument(
            "answers", {"metavar": "ANSWERS", "help": "question_id, text; see docs/benchmarks.md for all layouts"}
        ),
        scorer_option(),
        *KEYS,
    ),
    score_files=score_files,
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
