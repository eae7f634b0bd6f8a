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
from vlm_fix.eval.report import curves, measured, methods_page


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


def test_no_two_curves_look_the_same(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    looks, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, **k: (looks.append((k["color"], k["marker"], k["label"])), plot(*a, **k))[1]
    )
    names = [f"method{i:02d}" for i in range(45)]
    curves.figure(
        {"runs": RESULTS["runs"] | {f"{n}:keep={k}": scores(0.8, 0.1, 0.7) for n in names for k in (8, 32)}},
        tmp_path / "drawn.png",
    )
    assert len(looks) == 3 * (45 + 2) and len({look[:2] for look in looks}) == len({look[2] for look in looks}) == 47


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
    assert rows["vhr"] == (47 + 6, 1, 1, 0), "the rows after the image once more, without it"
    assert methods_page.count(model, inputs, "sgrs", 2)[3] > 0


def figures(**deltas):
    headings = {"random": "POPE random", "chair_i": "CHAIR_i"}
    return {headings.get(k, k): {"delta": v, "low": v, "high": v, "p_holm": 0.01} for k, v in deltas.items()}


def test_verdict_sums_up_what_is_significant():
    row = measured.Row("m", "x", "f", figures(random=0.1, chair_i=0.2, recall=-0.1))
    assert measured.verdict([row]) == "Better on POPE random; worse on CHAIR_i, caption recall."
    worse = measured.Row("m", "x", "f", figures(random=-0.1))
    assert measured.verdict([worse]).endswith("it does not help here.")
    chance = replace(row, figures={k: v | {"p_holm": 0.05} for k, v in row.figures.items()})
    assert measured.verdict([chance]) == measured.verdict([]) == "Does not help here: no difference is significant."
    still = replace(row, figures={}, acted=False)
    assert measured.verdict([still]) == "It never acted here: no answer changed."
    assert measured.verdict([still, replace(still, idle="no sink.")]) == "It never acted here: no sink."
    assert measured.verdict([still, worse]).endswith("it does not help here.")
    assert [measured.points(r.figures["recall"], "**", "**") for r in (row, chance)] == [
        "**-10.0** [-10.0, -10.0]",
        "-10.0 [-10.0, -10.0]",
    ]


def test_runs_are_read_by_model_with_corrected_p(tmp_path):
    def split(**deltas):
        return {"delta": {k: {"delta": v, "low": v - 0.05, "high": v + 0.05} for k, v in deltas.items()}}

    said = {"var changed nothing in this call: no image token was a sink.": 9}
    for folder, model in (("one", "some/where/picto-llava"), ("two", "picto-smol")):
        content = {
            "settings": {"model": {"name": model}, "sample": folder == "two"},
            "runs": {
                "baseline": {"pope": {"random": {"delta": {}}}},
                "var": {"pope": {"random": split(accuracy=0.06)}},  # p .019 alone, .037 beside one other
                "vhr:a=1": {"pope": {"random": split(accuracy=0.0)}},
                "var+vhr": {"pope": {"random": split(accuracy=0.5)}},
            },
            "changed": {"var": {"answers": 40, "changed": 0}, "vhr:a=1": {"answers": 40, "changed": 1}},
            "warnings": {"var": said, "vhr:a=1": said},
        }
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps(content))
    found = measured.read(tmp_path)
    assert [(row.model, row.spec, row.folder) for row in found["var"]] == [
        ("picto-llava", "var", "one"),
        ("picto-smol", "var (sampled)", "two"),
    ]
    assert measured.verdict(found["var"]) == "It never acted here: no image token was a sink."
    assert measured.verdict(found["vhr"]) == "Does not help here: no difference is significant."
    p = found["var"][0].figures["POPE random"]["p_holm"]
    assert p == pytest.approx(2 * 0.0187, abs=1e-3), "the second smallest of three p-values, doubled"
    measured.write(tmp_path, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert sorted(row["method"] for row in kept) == ["var", "var", "vhr", "vhr"]


def test_what_the_package_keeps_is_what_results_hold():
    assert measured.table() == measured.read(ROOT / "results"), "run `make docs`"


def test_every_method_of_a_paper_says_what_is_published():
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in vlm_fix.list_methods():
        part = page.partition(f"### {method.name}\n")[2].partition("\n### ")[0]
        if method.kind != "control" and (method.paper or "Source:" in (method.__doc__ or "")):
            assert "| published |" in part or "\nPublished: " in part, method.name
    for name, option, times in (("var", "detector=secondary", "1.13"), ("act", "sinks=secondary", "1.02")):
        part = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert f"with `{option}` prompt {times}x" in part
