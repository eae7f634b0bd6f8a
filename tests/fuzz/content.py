"""What the readers are fed: rows of every name and value, in every file format, and bytes of good files that were damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from vlm_fix.eval.scorers import answers

KEYS = sorted(
    {*answers.REPLIES, *answers.IDS, *answers.IMAGE_IDS, *answers.QUESTIONS, *answers.LABELS, *answers.CATEGORIES}
    | {
        "doc_id",
        "filtered_resps",
        "imgToEval",
        "sentences",
        "img_id",
        "object_name",
        "response_a",
        "",
        "p_yes",
        "p_no",
        "gt",
    }
    | {
        "relation_type",
        "query_prompt",
        "run",
        "benchmark",
        "batch",
        "model_prediction",
        "set_id",
        "figure_id",
        "visual_input",
    }
)
WORDS = [
    "yes",
    "No.",
    "YES",
    "a dog and a cat",
    "Is there a dog in the image?",
    "",
    " ",
    "\u2028",
    "\x00",
    "\ud800",
    "是的",
]
NAMES = [
    "COCO_val2014_000000000042.jpg",
    "000000000042.png",
    "42",
    "42.0",
    "1e400",
    "9" * 5000,
    "../../x",
    "a\\b",
    "-1",
]
NUMBERS = [0, 1, -1, 42, 42.0, 0.5, 10**30, float("nan"), float("inf")]
VALUES = st.one_of(
    st.sampled_from([*WORDS, *NAMES, *NUMBERS, None, True, False, [], {}, ["yes"], [["no"]], {"id": 1}, ["a", "b"]]),
    st.text(max_size=12),
    st.integers(),
    st.floats(),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), max_size=5)
ANY_JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def written(rows: Sequence[dict[str, Any]], form: str) -> bytes:
    """Rows in a file format."""
    if form in ("csv", "tsv"):
        names = list(dict.fromkeys(name for row in rows for name in row))
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter={"csv": ",", "tsv": "\t"}[form])
        writer.writerows([names, *([row.get(name) for name in names] for row in rows)])
        text = out.getvalue()
    elif form == "lines":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(
            {"array": list(rows), "object": rows[0] if rows else {}, "held": {"sentences": list(rows)}}[form]
        )
    return text.encode("utf-8", "surrogatepass")


def damaged(data: bytes, cuts: Sequence[tuple[float, float, bytes]]) -> bytes:
    """Replace slices, whose places are shares of the length, with other bytes."""
    for start, length, new in cuts:
        at = int(start * len(data))
        data = data[:at] + new + data[at + int(length * length * (len(data) - at)) :]
    return data


SCRAPS = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b",",
    b"\n",
    b"\r",
    b"null",
    b"1e999",
    b"NaN",
    b"\xf0\x9f",
    b"\\ud800",
    b"-",
]
CUTS = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from(SCRAPS) | st.binary(max_size=8)), max_size=3
)


def broken(good: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Good files, damaged in up to three places."""
    return st.builds(damaged, st.sampled_from(list(good)), CUTS)


def tables(good: Sequence[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Tables of any rows or with a value of the good ones replaced, in any format, perhaps gzipped or damaged."""
    changed = st.builds(
        lambda row, key, value, n: [{**row, key: value}] * n,
        st.sampled_from(list(good)),
        st.sampled_from(KEYS),
        VALUES,
        st.integers(1, 3),
    )
    forms = st.sampled_from(["lines", "lines", "array", "object", "held", "csv", "tsv"])
    plain = st.builds(written, ROWS | changed, forms) | st.builds(lambda value: json.dumps(value).encode(), ANY_JSON)
    whole = st.builds(damaged, plain, CUTS) | plain
    return whole | st.builds(gzip.compress, whole)


def picture(kind: str, mode: str = "RGB") -> bytes:
    """A small image file."""
    out = io.BytesIO()
    Image.new(mode, (9, 7), 3).save(out, kind)
    return out.getvalue()
