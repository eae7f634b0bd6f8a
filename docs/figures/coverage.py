"""Write docs/coverage.md from docs/coverage.json and the registry: `python docs/figures/coverage.py`.

An entry names a system of the literature this project grew from, where it is, and what is to be said of it. `where` holds
methods, or functions of `vlm_fix`; without any, `note` says why.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import vlm_fix

DOCS = Path(__file__).parent.parent
HEAD = """# Coverage

Every training-free system of the project's seeds that works on a vision-language model or its decoder: where it is, or why
it has no place. Trained systems are named where they stand beside one. Written by `python docs/figures/coverage.py` from
`coverage.json`; a test holds it against the registry.
"""


def entries() -> list[dict]:
    return json.loads((DOCS / "coverage.json").read_text(encoding="utf-8"))


def page() -> str:
    """The text of docs/coverage.md."""
    methods, found, parts = {m.name: m for m in vlm_fix.list_methods()}, entries(), [HEAD]
    here = sum(bool(places(e, methods)) for e in found)
    parts.append(f"{here} of {len(found)} rows are here; {len(found) - here} are argued away.\n")
    for group, rows in groupby(found, key=lambda e: e["group"]):
        parts.append(f"\n## {group}\n\n| system | where | to be said |\n|---|---|---|\n")
        for e in rows:
            parts.append(f"| {e['system']} | {', '.join(places(e, methods)) or 'no'} | {note(e, methods)} |\n")
    return "".join(parts)


def places(entry: dict, methods: dict) -> list[str]:
    """Where the entry is, as links; names that are not registered are left out."""
    links = []
    for name in entry["where"]:
        if name in methods:
            paper = methods[name].paper
            links.append(f"[`{name}`]({paper})" if paper else f"`{name}`")
        elif name in vlm_fix.__all__:
            links.append(f"`vlm_fix.{name}`")
    return links


def note(entry: dict, methods: dict) -> str:
    """What is to be said, or that the method is not there yet."""
    if entry["where"] and not places(entry, methods):
        return f"to come as `{entry['where'][0]}`"
    return entry["note"].replace("|", "\\|")


if __name__ == "__main__":
    (DOCS / "coverage.md").write_text(page(), encoding="utf-8")
