"""Reading benchmark files: the package's own and the user's, with one sentence for each thing that can be wrong."""

import gzip
import json
from pathlib import Path
from typing import Any, get_args

from vlm_fix.errors import VlmFixError

DATA = Path(__file__).parents[1] / "data"


def read_text(path: str | Path, what: str) -> str:
    """Text of a file, gzip or not; one sentence that says `what` it is if it cannot be read."""
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise VlmFixError(f"Cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}.") from None


def read_rows(path: str | Path, what: str, example: str = "{...}") -> list[dict[str, Any]]:
    """Rows of a JSON-lines file or JSON array, gzip or not; one sentence, with `example` of a row, if it is missing, empty
    or broken."""
    text = read_text(path, what)
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        wrong = f"is neither JSON lines nor a JSON array ({error})"
    else:
        wrong = (
            "is empty" if not rows else "" if all(isinstance(row, dict) for row in rows) else "has rows of another kind"
        )
    if wrong:
        raise VlmFixError(f"The {what} {path} {wrong}: write one JSON object per row, such as {example}.")
    return rows


def one_of(value: str, choices: Any, what: str) -> str:
    """`value`, if the Literal type `choices` lists it."""
    if value not in get_args(choices):
        raise VlmFixError(f"Unknown {what} {value!r}; choose one of {', '.join(get_args(choices))}.")
    return value
