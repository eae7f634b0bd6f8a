"""`vlm-fix bench serve` measures what it says; its figures are not tested.

Its engines take vLLM's groups of processes with them when they end, so this file stands before those that share an engine.
"""

from __future__ import annotations

import pytest

from vlm_fix.eval.bench import serving


def test_every_method_is_measured_beside_plain_vllm():
    ticks = []
    results = serving.run(["pai", "hiprune:keep=0.25"], "picto-llava", 3, 1, ticks.append, (1, 2), 2)
    assert [(row["concurrent"], row["spec"]) for row in results["rows"]] == [
        (count, spec) for count in (1, 2) for spec in ("vLLM", "pai", "hiprune:keep=0.25", "generate")
    ]
    assert len(ticks) == ticks[0]
    for row in results["rows"]:
        assert row["requests_per_second"] > 0 and row["first_token"] > 0
        assert row["tokens_per_second"] == pytest.approx(3 * row["requests_per_second"])
        assert set(row["ratios"]) == ({*serving.FIGURES} if row["spec"] != "vLLM" else set())
    assert results["questions"] == 2
    table = serving.table(results)
    assert table.row_count == 8


def test_no_two_questions_are_alike():
    asked = [serving.question(i) for i in range(64)]
    assert len({*asked}) == 64 and len({len(words.split()) for words in asked[:8]}) > 3
