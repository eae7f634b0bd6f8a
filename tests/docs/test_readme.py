"""The first example of the README runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_fix.wing import installed

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_example(capsys):
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(found[1], "README.md", "exec"), names)
    assert "there" in capsys.readouterr().out
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1] and installed(names["model"]) is None
