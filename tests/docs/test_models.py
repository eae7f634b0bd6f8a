"""docs/models.md and `vlm-fix models` say what the tests' record says."""

from __future__ import annotations

from pathlib import Path

from vlm_fix import cli
from vlm_fix.eval.report import models_page
from vlm_fix.families import FAMILIES, REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_page_is_what_the_record_makes_of_it():
    assert PAGE.read_text() == models_page.page(), "make docs"


def test_every_family_and_every_kind_is_on_the_page():
    text = PAGE.read_text()
    assert all(f"Family `{f.name}` of the table" in text for f in FAMILIES)
    assert all(f"- `{kind}`: " in text for kind in REFUSED)
    kinds = models_page.kind_of_methods()
    assert set(kinds.values()) == {*models_page.KINDS, ""} and [m for m, kind in kinds.items() if not kind] == [
        "baseline"
    ]
    assert kinds["random_heads"] == "heads" and kinds["random_tokens"] == "before" and kinds["knorm"] == "cache"


def test_counts_and_reasons():
    assert models_page.shown(3, 3) == "all 3" and models_page.shown(0, 3) == "–" and models_page.shown(2, 3) == "2 of 3"
    assert all(works == total for works, total in models_page.counts("llava").values())
    hybrid = models_page.counts("qwen3_5")
    assert hybrid["cache"][0] == hybrid["layers"][0] == 0 < hybrid["attention"][0]
    assert any(
        "linear attention" in why and "fastv" in methods for why, methods in models_page.reasons("qwen3_5").items()
    )


def test_the_command_tells_more_of_a_model(capsys):
    assert cli.main(["models", "qwen3_5"]) == 0
    told = capsys.readouterr().out
    assert "fastv" in told and "linear attention" in told and max(map(len, told.splitlines())) <= 100
    assert cli.main(["models", "no-such-model"]) == 2
    assert "there is no model 'no-such-model'" in capsys.readouterr().err
