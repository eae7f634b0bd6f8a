"""Answers side by side, with the words that a scorer counted marked, for the report page.

Captions of CHAIR and AMBER have every object word marked by the rules of their scorer, as in the image or not there;
answers to yes/no questions are marked as right or wrong by theirs. Shown are answers that differ between the runs, with
the image, as far as the data of the run are still where they were. VlmFixErrors of that are no errors here.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import hallusion, mme, yesno
from vlm_fix.eval.scorers.amber import data as amber_data
from vlm_fix.eval.scorers.amber import score as amber
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.chair.words import Object, Variant, nltk_ready

from .svg import text_of

THUMB = 224  # pixels
VERDICTS = {
    "pope": yesno.verdict,
    "amber-qa": amber.verdict,
    "mme": mme.verdict,
    "hallusion": hallusion.verdict,
}


def samples(folder: Path, results: Mapping[str, Any], limit: int) -> str:
    """Captions and questions on which the runs differ most, side by side."""
    file = folder / "samples.jsonl"
    if not file.is_file() or limit < 1:
        return ""
    asked: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        asked.setdefault((row["benchmark"], row["id"]), {}).setdefault(row["run"], row)  # the first seed
    parts, images = [], _images(results)
    for benchmark in results["settings"]["data"]:
        captions = {"chair": _chair, "amber": _amber}.get(benchmark)
        judged = []
        for (kind, key), rows in asked.items():
            if kind == benchmark and len(rows) > 1:
                shown = {run: _judged(row, results, captions or _answer) for run, row in rows.items()}
                spread = [wrong for _, wrong in shown.values()]
                judged.append((max(spread) - min(spread), key, rows, shown))
        judged = sorted((j for j in judged if j[0] > 0), key=lambda j: (-j[0], j[1]))
        # of captions those that differ most; questions differ or not, so of these every so many, over all tasks
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


def _judged(
    row: Mapping[str, Any], results: Mapping[str, Any], judge: Callable[..., tuple[str, int]]
) -> tuple[str, int]:
    """(HTML of an answer, what is wrong with it); a failed one says so."""
    if row["answer"] is not None:
        return judge(row, results)
    return f'<mark class="bad">failed: {text_of(row["error"])}</mark>', 0 if judge is not _answer else 1


def _truth(row: Mapping[str, Any]) -> str:
    if "label" in row:
        return f"the right answer: {row['label']}"
    there = f"in the image: {', '.join(row['ground_truth']) or 'none of the objects'}"
    return there + (f"; typical of it and not there: {', '.join(row['hallu'])}" if row.get("hallu") else "")


def _chair(row: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str, int]:
    """(HTML of a caption with its object words marked, number of hallucinated mentions)."""
    variant = _variant(results["settings"]["data"]["chair"])
    scored = chair.score([chair.Caption(0, row["answer"])], {0: row["ground_truth"]}, variant).captions[0]
    marks = [(o, "good", "in the image") for o in scored.correct] + [
        (o, "bad", "not there") for o in scored.hallucinated
    ]
    return _marked(scored.caption, marks), len(scored.hallucinated)


def _amber(row: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str, int]:
    """The same by AMBER's rules; words that are never judged stay unmarked."""
    data = results["settings"]["data"]["amber"]
    words = _lexicon(data["variant"].split(",")[0], _variant(data))
    scene = amber_data.Scene(0, "", tuple(row["ground_truth"]), tuple(row["hallu"]))
    marks, wrong = [], 0
    for noun, fits, imagined, hallucinated in amber.mentions(row["answer"], scene, words):
        if hallucinated:
            marks.append((noun, "bad", "typical, but not there" if imagined else "not there"))
        elif fits is not None:
            marks.append((noun, "good", f"in the image, as {scene.truth[fits]}"))
        wrong += hallucinated
    return _marked(row["answer"], marks), wrong


@cache
def _lexicon(scorer: Any, variant: Variant) -> amber_data.Lexicon:
    return amber_data.picto_lexicon(variant) if scorer == "picto" else amber_data.lexicon(scorer, variant)


def _variant(data: Mapping[str, Any]) -> Variant:
    """How the run read captions, as far as this machine has what that needs."""
    return "pattern" if "pattern" in data["variant"] or not nltk_ready() else "nltk"


def _marked(text: str, marks: Sequence[tuple[Object, str, str]]) -> str:
    pieces, at = [], 0
    for item, kind, told in sorted(marks, key=lambda mark: mark[0].start):
        word = text_of(text[item.start : item.end])
        pieces.append(
            f'{text_of(text[at : item.start])}<mark class="{kind}" title="{text_of(item.node)}: {told}">{word}</mark>'
        )
        at = item.end
    return "".join([*pieces, text_of(text[at:])])


def _answer(row: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str, int]:
    """(HTML of a yes/no answer, 1 if it is wrong)."""
    settings, benchmark = results["settings"], row["benchmark"]
    scorer = settings["scorer"] if benchmark == "pope" else settings["data"][benchmark]["variant"].split(",")[0]
    wrong = VERDICTS[benchmark](row["answer"], row["label"], scorer) != row["label"]
    kind, told, sign = ("bad", "wrong", "✗") if wrong else ("good", "right", "✓")
    return f'<mark class="{kind}" title="{told}">{sign} {text_of(row["answer"])}</mark>', int(wrong)


def _images(results: Mapping[str, Any]) -> dict[str, str]:
    """File name -> <img> with the image inside, as far as the data of the run is still there."""
    from vlm_fix.eval import tasks
    from vlm_fix.eval.run.runner import Settings

    config = results["settings"]
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
    try:
        made = tasks.build(Settings(**given | {"model": config["model"]["name"], "data": config.get("source", "none")}))
    except VlmFixError:
        return {}
    return _Thumbnails({sample.file: sample for task in made for sample in task.samples})


class _Thumbnails(dict[str, str]):
    """Makes the <img> of a file when it is asked for: a page shows a dozen of a thousand."""

    def __init__(self, samples: Mapping[str, Any]) -> None:
        super().__init__()
        self.samples = samples

    def get(self, key: str, default: Any = "") -> Any:
        from vlm_fix.eval.tasks.sample import load_image

        if key not in self and key in self.samples:
            try:
                image = load_image(self.samples[key]).copy()
            except VlmFixError:
                return default
            image.thumbnail((THUMB, THUMB))
            packed = io.BytesIO()
            image.save(packed, "JPEG", quality=85)
            code = base64.b64encode(packed.getvalue()).decode()
            self[key] = f'<img alt="{text_of(key)}" src="data:image/jpeg;base64,{code}">'
        return super().get(key, default)
