"""How each benchmark is compared and shown, and which scorer judged it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_fix.eval.scorers import hallusion, mme
from vlm_fix.eval.scorers.amber import score as amber
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.stats import Metric


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a benchmark is compared and shown: `columns` are the figures of its table, with their headings; `compared` are
    the metrics that get an interval against the baseline (the AMBER score, of two tasks, gets it in `summarise`); `right`
    tells from a row's counts whether that sample is right (McNemar).
    """

    columns: Mapping[str, str]
    metrics: Mapping[str, Metric]
    compared: tuple[str, ...]
    right: Callable[[Mapping[str, Any]], Any]
    caption: Callable[[Mapping[str, Any], Mapping[str, Any]], str]  # (settings, its data) -> what was measured


def _pope_caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    n = ", ".join(f"{n} {split}" for split, n in data["questions"].items())
    return f"POPE: {data['source']}; questions: {n}; scorer {settings['scorer']}"


def _chair_caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    how = " (works without NLTK data)" if data["variant"] == "pattern" else ""
    text = f"CHAIR: {data['source']}; {data['images']} captions; variant {data['variant']}{how}"
    text += f"; {data['captions']}" if "captions" in data else ""
    return text + "; lower C_S and C_I are better, lower recall is not"


def _suite_caption(title: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    return lambda _, data: f"{title}: {data['source']}; {data['images']} images; scorer {data['variant']}"


_YES_NO = {"precision": "prec.", "recall": "recall", "f1": "F1", "yes_ratio": "yes", "unparsed": "unp."}
LAYOUTS = {
    "pope": Layout(
        {"accuracy": "accuracy", **_YES_NO},
        pope.METRICS,
        ("accuracy", "f1", "yes_ratio"),
        lambda row: row["tp"] or row["tn"],
        _pope_caption,
    ),
    "chair": Layout(
        {"chair_s": "C_S", "chair_i": "C_I", "recall": "recall", "f1": "F1", "length": "length"},
        chair.METRICS,
        ("chair_s", "chair_i", "recall"),
        lambda row: not row["hallucinating"],
        _chair_caption,
    ),
    "amber": Layout(
        {"chair": "CHAIR", "cover": "cover", "hal": "Hal", "cog": "Cog", "score": "AMBER score"},
        amber.CAPTIONS,
        ("chair", "cover", "hal", "cog"),
        lambda row: not row["hallucinating"],
        _suite_caption(
            "AMBER captions (lower is better, but for cover and the score: half 100 - CHAIR, half F1 of all questions)"
        ),
    ),
    "amber-qa": Layout(
        {"accuracy": "acc", **_YES_NO},
        amber.QUESTIONS,
        ("accuracy", "f1", "yes_ratio"),
        lambda row: row["tp"] or row["tn"],
        _suite_caption('AMBER questions; precision, recall and F1 are of "no"'),
    ),
    "mme": Layout(
        {"score": "score", "accuracy": "acc", "accuracy_plus": "acc+", "yes_ratio": "yes", "unparsed": "unp."},
        mme.METRICS,
        ("score", "accuracy", "yes_ratio"),
        lambda row: row["right"],
        _suite_caption("MME; score in its points"),
    ),
    "hallusion": Layout(
        {"aAcc": "aAcc", "qAcc": "qAcc", "fAcc": "fAcc", "yes_ratio": "yes", "unparsed": "unp."},
        hallusion.METRICS,
        ("aAcc", "qAcc", "fAcc", "yes_ratio"),
        lambda row: row["right"],
        _suite_caption("HallusionBench"),
    ),
}
COMMITS = {  # of the official script that a scorer or variant follows
    "official": "RUCAIBox/POPE@3df3ba1",
    "opera": "shikiw/OPERA@61426ef",
    "vcd": "DAMO-NLP-SG/VCD@d6568ff",
    "lmms": "lmms-eval 0.7.3",
    "vlmevalkit": "open-compass/VLMEvalKit@e8e78f0",
    "nltk": "shikiw/OPERA@61426ef",
    "pattern": "LisaAnne/Hallucination@6e4d33c",
}
PLAIN = {"unparsed", "length", "n", "failed"}  # everything else is a fraction


def scorer_of(settings: Mapping[str, Any], benchmark: str) -> str:
    """Which scorer judged a benchmark and the commit of its original, such as "official, RUCAIBox/POPE@3df3ba1"."""
    name = settings["scorer"] if benchmark == "pope" else settings["data"][benchmark].get("variant", benchmark)
    return f"{name}, {COMMITS[name]}" if name in COMMITS else name
