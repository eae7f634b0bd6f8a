"""Options of a command from a file: each becomes what one would have typed, so that the parser checks them as usual."""

from __future__ import annotations

import argparse
import difflib
import json
from typing import Any

from vlm_fix.errors import VlmFixError


def arguments(parser: argparse.ArgumentParser, options: dict[str, Any], path: str) -> list[str]:
    """Return command-line arguments for option -> value. Raises VlmFixError for an unknown option or a bad value."""
    actions = {
        action.dest.replace("_", "-"): action for action in parser._actions if action.dest not in ("help", "config")
    }
    typed: list[str] = []
    for name, value in options.items():
        action = actions.get(name)
        if action is None:
            near = difflib.get_close_matches(name, actions, 1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(sorted(actions))}."
            raise VlmFixError(f"{path}: there is no option {name!r}; {hint}")
        if value is None:
            continue
        if isinstance(action, argparse._StoreTrueAction):
            if not isinstance(value, bool):
                raise VlmFixError(f"{path}: {name} is {value!r}: write true or false.")
            typed += [action.option_strings[0]] if value else []
        elif not action.option_strings:
            typed.append(str(value))
        elif isinstance(action, argparse._AppendAction):
            typed += [f"{action.option_strings[0]}={each}" for each in (value if isinstance(value, list) else [value])]
        else:
            typed.append(f"{action.option_strings[0]}={_text(value)}")
    return typed


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
