"""Pages and figures made from result files: the numbers in them are those of the files."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import pytest
import torch

import vlm_fix
from tests.support.paths import ROOT
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import bench
from vlm_fix.eval.report import curves, methods_page


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


def test_the_page_of_methods_says_what_the_classes_say():
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in vlm_fix.list_methods():
        if method.name != "baseline":
            assert f"### {method.name}\n" in page and inspect.cleandoc(method.__doc__) in page, "run `make docs`"


def test_counted_cost_and_verdict():
    model, inputs = bench.build(methods_page.TINY, torch.device("cpu"), torch.float32)
    rows = {spec: methods_page.count(model, inputs, spec, 2) for spec in ("baseline", "vcd", "hiprune:keep=9", "vhr")}
    assert rows["baseline"] == (47, 1, 1, 0)
    assert rows["vcd"] == (94, 2, 2, 0), "two branches, two images"
    assert rows["hiprune:keep=9"] == (20, 1, 1, 0), "27 of 36 image tokens never reach a layer"
    assert rows["vhr"] == (47 + 11, 1, 1, 0), "one pass over the prompt without its image"
    assert methods_page.count(model, inputs, "sgrs", 2)[3] > 0

    def delta(**values):
        named = {k: {"delta": v, "low": v, "high": v, "excludes_zero": True} for k, v in values.items()}
        return {"delta": named}

    both = {"pope": {"random": delta(accuracy=0.1)}, "chair": {"captions": delta(chair_i=0.2, recall=-0.1)}}
    row = methods_page.Row("m", both, "f")
    assert methods_page._verdict([row]) == "Better on POPE random; worse on CHAIR_i, caption recall."
    worse = methods_page.Row("m", {"pope": {"random": delta(accuracy=-0.1)}}, "f")
    assert methods_page._verdict([worse]).endswith("it does not help here.")
    still = replace(row, scores={}, acted=False)
    assert methods_page._verdict([still]) == "It never acted here: no answer changed."
    assert methods_page._verdict([still, replace(still, idle="no sink.")]) == "It never acted here: no sink."
    assert methods_page._verdict([still, worse]).endswith("it does not help here.")


def test_a_method_that_changed_no_answer_is_told_apart(tmp_path):
    said = {"var changed nothing in this call: no image token was a sink.": 9}
    content = {
        **RESULTS,
        "runs": {"var": scores(0.9, 0.05, 0.8), "vhr": scores(0.9, 0.05, 0.8)},
        "changed": {"var": {"answers": 40, "changed": 0}, "vhr": {"answers": 40, "changed": 1}},
        "warnings": {"var": said, "vhr": said},
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "results.json").write_text(json.dumps(content))
    found = methods_page.measured(tmp_path)
    assert methods_page._verdict(found["var"]) == "It never acted here: no image token was a sink."
    assert methods_page._verdict(found["vhr"]) == "Does not help here: no interval excludes zero."


def test_every_method_of_a_paper_says_what_is_published():
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in vlm_fix.list_methods():
        part = page.partition(f"### {method.name}\n")[2].partition("\n### ")[0]
        if method.kind != "control" and (method.paper or "Source:" in (method.__doc__ or "")):
            assert "| published |" in part or "\nPublished: " in part, method.name
    for name, option in (("var", "detector=secondary"), ("act", "sinks=secondary")):
        part = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert f"with `{option}` prompt 2.00x" in part
    assert methods_page._verdict([]) == "Does not help here: no interval excludes zero."
