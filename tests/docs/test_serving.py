"""docs/serving.md says of every method whether it is served, as the tests and the refusals have it."""

from __future__ import annotations

from pathlib import Path

from tests.serving.table import refused, specs_of, written
from vlm_fix.registry import list_methods

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_table_is_the_one_that_the_tests_make():
    page = PAGE.read_text()
    assert page == written(page), "run python -m tests.serving.table docs/serving.md"


def test_every_method_is_tested_or_refused_by_name():
    names = {method.name for method in list_methods()} - {"baseline"}
    assert not names - specs_of().keys() - refused().keys()
    assert all(":" in specs_of()[name] for name in specs_of().keys() & refused().keys()), "as it comes it is refused"
    assert all(refused().values())
