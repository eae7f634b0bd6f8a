from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_fix.eval.files import write_atomic


def write(report: dict[str, Any], examples: list[dict[str, Any]], out: Path) -> list[Path]:
    figures = out.with_suffix(".json")
    write_atomic(figures, json.dumps(report, indent=1) + "\n")
    return [figures]
