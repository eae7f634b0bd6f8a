"""The table with which docs/methods.md opens: every method in a row, sortable on the site."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlm_fix.method import Method

from . import measured, models_page

MODELS = ("picto-llava", "picto-smol")
SHOWN = {"adversarial": "POPE", "CHAIR_i": "CHAIR_i"}  # headings of `measured` -> words of a cell
GIVEN = ("file", "objects", "box", "points", "head_list")  # parameters that only a user can fill
NOTE = """One row a method: its cost in the words of the sections below; what it takes beside a model and a prompt; on how many of
{families} tiny models of true architectures it works ([which](models.md)); what its defaults change on the two bundled models,
POPE accuracy (adversarial) and CHAIR_i in points, bold where significant ([all figures](leaderboard.md)); and whether vLLM serves
it ([why not](serving.md)). On the site a click on a heading sorts."""


def lines(
    methods: Sequence[type[Method]], cost: Mapping[str, str], rows: Mapping[str, Sequence[measured.Row]]
) -> Iterator[str]:
    """The table of `methods` as lines of Markdown; `cost` and measured `rows` by their names."""
    families, served = models_page.record()["families"], served_by_vllm()
    yield f"| method | kind | cost | takes | families | {' | '.join(MODELS)} | vLLM |"
    yield "|" + "---|" * (6 + len(MODELS))
    for m in methods:
        refused = sum(about["cells"].get(m.name, {}).get("outcome") == "refused" for about in families.values())
        cells = (figures(rows.get(m.name, ()), m.name, model) for model in MODELS)
        yield (
            f"| [{m.name}](#{m.name}) | {m.kind} | {short(cost[m.name])} | {takes(m)} | {len(families) - refused} "
            f"| {' | '.join(cells)} | {served.get(m.name, 'no')} |"
        )


def short(cost: str) -> str:
    """The first two figures of a cost, as "1.00x, 1.00x"; "" for one that was not counted."""
    return ", ".join(re.findall(r"(?:prompt|later token) ([\d.]+x)", cost.partition("; with")[0]))


def takes(method: type[Method]) -> str:
    """What a user can bring: a calibration, or what a parameter without a default names."""
    found = ["calibration"] if method.calibrate is not Method.calibrate else []
    return ", ".join(found + [f.name for f in dataclasses.fields(method) if f.name in GIVEN])


def figures(rows: Sequence[measured.Row], spec: str, model: str) -> str:
    """What the greedy run of `spec` on a model changes, "POPE +1.0, CHAIR_i **-2.0**"."""
    for row in rows:
        if (row.model, row.spec) == (model, spec):
            if not row.acted:
                return "never acted"
            named = ((word, row.figures.get(heading)) for heading, word in SHOWN.items())
            return ", ".join(f"{word} {measured.points(f, '**', '**').partition(' ')[0]}" for word, f in named if f)
    return ""


def served_by_vllm(page: Path = Path("docs/serving.md")) -> dict[str, str]:
    """Method name -> yes or no, from the table that the serving tests make."""
    return dict(re.findall(r"^\| (\w+) \| \w+ \| (yes|no) \|", page.read_text(encoding="utf-8"), re.MULTILINE))
