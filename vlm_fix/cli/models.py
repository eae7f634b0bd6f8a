"""vlm-fix models: the model families."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .common import add, add_json, console, table


def add_to(commands: Any) -> None:
    add_json(add(commands, "models", "list the model families", run))


def run(args: argparse.Namespace) -> None:
    from vlm_fix.families import FAMILIES

    rows: list[dict[str, Any]] = [
        {"name": family.name, "model_types": list(family.model_types), "tested": family.tested} for family in FAMILIES
    ]
    if args.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    listed = table("family", "model_type in config.json", "tested", gap=0)
    for row in rows:
        listed.add_row(row["name"], ", ".join(row["model_types"]), str(row["tested"]))
    console().print(listed)
