"""The page of a search: the verdict, the proof, hallucination against recall and speed, examples, every candidate.

One self-contained file that loads nothing and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.files import write_atomic
from vlm_fix.eval.report.shell import head
from vlm_fix.eval.report.svg import text_of

from .figures import columns
from .plot import Dot, scatter
from .search import BASELINE

NAMED, SHOWN, THUMB = 9, 6, 224  # labels in a figure; examples of each kind; pixels of an image
MATCHED = {
    "captions_matched": "CHAIR_i, points fewer at equal length",
    "questions_matched": "balanced accuracy, points more at equal caution",
}
OWN = """
:root{--win:#0b6b3a;--mark:#0061a8}@media (prefers-color-scheme:dark){:root{--win:#6fd3a0;--mark:#7cc0f5}}
.verdict{border-left:6px solid var(--soft);background:var(--card);border-radius:0 8px 8px 0;padding:1rem 1.25rem;margin:1.5rem 0}
.verdict.better{border-color:var(--win)}.verdict p{margin:.2rem 0}
.verdict b{font-size:1.35em;line-height:1.3;overflow-wrap:anywhere}
.verdict code{font-weight:inherit}svg .title{font-weight:600;font-size:13px}
.bars svg{width:100%;height:auto;max-width:640px}
.proofs td:first-child{white-space:normal;text-align:left}.why.why{white-space:normal;min-width:15em;text-align:left}
.proofs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1.5rem}h3 code{overflow-wrap:anywhere}
pre{background:var(--card);padding:.8rem 1rem;border-radius:8px;overflow-x:auto}tr.in td{font-weight:600}
details{margin:1rem 0}summary{cursor:pointer}
"""


def write(report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Write OUT.html and OUT.json beside OUT.yaml, and return their paths."""
    page, figures = out.with_suffix(".html"), out.with_suffix(".json")
    write_atomic(figures, json.dumps(report, indent=1) + "\n")
    write_atomic(page, html(report, examples, out.name))
    return [page, figures]


def html(report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], name: str) -> str:
    """The whole page; `name` is the file of the recommendation."""
    model = Path(str(report["model"].get("name", "the model"))).name
    parts = [
        f"<h1>What makes {text_of(model)} hallucinate less?</h1>",
        _verdict(report, name),
        _proofs(report),
        f"<h2>What there is to choose from</h2>{_about_figures(report)}<div class='figures'>{''.join(_figures(report))}</div>",
        _examples(report, examples),
        _table(report),
        _how(report),
    ]
    return f"{head(f'vlm-fix recommend: {text_of(model)}', OWN)}<body>{''.join(parts)}</body></html>\n"


def _verdict(report: Mapping[str, Any], name: str) -> str:
    data, minutes = report["data"], report["seconds"] / 60
    said = str(report["verdict"])
    head, _, rest = said.partition(" (") if not report["better"] else (said, "", "")
    head = f"{head}." if report["better"] else _sentence(head)
    reason = f"<p>{text_of(rest[:-1])}.</p>" if rest else ""
    use = ""
    if report["better"]:
        use = f'<pre>vlm_fix.wrap(model, "{text_of(name)}")\nvlm-fix serve MODEL --method @{text_of(name)}</pre>'
    return (
        f'<div class="verdict{" better" if report["better"] else ""}"><p><b>{text_of(head)}</b></p>{reason}</div>{use}'
        f'<p class="soft">{text_of(data["source"])}: {data["search"]} images to search on, {data["proof"]} to prove on; '
        f"{minutes:.0f} of {report['budget'] / 60:.0f} minutes. {text_of(_sentence(report['objective']))}</p>"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


# --------------------------------------------------------------------------------------------------------------- proof


def _proofs(report: Mapping[str, Any]) -> str:
    if not report["proofs"]:
        return ""
    shown = "".join(_proof(proof, report) for proof in report["proofs"])
    few = "the two best of the search" if len(report["proofs"]) > 1 else "the best of the search"
    level = 100 * report["proofs"][0]["level"]
    return (
        f"<h2>Proof on images it had not seen</h2><p>Measured once, for {few}. Intervals are at {level:g} %, so that "
        "the chance of even one false claim is at most 5 %; constraints are judged by their estimates.</p>"
        f'<div class="proofs">{shown}</div>'
    )


def _proof(proof: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    named = columns(["captions", "questions"]) | MATCHED
    rows = []
    for name, change in proof["changes"].items():
        sides = (f"{change[side]:.1f}" if side in change else "" for side in ("base", "method"))
        interval = f"{change['change']:+.1f} <small>[{change['low']:.1f}, {change['high']:.1f}]</small>"
        rows.append(
            f"<tr><td>{text_of(named[name])}</td>{''.join(f'<td>{side}</td>' for side in sides)}<td>{interval}</td></tr>"
        )
    rows.append(f"<tr><td>time an answer</td><td>1</td><td>{proof['slowdown']:.2f}</td><td></td></tr>")
    told = (
        "better"
        if proof["better"]
        else ("may be chance" if proof["gain"] > 0 else "no gain")
        if proof["low"] <= 0
        else "misses " + ", ".join(proof["missed"])
    )
    return (
        f"<div><h3><code>{text_of(proof['candidate'])}</code>: {told}</h3>{_bar(proof, report)}"
        f'<div class="scroll"><table><caption>{proof["images"]} images</caption><thead><tr><th></th><th>your model</th>'
        f"<th>with it</th><th>change</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _bar(proof: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The gain with its interval beside 0, on one scale for all proofs."""
    ends = [value for each in report["proofs"] for value in (each["low"], each["high"])]
    low, high = min([*ends, -1.0]), max([*ends, 1.0])

    def at(value: float) -> float:
        return 10 + (value - low) / (high - low) * 380

    colour = "var(--win)" if proof["better"] else "var(--soft)"
    said = f"{proof['gain']:+.1f} [{proof['low']:.1f}, {proof['high']:.1f}] points"
    return (
        f'<div class="bars"><svg viewBox="0 0 400 48" role="img" aria-label="gain {said}"><line x1="{at(0):.1f}" y1="14" '
        f'x2="{at(0):.1f}" y2="46" stroke="var(--soft)" stroke-dasharray="3 3"/><line x1="{at(proof["low"]):.1f}" y1="32" '
        f'x2="{at(proof["high"]):.1f}" y2="32" stroke="{colour}" stroke-width="3"/><circle cx="{at(proof["gain"]):.1f}" cy="32" '
        f'r="6" fill="{colour}"/><text x="{at(0):.1f}" y="10" class="soft" text-anchor="middle">no gain</text>'
        f'<text x="{min(max(at(proof["gain"]), 75), 325):.1f}" y="22" text-anchor="middle">{said}</text></svg></div>'
    )


# ------------------------------------------------------------------------------------------------------------- figures


def _about_figures(report: Mapping[str, Any]) -> str:
    return (
        "<p class='soft'>Changes against the model itself, of candidates as the search saw them; bars are two standard errors, "
        "the more images, the shorter. The best of many look better than they are; only the proof above is free of that. "
        "Grey: controls. Small dots were dropped early. The line joins what nothing else beats in both.</p>"
    )


def _figures(report: Mapping[str, Any]) -> list[str]:
    rows = [row for row in report["candidates"] if row["images"]]
    if not rows:
        return []
    proven = [proof["candidate"] for proof in report["proofs"]]
    best = sorted(rows, key=lambda row: (row["candidate"] not in proven, -row["images"], -row["score"]))[:NAMED]

    def dots(x: str, y: str) -> list[Dot]:
        made = []
        for row in rows:
            role = "control" if row["control"] else "proven" if row["candidate"] in proven else "candidate"
            role = "winner" if row["candidate"] == report["winner"] else role
            dx, dy = (2 * row["errors"].get(name, 0.0) for name in (x, y))
            at = _value(row, x), _value(row, y)
            made.append(Dot(row["candidate"], at[0], at[1], dx, dy, role, row in best))
        return made

    base = report["baseline"]
    figures = []
    if "chair_i" in base:
        title = "Fewer hallucinations, or only fewer words?"
        figures.append(
            scatter(
                dots("recall", "chair_i"),
                "caption recall, points",
                "CHAIR_i, points (lower is better)",
                title,
                (0, 0),
                (1, -1),
            )
        )
    if "accuracy" in base:
        title = "Better answers, or only another share of yes?"
        figures.append(
            scatter(
                dots("yes_ratio", "accuracy"), "yes-ratio, points", "balanced accuracy, points", title, (0, 0), (0, 1)
            )
        )
    title = "What does the gain cost?"
    figures.append(
        scatter(
            dots("slowdown", "gain"),
            "time an answer, your model = 1",
            "gain that counts, points",
            title,
            (1, 0),
            (-1, 1),
        )
    )
    return figures


def _value(row: Mapping[str, Any], name: str) -> float:
    return float(row[name] if name in row else row["changes"][name])


# ------------------------------------------------------------------------------------------------------------ examples


def _examples(report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    if not report["proofs"]:
        return ""
    proof = max(report["proofs"], key=lambda each: (each["candidate"] == report["winner"], each["gain"]))
    parts = [f"<h2>Answers that changed, with <code>{text_of(proof['candidate'])}</code></h2>"]
    for fixed, title in ((True, "Fixed"), (False, "Broken")):
        found = [each for each in examples if each["fixed"] is fixed]
        captions = [each for each in found if each["task"] == "chair"]
        chosen = [*captions[: SHOWN // 2], *[each for each in found if each["task"] != "chair"][:SHOWN]][:SHOWN]
        kinds = f"{len(captions)} captions and {len(found) - len(captions)} answers"
        parts.append(f"<h3>{title}: {kinds} on {proof['images']} images</h3>")
        parts += [_example(each) for each in chosen]
    return "".join(parts)


def _example(each: Mapping[str, Any]) -> str:
    sample = each["sample"]
    truth = (
        sample.reference.get("label") or ", ".join(sample.reference.get("ground_truth", ())) or "none of the objects"
    )
    what = "the right answer" if "label" in sample.reference else "in the image"
    sides = "".join(
        f"<div><b>{name}</b><p>{_marked(*each[side])}</p></div>"
        for name, side in (("your model", "base"), ("with the method", "method"))
    )
    return (
        f'<div class="sample">{_image(sample)}<p><b>{text_of(sample.prompt)}</b><br><small>{what}: {text_of(truth)}</small></p>'
        f'<div class="answers">{sides}</div></div>'
    )


def _marked(text: str | None, marks: Sequence[tuple[int, int, bool]]) -> str:
    if text is None:
        return '<mark class="bad">failed</mark>'
    pieces, at = [], 0
    for start, end, right in marks:
        told = ("good", "right") if right else ("bad", "wrong, or not there")
        pieces += [
            text_of(text[at:start]),
            f'<mark class="{told[0]}" title="{told[1]}">{text_of(text[start:end])}</mark>',
        ]
        at = end
    return "".join([*pieces, text_of(text[at:])])


def _image(sample: Any) -> str:
    try:
        picture = tasks.load_image(sample).copy()
    except VlmFixError:
        return ""
    picture.thumbnail((THUMB, THUMB))
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=85)
    return f'<img alt="{text_of(sample.file)}" src="data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}">'


# --------------------------------------------------------------------------------------------------------------- table


def _table(report: Mapping[str, Any]) -> str:
    named = {
        name: heading for name, heading in columns(["captions", "questions"]).items() if name in report["baseline"]
    }
    head = "".join(f"<th>{text_of(text)}</th>" for text in ("images", "gain", *named.values(), "time"))
    base = "".join(f"<td>{report['baseline'].get(name, 0):.1f}</td>" for name in named)
    rows = [
        f'<tr class="in"><td>your model</td><td>{report["baseline"]["images"]}</td><td></td>{base}<td>1</td><td></td></tr>'
    ]
    for row in report["candidates"]:
        if not row["images"]:
            continue
        changes = "".join(f"<td>{row['changes'][name]:+.1f}</td>" for name in named)
        name = text_of(row["candidate"]) + (" <small>control</small>" if row["control"] else "")
        why = row["out"] or ("control" if row["control"] else "in to the end")
        rows.append(
            f"<tr{'' if row['out'] else ' class=in'}><td><code>{name}</code></td><td>{row['images']}</td>"
            f"<td>{row['gain']:+.1f} <small>± {row['error']:.1f}</small></td>{changes}<td>{row['slowdown']:.2f}</td>"
            f'<td class="why">{text_of(why)}</td></tr>'
        )
    tried, untried = len(rows) - 1, [row["candidate"] for row in report["candidates"] if not row["images"]]
    rest = (
        f"<p class='soft'>Not tried in this budget: <code>{text_of(', '.join(untried))}</code></p>" if untried else ""
    )
    refused = "".join(
        f"<li><code>{text_of(name)}</code>: {text_of(why)}</li>" for name, why in report["refused"].items()
    )
    return (
        f"<h2>All {tried} candidates that were tried</h2><p class='soft'>Changes against the model itself on the same images, ± "
        "a standard error, in the search; bold: in to the end.</p>"
        f'<div class="scroll"><table><thead><tr><th>candidate</th>{head}<th>why it is out</th></tr></thead><tbody>{"".join(rows)}'
        f"</tbody></table></div>{rest}"
        + (
            f"<details><summary>Refused on this model: {len(report['refused'])}</summary><ul>{refused}</ul></details>"
            if refused
            else ""
        )
    )


def failures(report: Mapping[str, Any]) -> list[str]:
    """A sentence about the answers that were not made, if there are any."""
    failed = dict(report.get("failed", {}))
    told = [f"{count} of {'the model itself' if key == BASELINE else key}" for key, count in failed.items()]
    if not told:
        return []
    base = "; where the model itself has no answer, nothing can be told" if BASELINE in failed else ""
    return [f"answers that were not made (to questions they are wrong, captions are left out): {', '.join(told)}{base}"]


def _how(report: Mapping[str, Any]) -> str:
    model = report["model"]
    about = [
        f"{model.get('name')}, weights {str(model.get('weights'))[:23]}, {model.get('dtype')}; {report['hardware']}",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"seed {report['seed']}, data sha256 {report['data']['sha256'][:12]}, {report['date'][:10]}",
        *failures(report),
    ]
    command = f"<pre>{text_of(report['command'])}</pre>" if report["command"] else ""
    return f'<h2>How it was made</h2>{command}<p class="soft">{"<br>".join(map(text_of, about))}</p>'
