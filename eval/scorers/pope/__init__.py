"""POPE: yes/no questions about objects that are, and are not, in an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.answers import Answers, Keys, Tell, read
from vlm_fix.eval.scorers.benchmark import (
    KEYS,
    YES_NO_COLUMNS,
    Argument,
    Benchmark,
    Gain,
    Layout,
    YesNo,
    figures_of,
    labels_option,
    scorer_option,
)
from vlm_fix.eval.scorers.choices import Labels, Scorer, one_of
from vlm_fix.eval.stats import column_sums

from . import data, files, repope, score


def results(
    answers: str,
    questions: str | None = None,
    scorer: Scorer = "official",
    labels: Labels = "both",
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Tell = str,
) -> dict[str, dict[str, score.PopeResult]]:
    """Score an answer file by split, and again with RePOPE's labels; rows in the order of the questions."""
    one_of(labels, Labels, "labels")
    given = read(answers, data.ANSWER, Keys(answer_key, id_key))
    tell(given.told())
    pairs, source, labels = _matched(questions, given, labels)
    tell(f"questions and labels: {source}; splits: {', '.join(f'{name} ({len(q)})' for name, (q, _) in pairs.items())}")
    other = sum(
        reply.label in ("yes", "no") and reply.label != question.label
        for asked, replies in pairs.values()
        for question, reply in zip(asked, replies, strict=False)
    )
    if other:
        differ = "differs" if other == 1 else "differ"
        tell(f"note: {counted(other, 'label')} of the answer file {differ} from the questions', which are used")
    found = {}
    if labels != "repope":
        found = {split: score.score(asked, replies, scorer) for split, (asked, replies) in pairs.items()}
    for split, (asked, replies) in pairs.items() if labels != "pope" else ():
        kind, checked = repope.needed(asked) if labels == "repope" else repope.relabelled(asked) or ("", [])
        if checked:
            kept = {str(q.question_id) for q in checked}
            mine = [answer for answer in replies if str(answer.question_id) in kept]
            result = dataclasses.replace(score.score(checked, mine, scorer), labels="repope")
            found[split if labels == "repope" else f"{kind} RePOPE"] = result
    return {"pope": found}


def shown(results: Mapping[str, Mapping[str, score.PopeResult]]) -> score.PopeResult | dict[str, Any]:
    """Return the result of one split, with RePOPE's in `repope`, or the figures of the parts of a file with several.

    `mean` is the mean over splits, as in LLaVA's paper, `overall` the figures of all answers, as VLMEvalKit prints them.
    """
    found = results["pope"]
    plain = [split for split in found if split not in repope.PARTS]
    if len(plain) == 1:
        beside = [found[split] for split in found if split in repope.PARTS]
        return dataclasses.replace(found[plain[0]], repope=beside[0] if beside else None)
    parts: dict[str, Any] = figures_of(results)
    for end, mine in (("", plain), (" RePOPE", [split for split in found if split in repope.PARTS])):
        if mine:
            n = sum(found[split].n for split in mine)
            mean = {metric: fmean(getattr(found[split], metric) for split in mine) for metric in score.METRICS}
            sums = column_sums(
                [row for split in mine for row in found[split].rows], ["n", "tp", "fp", "tn", "fn", "yes"]
            )
            overall = {name: float(metric(sums)) for name, metric in score.METRICS.items()}
            parts |= {f"mean{end}": {"n": n, **mean}, f"overall{end}": {"n": n, **overall}}
    return parts


def _matched(questions: str | None, given: Answers, labels: Labels) -> tuple[dict[str, Any], str, Labels]:
    """Return the matched questions and answers, where the questions come from, and whose labels to use."""
    if questions:
        asked = files.load(questions)
        if len(asked) == 1 and len(given.rows) > len(next(iter(asked.values()))):
            ((split, each),) = asked.items()
            if whole := repope.whole_split(each):  # RePOPE's own file, with answers made for POPE
                asked, labels = {split: whole}, "repope"
        return files.match(asked, given), "POPE's own of COCO" if questions == "coco" else questions, labels
    try:
        found = files.match(files.official(), given)
    except VlmFixError:
        if not files.labelled(given):
            raise
        return files.own(given), "those of the answer file", labels
    return found, "POPE's own of COCO", labels


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
                "nargs": "?",
                "help": "file (question_id, image, text, label), folder with one for each split, or coco, POPE's own (those); "
                "coco:random, gqa:popular, aokvqa:adversarial and so on are in the package",
            },
        ),
        Argument(
            "answers", {"metavar": "ANSWERS", "help": "question_id, text; see docs/benchmarks.md for all layouts"}
        ),
        scorer_option(),
        labels_option(),
        *KEYS,
    ),
    results=results,
    shown=shown,
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
