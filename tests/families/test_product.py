"""Every method on every family: it works, or one sentence says why not. A run of the suite walks one part of the product.

The part follows the commit; `VLM_FIX_PRODUCT=all` walks the whole, `VLM_FIX_PRODUCT=2` part 2. What becomes of each cell is
kept in `vlm_fix/families/record.json`, from which docs/models.md and `vlm-fix models` are made; `make record` walks the
product and writes it again.
"""

from __future__ import annotations

import json

import pytest

from tests.support import product
from tests.support.cases import CASES
from vlm_fix.families import FAMILIES
from vlm_fix.registry import list_methods

METHODS = [m.name for m in list_methods()]


def test_the_record_holds_every_family_and_method():
    record = json.loads(product.RECORD.read_text())
    assert record["methods"] == METHODS and list(record["families"]) == list(product.RECORDED), "make record"
    assert {f.name for f in FAMILIES} == {r["family"] for r in record["families"].values()}
    cells = [(m, c) for r in record["families"].values() for m, c in r["cells"].items()]
    assert all(m in METHODS and c["outcome"] in product.GOOD[1:] and c["why"] for m, c in cells)


def test_parts_are_a_partition():
    cells = [{(m, f) for f in product.FAMILIES for m in product.part_of(f, METHODS, k)} for k in range(product.PARTS)]
    assert sum(map(len, cells)) == len(set.union(*cells)) == len(METHODS) * len(product.FAMILIES)
    assert min(map(len, cells)) > 0.8 * max(map(len, cells)) and set(METHODS) == set(CASES)


@pytest.mark.parametrize("family", product.FAMILIES)
def test_methods_work_or_say_why_not(family):
    bad = []
    for method in product.part_of(family, METHODS, product.chosen_part()):
        found, known = product.walk(method, family), product.recorded(family, method)
        if found["outcome"] == product.FAILED:
            bad.append(f"{method}: {found['why']}")
        elif found["outcome"] != known["outcome"] or (found["outcome"] == product.REFUSED and found != known):
            bad.append(f"{method}: {found}, in the record {known}: if that is meant, make record")
    assert not bad, "\n".join(bad)


def test_a_raw_exception_and_a_silent_method_fail(monkeypatch):
    """The walk itself: it sees what it is there for."""

    def broken(self, *args, **kwargs):
        raise KeyError("a raw error")

    from vlm_fix.effects import Effects
    from vlm_fix.methods.attention.pai import PAI
    from vlm_fix.methods.heads.vhr import VHR

    monkeypatch.setattr(PAI, "edit_scores", broken)
    assert product.walk("pai", "llava")["outcome"] == product.FAILED
    assert "KeyError: 'a raw error'" in product.walk("pai", "llava")["why"]
    monkeypatch.setattr(PAI, "edit_scores", lambda self, scores, rows: scores)
    found = product.walk("pai", "llava")
    assert found["outcome"] == product.IDLE and "it gave back what it was given, unchanged" in found["why"]
    monkeypatch.setattr(Effects, "idle", lambda self: iter(()))
    assert "changed nothing, without a word" in product.walk("pai", "llava")["why"]
    monkeypatch.setattr(VHR, "edit_heads", lambda self, out, rows: out * float("nan"))
    found = product.walk("vhr", "llava")
    assert found["outcome"] == product.FAILED and "were NaN" in found["why"]
