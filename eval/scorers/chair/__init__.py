"""CHAIR: objects that captions mention although they are not in the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.answers import Keys, Tell
from vlm_fix.eval.scorers.benchmark import KEYS, Argument, Benchmark, Captions, Gain, Layout, Mark, variant_option
from vlm_fix.eval.scorers.choices import Variant

from . import data as files
from . import score, words


def results(
    captions: str,
    variant: Variant | None = None,
    drop_incomplete: bool = False,
    ground_truth: str | None = None,
    answer_key: str | None = None,
    id_key: str | None = None,
    tell: Tell = str,
) -> dict[str, dict[str, score.ChairResult]]:
    """Score a caption file, in the order of the images' ids."""
    variant = variant or "nltk"
    truth = files.ground_truth(ground_truth or "coco", variant)
    found = files.load_captions(captions, Keys(answer_key, id_key), tell)
    if drop_incomplete:
        found = [caption._replace(text=files.whole_sentences(caption.text)) for caption in found]
    return {"chair": {"captions": score.score(sorted(found, key=lambda c: c.image_id), truth, variant)}}


def _caption(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    how = " (works without NLTK data)" if data["variant"] == "pattern" else ""
    text = f"CHAIR: {data['source']}; {counted(data['images'], 'caption')}; variant {data['variant']}{how}"
    text += f"; {data['captions']}" if "captions" in data else ""
    return text + "; lower C_S and C_I are better, lower recall is not"


def readable_variant(data: Mapping[str, Any]) -> Variant:
    """Return how a run read its captions, or `pattern` if NLTK's data are not installed here."""
    return "pattern" if "pattern" in data["variant"] or not words.nltk_ready() else "nltk"


def mark(row: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[list[Mark], int]:
    """Mark every object word of an answer in samples.jsonl, and count the hallucinated ones."""
    caption, truth = score.Caption(0, row["answer"]), {0: row["ground_truth"]}
    (scored,) = score.score([caption], truth, readable_variant(data)).captions
    marks = [Mark(o.start, o.end, o.node, True, "in the image") for o in scored.correct]
    marks += [Mark(o.start, o.end, o.node, False, "not there") for o in scored.hallucinated]
    return marks, len(scored.hallucinated)


BENCHMARK = Benchmark(
    name="chair",
    title="CHAIR",
    source_commit=words.COMMITS["nltk"],
    commits=words.COMMITS,
    score_what="score captions with CHAIR",
    arguments=(
        Argument(
            "captions", {"metavar": "CAPTIONS", "help": "image_id, caption; see docs/benchmarks.md for all layouts"}
        ),
        variant_option(),
        Argument("--drop-incomplete", {"action": "store_true", "help": "drop a cut-off last sentence first"}),
        Argument(
            "--ground-truth",
            {"metavar": "FILE", "help": "objects per image; COCO train+val2014 is in the package"},
        ),
        *KEYS,
    ),
    results=results,
    shown=lambda found: found["chair"]["captions"],
    answers="captions",
    layouts={
        "chair": Layout(
            columns={"chair_s": "C_S", "chair_i": "C_I", "recall": "recall", "f1": "F1", "length": "length"},
            metrics=score.METRICS,
            compared=("chair_s", "chair_i", "recall"),
            right=lambda row: not row["hallucinating"],
            caption=_caption,
            answers=Captions(
                mark,
                "recall",
                "chair_i",
                "CHAIR_i",
                drawn=True,
                at_equal_length=score.at_equal_length,
                at_share=score.at_share,
            ),
            leaderboard={"chair_i": "CHAIR_i ↓", "recall": "recall", "length": "words"},
            gain=Gain("chair_i", -1, "CHAIR_i, points fewer"),
        )
    },
)
