"""Show answers side by side on the report page, with the words marked that the scorer counted.

In captions every object word is marked as being in the image or not, in answers to yes/no questions the whole answer as
right or wrong, both by the rules of the scorer. Answers that differ between the runs are shown, with their image if the
data of the run are still in place.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.scorers.benchmark import Captions, Mark
from vlm_fix.eval.scorers.registry import LAYOUTS, scorer_of
from vlm_fix.eval.settings import Settings

from .svg import text_of

THUMB = 224  # pixels


def samples(folder: Path, results: Mapping[str, Any], limit: int) -> str:
    """Return the HTML of the captions and questions on which the runs differ most."""
    file = folder / "samples.jsonl"
    if not file.is_file() or limit < 1:
        return ""
    asked: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, filter(None, file.read_text(encoding="utf-8").split("\n"))):
        asked.setdefault((row["benchmark"], row["id"]), {}).setdefault(row["run"], row)  # the first seed
    parts, images = [], _images(results)
    for benchmark in results["settings"]["data"]:
        captions = isinstance(LAYOUTS[benchmark].answers, Captions)
        judged = []
        for (kind, key), rows in asked.items():
            if kind == benchmark and len(rows) > 1:
                shown = {run: _judged(row, results) for run, row in rows.items()}
                spread = [
                    wrong for run, (_, wrong) in shown.items() if rows[run]["answer"] is not None or not captions
                ] or [0]
                judged.append((max(spread) - min(spread), key, rows, shown))
        judged = sorted((j for j in judged if j[0] > 0), key=lambda j: (-j[0], j[1]))
        # the captions that differ most; questions differ or not, so take every k-th of them, to cover all parts
        chosen = judged[:: 1 if captions else max(1, len(judged) // limit)][:limit]
        if judged:
            title = (
                "Captions with the widest spread of hallucinated words between" if captions else "Questions that divide"
            )
            parts.append(
                f'<h3>{title} the runs</h3><p class="soft">{len(chosen)} of {len(judged)}, chosen because they differ: not a '
                "fair sample of the answers.</p>"
            )
        for _, _, rows, shown in chosen:
            first = next(iter(rows.values()))
            answers = "".join(
                f"<div><code>{text_of(run)}</code><p>{text}</p></div>" for run, (text, _) in shown.items()
            )
            parts.append(
                f'<div class="sample">{images.get(first["image"], "")}<p><b>{text_of(first["prompt"])}</b><br>'
                f"<small>{text_of(first['image'])}; {text_of(_truth(first))}</small></p>"
                f'<div class="answers">{answers}</div></div>'
            )
    return "".join(parts)


def _judged(row: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str, int]:
    """Return the HTML of an answer, and how much is wrong with it: hallucinated mentions, or 1 for a wrong answer."""
    answers, settings = LAYOUTS[row["benchmark"]].answers, results["settings"]
    if row["answer"] is None:
        return f'<mark class="bad">failed: {text_of(row["error"])}</mark>', int(not isinstance(answers, Captions))
    if isinstance(answers, Captions):
        marks, wrong = answers.mark(row, settings["data"][row["benchmark"]])
        return _marked(row["answer"], marks), wrong
    scorer: Any = scorer_of(settings, row["benchmark"]).split(",")[0]
    wrong = int(answers.verdict(row["answer"], row["label"], scorer) != row["label"])
    kind, told, sign = ("bad", "wrong", "✗") if wrong else ("good", "right", "✓")
    return f'<mark class="{kind}" title="{told}">{sign} {text_of(row["answer"])}</mark>', wrong


def _truth(row: Mapping[str, Any]) -> str:
    if "label" in row:
        return f"the right answer: {row['label']}"
    there = f"in the image: {', '.join(row['ground_truth']) or 'none of the objects'}"
    return there + (f"; typical of it and not there: {', '.join(row['hallu'])}" if row.get("hallu") else "")


def _marked(text: str, marks: Sequence[Mark]) -> str:
    pieces, at = [], 0
    for mark in sorted(marks, key=lambda mark: mark.start):
        kind, word = "good" if mark.right else "bad", text_of(text[mark.start : mark.end])
        pieces.append(text_of(text[at : mark.start]))
        pieces.append(f'<mark class="{kind}" title="{text_of(mark.node)}: {text_of(mark.reason)}">{word}</mark>')
        at = mark.end
    return "".join([*pieces, text_of(text[at:])])


def _images(results: Mapping[str, Any]) -> dict[str, str]:
    """Return file name -> <img> with the embedded image; empty if the data of the run are no longer there."""
    config = results["settings"]
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
    try:
        made = tasks.build(Settings(**given | {"model": config["model"]["name"], "data": config.get("source", "none")}))
    except VlmFixError:
        return {}
    return _Thumbnails({sample.file: sample for task in made for sample in task.samples})


class _Thumbnails(dict[str, str]):
    """Creates the <img> of a file on demand, as a page shows a dozen images out of a thousand."""

    def __init__(self, samples: Mapping[str, Any]) -> None:
        super().__init__()
        self.samples = samples

    def get(self, key: str, default: Any = "") -> Any:
        if key not in self and key in self.samples:
            try:
                image = tasks.load_image(self.samples[key]).copy()
            except VlmFixError:
                return default
            image.thumbnail((THUMB, THUMB))
            packed = io.BytesIO()
            image.save(packed, "JPEG", quality=85)
            code = base64.b64encode(packed.getvalue()).decode()
            self[key] = f'<img alt="{text_of(key)}" src="data:image/jpeg;base64,{code}">'
        return super().get(key, default)
