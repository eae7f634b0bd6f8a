"""The table that docs/methods.md opens with."""

import re

from tests.support.paths import ROOT
from vlm_fix.eval.report import measured, methods_table
from vlm_fix.registry import get_method, list_methods

FIGURE = {"delta": 0.02, "low": 0.01, "high": 0.03, "p_holm": 0.01}


def test_the_page_has_every_method_with_what_vllm_serves():
    rows = dict(
        re.findall(r"^\| \[(\w+)\]\(#\1\) \|.*\| (yes|no) \|$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE)
    )
    assert rows.keys() == {m.name for m in list_methods()} - {"baseline"}
    assert (rows["pai"], rows["opera"]) == ("yes", "no")


def test_cells():
    row = measured.Row(
        "picto-smol", "vcd", "x", {"adversarial": FIGURE, "CHAIR_i": FIGURE | {"p_holm": 0.5, "delta": -0.01}}
    )
    told = [row, measured.Row("picto-smol", "vcd:alpha=2", "x", {"adversarial": FIGURE | {"delta": 0.5}})]
    assert methods_table.figures(told, "vcd", "picto-smol") == "POPE **+2.0**, CHAIR_i -1.0"
    assert methods_table.figures(told, "vcd", "picto-llava") == ""
    assert methods_table.figures([measured.Row("m", "var", "x", {}, acted=False)], "var", "m") == "never acted"
    assert methods_table.short("prompt 1.02x, each later token 2.00x; with `a=1` prompt 3.00x") == "1.02x, 2.00x"
    assert methods_table.short("not counted: it needs objects") == ""
    assert methods_table.takes(get_method("decore")) == "calibration, head_list"
