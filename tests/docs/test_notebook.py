"""docs/quickstart.ipynb runs from top to bottom on a CPU."""

from __future__ import annotations

import pytest

from tests.support.paths import ROOT

PLACE = ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_runs_and_is_kept_without_output(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(PLACE, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "clear the output before a commit"
    client.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    told = [output for cell in cells for output in cell.outputs]
    assert {"image/png", "text/html"} <= {kind for output in told for kind in output.get("data", {})}
    printed = "".join(output.get("text", "") for output in told)
    assert "PAI(" in printed and "hiprune:keep=0.5" in printed and "Observation(8 answer tokens" in printed
    assert "vcd  " in printed and printed.count("[") >= 3, "figures with intervals"
