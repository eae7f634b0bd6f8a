"""AMBER: what captions cover and invent, and yes/no questions about existence, attribute and relation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.answers import Keys, Tell
from vlm_fix.eval.scorers.benchmark import (
    KEYS,
    YES_NO_COLUMNS,
    Argument,
    Benchmark,
    Captions,
    Layout,
    Mark,
    Overall,
    YesNo,
    figures_of,
    plain_caption,
    scorer_option,
    variant_option,
)
from vlm_fix.eval.scorers.chair import readable_variant
from vlm_fix.eval.scorers.choices import Scorer, Variant
from vlm_fix.eval.scorers.result import Result

from . import data as files
from . import official, score


def shown(results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """Return the figures of each part; those of the official scorer also as its script prints them."""
    found = {part: result for parts in results.values() for part, result in parts.items()}
    figures: dict[str, Any] = figures_of(results)
    for part, result in found.items():
        if result.scorer.partition(",")[0] == "official":
            figures[part]["printed"] = official.printed(result, 0.001 if part == "existence" else 0.0001)
    if {"captions", "questions"} <= found.keys():
        figures["amber_score"] = score.amber_score(found)
    return figures


def mark(row: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[list[Mark], int]:
    """Mark the objects of an answer in samples.jsonl, except words that are never judged; count the hallucinated ones."""
    words = _lexicon(data["variant"].split(",")[0], readable_variant(data))
    scene = files.Scene(0, "", tuple(row["ground_truth"]), tuple(row["hallu"]))
    marks, wrong = [], 0
    for noun, fits, imagined, hallucinated in score.mentions(row["answer"], scene, words):
        where = noun.start, noun.end, noun.node
        if hallucinated:
            marks.append(Mark(*where, False, "typical, but not there" if imagined else "not there"))
        elif fits is not None:
            marks.append(Mark(*where, True, f"in the image, as {scene.truth[fits]}"))
        wrong += hallucinated
    return marks, wrong


def results(
    answers: str,
    scorer: Scorer = "official",
    variant: Variant | None = None,
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Tell = str,
) -> dict[str, dict[str, Any]]:
    """Score an answer file, by task and part."""
    found = official.score_file(answers, scorer, variant or "nltk", Keys(answer_key, id_key), tell)
    if variant and "captions" not in found:
        raise VlmFixError(f"--variant has no effect on {answers}, of which no captions are scored: leave it out.")
    captions = {part: result for part, result in found.items() if part == "captions"}
    asked = {part: result for part, result in found.items() if part != "captions"}
    return {task: parts for task, parts in (("amber", captions), ("amber-qa", asked)) if parts}


@cache
def _lexicon(scorer: Any, variant: Variant) -> files.Lexicon:
    return files.picto_lexicon(variant) if scorer == "picto" else files.lexicon(scorer, variant)


BENCHMARK = Benchmark(
    name="amber",
    title="AMBER",
    source_commit=score.SOURCE,
    commits=yesno.COMMITS,
    score_what="score AMBER answers",
    arguments=(
        Argument("answers", {"metavar": "ANSWERS", "help": "id, response; see docs/benchmarks.md for all layouts"}),
        scorer_option(),
        variant_option("how nouns are found in captions (nltk)"),
        *KEYS,
    ),
    results=results,
    shown=shown,
    layouts={
        "amber": Layout(
            columns={"chair": "CHAIR", "cover": "cover", "hal": "Hal", "cog": "Cog", "score": "AMBER score"},
            metrics=score.CAPTIONS,
            compared=("chair", "cover", "hal", "cog"),
            right=lambda row: not row["hallucinating"],
            caption=plain_caption(
                "AMBER captions (lower is better, but for cover and the score: half 100 - CHAIR, half F1 of all questions)"
            ),
            answers=Captions(mark, "cover", "chair", "CHAIR", at_share=lambda result, share: result.at_share(share)),
            leaderboard={"chair": ""},
        ),
        "amber-qa": Layout(
            columns={"accuracy": "acc", **YES_NO_COLUMNS},
            metrics=score.QUESTIONS,
            compared=("accuracy", "f1", "yes_ratio"),
            right=lambda row: row["tp"] or row["tn"],
            caption=plain_caption('AMBER questions; precision, recall and F1 are of "no"'),
            answers=YesNo(score.verdict, total="questions"),
            leaderboard={"accuracy": ""},
        ),
    },
    overall=Overall(score.WHOLE, ("amber", "amber-qa"), "captions", score.whole),
)
