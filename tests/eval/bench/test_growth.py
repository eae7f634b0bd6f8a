"""`bench scaling` and the program behind results/gpu.sh: sizes, slopes, and stopping in time (timings are not tested)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import vlm_fix
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.bench import drafting, scaling
from vlm_fix.eval.bench.device import MATRIX, Report, kernel, pushes
from vlm_fix.method import Method
from vlm_fix.registry import parse


def point(value, ms, mb):
    return {"size": "visual", "value": value, "spec": "pai", "ms_per_token": ms, "first_token": [1, 1], "peak_mb": mb}


def test_slopes_and_the_bend_of_memory():
    points = [point(n, [5 + 0.01 * n, 5 + 0.02 * n], [2 * n, 0.001 * n * n]) for n in (64, 128, 256)]
    (row,) = scaling.slopes(points)
    assert row["ms_per_token"] == pytest.approx([0.01, 0.02])
    assert row["memory_bend"] == pytest.approx([1, 2])
    (row,) = scaling.slopes([*points[:1], *points[2:]])  # a quarter is no half: the square would give 4
    assert "memory_bend" not in row


def test_the_default_sizes_hold_about_half_of_the_largest():
    points = [point(n, [5, 5], [2 * n, 0.001 * n * n]) for n in scaling.SIZES["visual"]]
    assert scaling.slopes(points)[0]["memory_bend"] == pytest.approx([1, 2], abs=0.05)


def test_scaling_writes_points_and_a_figure(tmp_path, capsys):
    out, drawn = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    sizes = "visual=4|16,layers=1|8,batch=2"
    cli.main(
        f"bench scaling --shape tiny --method pai --sizes {sizes} --new-tokens 2 --rounds 1 --device cpu "
        f"--output {out} --figure {drawn}".split()
    )
    found = json.loads(out.read_text())
    assert [(p["size"], p["value"]) for p in found["points"]] == [
        ("visual", 4), ("visual", 16), ("layers", 1), ("layers", 8), ("batch", 2)
    ]  # fmt: skip
    assert [p["visual_tokens"] for p in found["points"]][:2] == [4, 16] and min(
        p["speed_ratio"] for p in found["points"]
    ) > 0
    assert {row["size"] for row in found["slopes"]} == {"visual", "layers"} and drawn.stat().st_size > 1000
    assert "edited layers" in capsys.readouterr().out


def test_a_method_without_layers_is_left_out_along_them_and_named(tmp_path, capsys):
    drawn = tmp_path / "scaling.png"
    sizes = {"layers": (2,), "batch": (1,)}
    got = scaling.run(["vcd", "pai+vcd", "hiprune:keep=32"], "tiny", sizes=sizes, rounds=0)
    assert [(p["size"], p["spec"]) for p in got["points"]] == [
        ("layers", "pai+vcd"), *(("batch", spec) for spec in ("vcd", "pai+vcd", "hiprune:keep=32"))
    ]  # fmt: skip
    assert got["left_out"] == [{"size": "layers", "spec": spec} for spec in ("vcd", "hiprune:keep=32")]
    assert "not along the edited layers: vcd, hiprune:keep=32" in scaling.table(got).caption
    scaling.figure(got, drawn)
    assert drawn.stat().st_size > 1000 and [*tmp_path.iterdir()] == [drawn]
    with pytest.raises(VlmFixError, match="has nothing to time: vcd along layers"):
        scaling.run(["vcd"], "tiny", sizes={"layers": (2,)}, rounds=0)


def test_every_spec_is_checked_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(scaling, "_memory", lambda *_, **__: pytest.fail("it was timed"))
    for spec, said in (("fastv:layer=90", "name layers between 0 and 7"), ("pai:layers=1", "given twice")):
        with pytest.raises(VlmFixError, match=said):
            scaling.run(["vcd", spec], "tiny", sizes={"batch": (1,), "layers": (2,)}, rounds=0)


def test_drafting_counts_no_answer_before_the_first_round(monkeypatch):
    calls = []

    def answered(model, inputs, how):
        calls.append(inputs["pixel_values"])
        return [1, 2], 100.0 if len(calls) in (1, 4) else 1.0  # the first of the model, and of the second spec

    monkeypatch.setattr(drafting, "answered", answered)
    monkeypatch.setattr(
        vlm_fix, "drafted", lambda _: SimpleNamespace(tokens_per_round=1, accepted=1, drafted=1, columns=1)
    )
    found = drafting.run(["draft", "draft:keep=0.5"], "picto-llava", 2, 2, "cpu")
    assert len(calls) == 4 * 3 and torch.equal(calls[0], calls[4]) and not torch.equal(calls[4], calls[8])
    assert [(row["ratio"], row["same"]) for row in found["rows"]] == [(1, 2), (1, 2)]


def test_memory_alone_is_measured_without_rounds(capsys):
    got = scaling.run(["pai"], "tiny", sizes={"visual": (25, 49)}, rounds=0)
    assert all(p["peak_mb"][1] > 0 and "first_token" not in p for p in got["points"])
    assert {*got["slopes"][0]} == {"size", "spec", "peak_mb", "memory_bend"}


@pytest.mark.parametrize(
    "options, words",
    [
        ("scaling --sizes tokens=3", "sizes are visual, layers, batch, answer"),
        ("scaling --sizes visual=x", "is not a list such as"),
        ("scaling --sizes visual=65 --shape tiny", "give square numbers"),
        ("scaling --figure x.txt", "must end in .svg"),
        ("attention --sizes visual=64", "has no effect on bench attention"),
        ("scaling --rounds -1", "--rounds at least 0"),
    ],
)
def test_bad_sizes_are_named(options, words, capsys):
    assert cli.main(f"bench {options} --device cpu".split())
    assert words in " ".join(capsys.readouterr().err.split())


def test_steps_end_in_time_and_what_is_left_is_named(tmp_path, capsys):
    report = Report(tmp_path / "gpu.json", torch.device("cpu"), torch.float32, seconds=60)

    def broken():
        raise RuntimeError("no such thing")

    def late():
        report.end = 0

    steps = [("a", lambda: 1), ("b", broken), ("c", late), ("d", lambda: 2), ("e", lambda: 3)]
    report.plan(steps)
    report.run(steps)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["steps"]["a"] == 1 and found["steps"]["b"]["error"] == "RuntimeError: no such thing"
    assert found["left"] == ["d", "e"] and {*found["steps"]} == {"a", "b", "c"}


def test_the_kernels_step_measures_and_the_matrix_names_methods_that_are():
    rows = kernel(torch.device("cpu"), torch.float32, (5,))
    assert len(rows) == 2 and all(
        row["error"] < 1e-5 and row["fused_us"] > 0 and row["transfer_was_told"] for row in rows
    )
    assert all(row["error"] < 1e-4 and row["us"] > 0 for row in pushes(torch.device("cpu")))
    for spec, neutral in MATRIX.items():
        assert all(isinstance(m, Method) for m in parse([spec.replace("RATES", "0.5|0.5")]))
        assert not neutral or all(m.name == spec.partition(":")[0] for m in parse([neutral]))
