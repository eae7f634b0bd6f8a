"""Generate docs/models.md from the record that the tests keep of every method on every family.

`python -m vlm_fix.eval.report.models_page docs/models.md` (or `make docs`) writes the page from
`vlm_fix/families/record.json`; `make record` walks the product of methods and families and writes that file again.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from vlm_fix.attention.edits import HeadEdit
from vlm_fix.eval.files import write_atomic
from vlm_fix.families import FAMILIES, REFUSED
from vlm_fix.pruning.kinds import LayerPruner, TokenPruner
from vlm_fix.registry import list_methods

KINDS = {
    "attention": "attention",
    "heads": "heads",
    "hidden": "hidden",
    "contrast": "contrast",
    "logits": "logits",
    "before": "pruned before",
    "layers": "in layers",
    "cache": "in cache",
    "procedure": "procedures",
}
HEAD = """# Models

Made by `make docs` from the record that the tests keep: do not edit.

Each row is a tiny model of the true architecture with random weights, and a padded batch of one and two images. A cell says
how many methods of a kind answer there with finite scores, act, and leave the model bit for bit as it was after `unwrap`;
every other method is refused, in one sentence, before the first token. `tests/families` walks this product, and on every
row holds attention edits against float64 loops, batches against their rows, second branches against the model itself, and
neutral settings against the unwrapped model. Real weights behind these architectures were not run, but for the bundled
picto-llava and picto-smol. Controls are counted with their kind.
"""


@functools.cache
def record() -> dict[str, Any]:
    """The record: `methods`, and by tiny model its `family`, `decoder`, and `cells` for methods that do not simply work."""
    return json.loads(resources.files("vlm_fix.families").joinpath("record.json").read_text())


@functools.cache
def kind_of_methods() -> dict[str, str]:
    """Method name -> a key of KINDS, "" for the baseline; controls stand with what they change."""
    found = {}
    for method in list_methods():
        if issubclass(method, TokenPruner):
            found[method.name] = "before"
        elif issubclass(method, LayerPruner):
            found[method.name] = "layers"
        else:
            kind = _base_kind(method) if method.kind == "control" else method.kind
            found[method.name] = {"pruning": "cache"}.get(kind, kind if kind in KINDS else "")
    return found


def _base_kind(method: Any) -> str:
    """The kind of the class that a control derives from."""
    if issubclass(method, HeadEdit):
        return "heads"
    return next((c.kind for c in method.__mro__[1:] if getattr(c, "kind", "") in (*KINDS, "pruning")), "")


def counts(name: str) -> dict[str, tuple[int, int]]:
    """By kind, how many methods work on a tiny model, and how many there are."""
    cells, found = record()["families"][name]["cells"], dict.fromkeys(KINDS, (0, 0))
    for method in record()["methods"]:
        if kind := kind_of_methods()[method]:
            works, total = found[kind]
            found[kind] = works + (cells.get(method, {}).get("outcome") != "refused"), total + 1
    return found


def shown(works: int, total: int) -> str:
    """ "all 12", "9 of 12" or "–"."""
    return f"all {total}" if works == total else f"{works} of {total}" if works else "–"


def reasons(name: str) -> dict[str, list[str]]:
    """Sentences that do not name the method -> the methods that are refused with them."""
    found: dict[str, list[str]] = {}
    for method, cell in record()["families"][name]["cells"].items():
        why = cell["why"]
        for start in (f"{method}: ", f"{method}'s ", f"{method} "):
            why = why.removeprefix(start)
        if cell["outcome"] == "refused":
            found.setdefault(why, []).append(method)
    return found


def page() -> str:
    """Return the whole page as Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    names = record()["families"]
    yield HEAD
    yield f"| model | decoder | {' | '.join(KINDS.values())} |"
    yield f"|---|---|{'---|' * len(KINDS)}"
    for name, about in names.items():
        yield f"| [{name}](#{name}) | {about['decoder']} | {' | '.join(shown(*c) for c in counts(name).values())} |"
    yield "\n## What is refused, and why"
    for name, about in names.items():
        types = next(f.model_types for f in FAMILIES if f.name == about["family"])
        yield f"\n### {name}\n\nFamily `{about['family']}` of the table (`model_type` {', '.join(f'`{t}`' for t in types)}).\n"
        for why, methods in reasons(name).items():
            yield f"- {', '.join(f'`{m}`' for m in methods)}: {why}"
        if not reasons(name):
            yield "- nothing"
    yield "\n## Models that are refused\n"
    yield from (f"- `{kind}`: {why}." for kind, why in REFUSED.items())
    yield ""


def main() -> None:
    """Run the program; the module docstring describes its arguments."""
    write_atomic(Path(sys.argv[1]), page())


if __name__ == "__main__":
    main()
