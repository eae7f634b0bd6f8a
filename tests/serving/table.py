"""What is served, from the specs that tests hold against generate: `python -m tests.serving.table docs/serving.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.serving.cases import PRUNERS, SERVED, names
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.picto import model_path
from vlm_fix.registry import list_methods
from vlm_fix.serving.plugin import planned
from vlm_fix.serving.refusals import reason
from vlm_fix.serving.settings import Settings

BEGIN, END = "<!-- served -->\n", "<!-- /served -->\n"


def specs_of() -> dict[str, str]:
    """Method -> the spec that a test holds against generate."""
    singles = [spec for specs in (*SERVED.values(), PRUNERS) for spec in specs if "+" not in spec]
    found: dict[str, str] = {}
    for spec in singles:
        found.setdefault(names(spec)[0], spec)
    return found


def refused() -> dict[str, str]:
    """Method -> why a server with it, as it comes, does not start, for picto-llava."""
    found = {}
    for method in list_methods():
        try:
            planned(Settings((method.name,)), str(model_path()), None, False)
        except VlmFixError as error:
            said = str(error).partition("by vLLM: ")[2].removesuffix(". It runs with vlm_fix.wrap and generate.")
            why = said or reason(method(), planned(Settings(("baseline",)), str(model_path()), None, False))
            if why:  # else it asks for settings of its own
                found[method.name] = why
    return found


def table() -> str:
    spec_of, why = specs_of(), refused()
    rows = ["| method | kind | served | tested as, or why not |", "|---|---|---|---|"]
    for method in list_methods():
        if method.name in spec_of:
            spec = spec_of[method.name].replace("|", r"\|")
            but = f"; with its own settings not: {why[method.name]}" if method.name in why else ""
            rows.append(f"| {method.name} | {method.kind} | yes | `{spec}`{but} |")
        elif method.name in why:
            rows.append(f"| {method.name} | {method.kind} | no | {why[method.name]} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(written(file.read_text()))
