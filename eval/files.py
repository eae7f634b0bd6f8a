"""Read the package's and the user's files, with one clear error for each thing that can be wrong; write files safely.

Tables come in many forms, which are told apart by their content: a JSON array or object, JSON lines,
CSV, TSV, parquet (with pyarrow) and the first sheet of xlsx, each gzipped or not. Lines end at "\\n"
alone: U+2028 or a form feed inside a line is part of an answer.
"""

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from vlm_fix.errors import VlmFixError
from vlm_fix.whole import whole_file

DATA = Path(__file__).parent / "data"
SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


class Table(NamedTuple):
    """The rows of a file, and the form in which it was written. Cells of CSV, TSV and xlsx are texts, or None if empty."""

    rows: list[dict[str, Any]]
    form: str


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a UTF-8 file, gzipped or not. The error of an unreadable file says `what` it should have been."""
    return _text(_bytes(path, what), path, what)


def read_rows(path: str | Path, what: str, example: str = "{...}") -> list[dict[str, Any]]:
    """Return the rows of a file, see `read_table`."""
    return read_table(path, what, example).rows


def read_table(path: str | Path, what: str, example: str = "{...}") -> Table:
    """Return the rows of a file in any of the forms above.

    Raises VlmFixError, with an `example` row, for a file that is missing, empty, of another encoding or malformed.
    """
    data = _bytes(path, what)
    if data[:4] == b"PAR1":
        table = Table(_parquet(data, path, what), "parquet")
    elif data[:4] == b"PK\x03\x04":
        table = Table(_sheet(data, path, what), "xlsx")
    else:
        table = _parsed(_text(data, path, what), path, what, example)
    wrong = "is empty" if not table.rows else "has rows of another kind"
    if not table.rows or not all(isinstance(row, dict) for row in table.rows):
        raise _error(path, what, wrong, example)
    return table


def counted(n: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "scene"), counted(20, "scene")
    ('1 scene', '20 scenes')
    """
    return f"{n} {noun}{'s' * (n != 1)}"


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see either the old text or the new, even if the process is killed or the disk is full.

    Its folder is made where it is missing.
    """
    with whole_file(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as handle:
        handle.write(text)  # half an emoji, as JSON has it, is written as its code


def _bytes(path: str | Path, what: str) -> bytes:
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise VlmFixError(f"Cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}.") from None


def _text(data: bytes, path: str | Path, what: str) -> str:
    wide = _wide(data)
    try:
        if not wide:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, encoding = f"byte {error.start + 1} is not UTF-8", "GB18030"
        try:
            data.decode("gb18030")
        except UnicodeDecodeError:
            encoding = "ENCODING"
    else:
        place, encoding = f"it looks like {wide}", wide
    perhaps = " (perhaps GBK)" if encoding == "GB18030" else ""
    raise VlmFixError(
        f"Cannot read the {what} {path}: {place}{perhaps}; write it as UTF-8, for example with "
        f"`iconv -f {encoding} -t UTF-8 {path} > new`."
    )


def _wide(data: bytes) -> str:
    """UTF-16, UTF-32, or "" for text whose letters are single bytes."""
    if data[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff") or b"\x00\x00\x00" in data[:400]:
        return "UTF-32"
    return "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in data[:400] else ""


def _parsed(text: str, path: str | Path, what: str, example: str) -> Table:
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        return _separated(text, path, what, example)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        return Table(_json(text), "a JSON array") if start == "[" else Table([_json(text)], "one JSON object")
    except json.JSONDecodeError as whole:
        cause: Exception = whole
        place = ""
    except _Twice as twice:
        raise _doubled(path, what, "name", str(twice)) from None
    except (RecursionError, ValueError) as error:
        raise _error(path, what, f"is no table ({_short(error)})", example) from None
    rows = []
    for number, line in lines:
        try:
            rows.append(_json(line))
        except _Twice as twice:
            raise _doubled(path, what, f"line {number} the name", str(twice)) from None
        except (RecursionError, ValueError) as error:
            if start != "[" and len(lines) > 1:
                cut = ", the last: it is cut off" if number == lines[-1][0] and rows else ""
                cause, place = error, f"line {number}{cut}: "
            wrong = f"is neither JSON lines nor a JSON array ({place}{_short(cause)})"
            raise _error(path, what, wrong, example) from None
    return Table(rows, "JSON lines")


class _Twice(Exception):
    """A JSON object has a name twice."""


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(_first_twice([name for name, _ in pairs]))
    return found


def _first_twice(names: Sequence[str]) -> str:
    """The first name that comes again, or ""; columns without a name, such as a table's numbers of rows, do not count."""
    return next((name for name, times in Counter(names).items() if name and times > 1), "")


def _short(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _separated(text: str, path: str | Path, what: str, example: str) -> Table:
    if "\n" not in text.strip() and "\r" in text.strip():
        text = text.replace("\r", "\n")  # the line ends of old Macs
    header = text.lstrip().split("\n", 1)[0].rstrip("\r")
    separator = next((mark for mark in ("\t", ",", ";") if mark in header), "")
    if not separator:
        wrong = "is neither JSON lines nor a JSON array nor a table with a line of names" if header else "is empty"
        raise _error(path, what, wrong, example)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator)
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise _error(path, what, f"cannot be read as {_named(separator)} ({error})", example) from None
    finally:
        csv.field_size_limit(limit)
    names = [name.strip() for name in lines[0]]
    if twice := _first_twice(names):
        raise _doubled(path, what, "column", twice)
    for number, line in enumerate(lines, 1):
        if len(line) != len(names):
            wrong = (
                f"has {len(line)} fields in row {number} and {len(names)} names: put texts with {separator!r} in quotes"
            )
            raise VlmFixError(f"The {what} {path} {wrong}.")
    return Table([_cells(names, line) for line in lines[1:]], _named(separator))


def _named(separator: str) -> str:
    return {"\t": "TSV", ",": "CSV"}.get(separator, "CSV with semicolons")


def _cells(names: list[str], cells: list[str]) -> dict[str, Any]:
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _parquet(data: bytes, path: str | Path, what: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise VlmFixError(
            f"The {what} {path} is parquet, which needs pyarrow: pip install pyarrow, or write it as JSON lines."
        ) from None
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (OSError, ValueError) as error:  # as pyarrow's errors are
        raise VlmFixError(f"Cannot read the {what} {path} as parquet: {error}.") from None
    if twice := _first_twice(table.column_names):
        raise _doubled(path, what, "column", twice)
    return list(table.to_pylist())


def _sheet(data: bytes, path: str | Path, what: str) -> list[dict[str, Any]]:
    """The first sheet of an xlsx workbook, by the XML parts of the format (ECMA-376)."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as book:
            names = book.namelist()
            if not any(name.startswith("xl/") for name in names):
                held = names[0] if names else "nothing in it"
                raise VlmFixError(f"The {what} {path} is a zip archive with {held}: unpack it, and give the file.")
            texts = []
            if "xl/sharedStrings.xml" in names:
                shared = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
                texts = [_inner(item) for item in shared.iter(f"{SHEET}si")]
            sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
        lines = [dict(_row(row, texts)) for row in sheet.iter(f"{SHEET}row")]
    except VlmFixError:
        raise
    except Exception as error:  # zip, its compressions, XML and the numbers in it fail in ways of their own
        wrong = " ".join(str(error).split()) or type(error).__name__
        raise VlmFixError(f"The {what} {path} is no xlsx workbook ({wrong}): write it as CSV.") from None
    head = lines[0] if lines else {}
    if twice := _first_twice([name for name in head.values() if name]):
        raise _doubled(path, what, "column", twice)
    return [
        {name: line.get(column) for column, name in head.items() if name} for line in lines[1:] if any(line.values())
    ]


def _row(row: ElementTree.Element, texts: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (column, text or None) of each cell."""
    for place, cell in enumerate(row.iter(f"{SHEET}c")):
        column = re.sub(r"\d", "", cell.get("r", "")) or str(place)
        kind, value = cell.get("t", ""), cell.find(f"{SHEET}v")
        text = _inner(cell) if kind == "inlineStr" else (value.text if value is not None else None)
        if kind == "s" and text:
            if not 0 <= int(text) < len(texts):
                raise ValueError(f"a cell names text {int(text)}, and there are {len(texts)}")
            text = texts[int(text)]
        if kind in ("", "n") and text and re.fullmatch(r"-?\d+\.0+", text):
            text = text.partition(".")[0]
        yield column, text or None


def _inner(item: ElementTree.Element) -> str:
    """The text of a string item, without phonetic hints. "_x000D_" stands for a carriage return."""
    runs = [child for child in item.iter(f"{SHEET}t")]
    return re.sub(r"_x([0-9A-F]{4})_", lambda code: chr(int(code[1], 16)), "".join(run.text or "" for run in runs))


def _doubled(path: str | Path, what: str, kind: str, name: str) -> VlmFixError:
    return VlmFixError(f"The {what} {path} has {kind} {name!r} twice: keep one of them, as only one could be read.")


def _error(path: str | Path, what: str, wrong: str, example: str) -> VlmFixError:
    return VlmFixError(f"The {what} {path} {wrong}: write one JSON object per row, such as {example}.")
