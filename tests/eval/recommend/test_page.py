"""The page, from a simulated search with a winner: what it says, and that labels cover nothing."""

from __future__ import annotations

import re

import pytest

from vlm_fix.eval.recommend.figures import summary
from vlm_fix.eval.recommend.page import html
from vlm_fix.eval.recommend.plot import Dot, scatter
from vlm_fix.eval.tasks import Sample

from .simulated import JUDGE, World, searched

ABOUT = {
    "model": {"name": "some/<model>", "weights": "sha256:12", "dtype": "float32"},
    "data": {"source": "simulated", "search": 100, "proof": 100, "sha256": "ab" * 32},
    "budget": 1800.0,
    "seconds": 1500.0,
    "seed": 0,
    "versions": {"vlm_fix": "0"},
    "hardware": "none",
    "date": "2026-01-01T00:00:00",
    "command": "vlm-fix recommend",
}


@pytest.fixture(scope="module")
def report():
    outcome = searched(World(3, {"c0": 5.0}), candidates=6, budget=900)
    assert outcome.winner
    return {**summary(outcome, JUDGE, {"steer": "name <a> file"}, {}), **ABOUT}


def test_the_page_tells_the_verdict_the_proof_and_every_candidate(report):
    question = Sample("a", 1, "a.png", __import__("PIL.Image").Image.new("RGB", (9, 9)), "Is it?", {"label": "no"})
    examples = [
        {
            "sample": question,
            "task": "pope",
            "base": ("yes", [(0, 3, False)]),
            "method": ("no", [(0, 2, True)]),
            "fixed": True,
        }
    ]
    page = html(report, examples, "fix.yaml")
    assert "C0 is better by" in page or "c0 is better by" in page
    assert '<mark class="bad"' in page and "data:image/jpeg" in page
    assert page.count("<svg") == 3 + len(report["proofs"])
    assert all(f"<code>{row['candidate']}" in page for row in report["candidates"] if row["images"])
    assert "name &lt;a&gt; file" in page and "some/<model>" not in page and "{" not in page.split("</style>")[1]


def test_the_summary_holds_its_own_figures(report):
    proof = report["proofs"][0]
    change = proof["changes"]["accuracy"]
    assert change["change"] == pytest.approx(change["method"] - change["base"], abs=2e-4)
    assert change["low"] < change["change"] < change["high"]
    assert report["winner"] == "c0" and proof["better"] and proof["level"] == 1 - 0.05 / len(report["proofs"])
    best = next(row for row in report["candidates"] if row["candidate"] == "c0")
    assert best["errors"]["gain"] > 0 and not best["out"]


def test_labels_cover_no_dot_and_no_other_label():
    dots = [Dot(f"method number {i}", 0.1 * i, 0.05 * i, 0.3, 0.2) for i in range(9)]
    svg = scatter(dots, "x", "y", "title", (0, 0), (1, 1))
    found = re.findall(r'<text class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>([^<]+)', svg)
    boxes = []
    for x, y, anchor, text in found:
        wide, left = 5.7 * len(text), float(x)
        left -= wide if anchor == "end" else 0
        boxes.append((left, float(y) - 10, left + wide, float(y) + 3))
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
    assert len(found) >= 6
