"""Pages and figures made from result files: the numbers in them are those of the files."""

from __future__ import annotations

import json

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import curves


def scores(accuracy, chair_i, recall):
    pope = {split: {"accuracy": accuracy + d} for split, d in (("random", 0.1), ("popular", 0), ("adversarial", -0.1))}
    return {"pope": pope, "chair": {"captions": {"chair_i": chair_i, "recall": recall}}}


RESULTS = {
    "runs": {
        "baseline": scores(0.9, 0.05, 0.8),
        "hiprune:keep=32": scores(0.8, 0.1, 0.7),
        "hiprune:alpha=0.2,keep=8": scores(0.7, 0.3, 0.5),
        "random_tokens:keep=32": scores(0.75, 0.05, 0.75),
        "hiprune:keep=32+vcd": scores(0.1, 0.9, 0.1),
    }
}


def test_points_are_means_of_splits_in_percent():
    found = curves.points(RESULTS)
    assert set(found) == {"baseline", "hiprune", "random_tokens"}, "a stack is not a pruner's curve"
    assert found["hiprune"][8] == pytest.approx({"accuracy": 70, "chair_i": 30, "recall": 50})
    with pytest.raises(VlmFixError, match="keep=N"):
        curves.points({"runs": {"baseline": scores(0.9, 0.05, 0.8)}})


def test_table_marks_the_best_of_each_column(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- curves -->\nold\n<!-- /curves -->\nafter\n")
    curves.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `hiprune` | **80.0** | 10.0 | 70.0 | **70.0** | **30.0** | **50.0** |" in text
    assert "| `random_tokens` (control) | 75.0 | **5.0** | **75.0** |  |  |  |" in text
    assert (tmp_path / "images" / "pruning.png").read_bytes()[:4] == b"\x89PNG"
    page.write_text("no markers")
    with pytest.raises(VlmFixError, match="once each"):
        curves.write(tmp_path, page)
