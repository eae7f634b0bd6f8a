"""docs/architecture.md and its figure name what the code has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from vlm_fix.wing import Wing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figure():
    spec = importlib.util.spec_from_file_location("figure", ROOT / "docs" / "figures" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_of_the_figure_is_in_the_code(figure):
    call, forward = figure.steps(figure.engine.generate), figure.steps(figure.forwards.Forwards._entered)
    assert {*call, *forward} == set(figure.WORDS), "a step was renamed: mend WORDS and draw the figure again"
    assert call.index("engine.refuse") < call.index("wing.around_generate") < call.index("engine.plain_generate")


def test_the_core_has_floors(figure):
    floors = figure.floors(figure.imports())
    level = {part: n for n, parts in enumerate(floors) for part in parts}
    assert level["errors"] < level["wing"] < level["attention"] < level["engine"] < level["wrapping"]
    graph = figure.imports()
    assert all(level[used] < level[part] for part in graph for used in graph[part]), (
        "parts of the core import each other"
    )


def test_the_page_names_all_parts_and_all_calls_of_a_wing(figure):
    page = (ROOT / "docs" / "architecture.md").read_text()
    parts = page.partition("## The parts")[2].partition("## One call")[0]
    assert not {p for p in figure.imports() if f"`{p}`" not in parts and f"`{p}/`" not in parts}
    asked = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    assert asked == {"claim", *figure.HOOKS} and all(hasattr(Wing, name) for name in asked)
