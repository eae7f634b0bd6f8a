"""Read the package's and the user's files, with one clear error for each thing that can be wrong; write files safely."""

import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

DATA = Path(__file__).parent / "data"


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a file, gzipped or not. The error of an unreadable file says `what` it should have been."""
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise VlmFixError(f"Cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}.") from None


def read_rows(path: str | Path, what: str, example: str = "{...}") -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file or JSON array, gzipped or not.

    Raises VlmFixError, with an `example` row, for a file that is missing, empty or malformed.
    """
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


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see either the old text or the new, even if the process is killed meanwhile."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
