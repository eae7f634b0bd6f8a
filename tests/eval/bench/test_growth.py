"""`bench scaling` and the program behind results/gpu.sh: sizes, slopes, and stopping in time (timings are not tested)."""

from __future__ import annotations

import json

import pytest
import torch

from vlm_fix import cli
from vlm_fix.eval.bench import scaling
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


def test_memory_alone_is_measured_without_rounds(capsys):
    got = scaling.run(["pai"], "tiny", sizes={"visual": (16, 64)}, rounds=0)
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
