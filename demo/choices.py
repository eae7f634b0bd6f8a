"""What can be chosen in the page: methods by kind with a line each, and presets of three panes."""

from __future__ import annotations

import html
import inspect
from collections.abc import Sequence

from vlm_fix import Method, list_methods
from vlm_fix.method import Baseline
from vlm_fix.registry import parse

START = (["vcd"], ["vhr"], ["hiprune"])  # what the panes begin with
KINDS = {
    "attention": "edit attention scores or weights",
    "heads": "scale single attention heads",
    "hidden": "edit hidden states",
    "contrast": "hold the answer against that of a second, spoilt run",
    "logits": "hold layers against each other",
    "pruning": "let fewer image tokens through",
    "procedure": "answer in several passes",
    "control": "know nothing: what a method has to beat",
}
PRESETS: dict[str, Sequence[Sequence[str]]] = {
    "One of each kind": START,
    "Look at the image more": (["pai"], ["vaf"], ["hgai:alpha=2.0"]),
    "Contrast with a spoilt image": (["vcd"], ["m3id"], ["icd"]),
    "Layers against each other": (["dola"], ["deco"], ["only"]),
    "Half of the image tokens": (["hiprune:keep=0.5"], ["divprune:keep=0.5"], ["fastv:keep=0.5"]),
    "Two at once": (["vcd", "vhr"], ["pai", "hiprune"], ["hgai", "deco"]),
    "Controls: do they do as well?": (["random_heads"], ["gaussian_logits"], ["yes_bias"]),
}
RECOMMENDED = "Recommended for this model"
WIDEST = 96  # characters of a method's line


def presets(recommended: Sequence[Method] = ()) -> dict[str, Sequence[Sequence[Method]]]:
    """Name -> a stack for each pane; first of all what `vlm-fix recommend` found, if that is given."""
    made: dict[str, Sequence[Sequence[Method]]] = {}
    if recommended:
        made[RECOMMENDED] = [recommended, *(parse(list(stack)) for stack in START[1:])]
    return made | {name: [parse(list(stack)) for stack in stacks] for name, stacks in PRESETS.items()}


def line(cls: type[Method]) -> str:
    """What a method does, in a line: the first sentence of its docstring."""
    first = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return first if len(first) <= WIDEST else first[:WIDEST].rpartition(" ")[0].rstrip(",;:") + " …"


def by_kind() -> dict[str, list[type[Method]]]:
    """Kind -> its methods, in the order of KINDS; kinds of others after these."""
    known = [cls for cls in list_methods() if cls is not Baseline]
    kinds = dict.fromkeys([*KINDS, *(cls.kind for cls in known)])
    return {kind: found for kind in kinds if (found := [cls for cls in known if cls.kind == kind])}


def method_choices() -> list[tuple[str, str]]:
    """(label, name) of every method, by kind; the label has the name on a line of its own, and its kind and line below."""
    return [(f"{cls.name}\n{kind}: {line(cls)}", cls.name) for kind, found in by_kind().items() for cls in found]


def listed() -> list[str]:
    """The names, in the order of `method_choices` and of the catalogue."""
    return [name for _, name in method_choices()]


def catalogue(panes: int) -> str:
    """All methods as HTML, by kind, each with a button for every pane that it can be put into."""
    number, made = 0, []
    for kind, found in by_kind().items():
        rows = []
        for cls in found:
            buttons = "".join(
                f'<button type="button" data-method="{number}" data-pane="{i}" '
                f'aria-label="{html.escape(cls.name)} into pane {i}">{i}</button>'
                for i in range(1, panes + 1)
            )
            rows.append(
                f"<li><span>{buttons}</span><div><b>{html.escape(cls.name)}</b> {html.escape(line(cls))}</div></li>"
            )
            number += 1
        about = html.escape(KINDS.get(kind, ""))
        made.append(
            f"<details><summary><b>{html.escape(kind)}</b> {len(found)} <i>{about}</i></summary>"
            f"<ul>{''.join(rows)}</ul></details>"
        )
    return f'<div class="catalogue">{"".join(made)}</div>'
