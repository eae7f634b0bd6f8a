"""Answer files as people have them, written for tests, and what the reader finds in them."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from vlm_fix.eval import files
from vlm_fix.eval.scorers import answers

SUFFIX = "\nAnswer the question using a single word or phrase."
TASKS = {"existence": ["Yes", "No"], "count": ["Yes", "Yes"], "OCR": ["No", "No"]}


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, **how: Any) -> list[tuple[str, str | None]]:
    return [(row.id, row.reply) for row in answers.read(path, "{...}", **how).rows]


def sheet(rows: list[list[str | None]]) -> bytes:
    """A workbook as Excel writes it: texts shared, empty cells left out."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    texts = sorted({cell for row in rows for cell in row if cell})
    shared = "".join(f"<si><t xml:space='preserve'>{cell.replace('<', '&lt;')}</t></si>" for cell in texts)
    body = "".join(
        f'<row r="{n}">'
        + "".join(f'<c r="{chr(65 + i)}{n}" t="s"><v>{texts.index(cell)}</v></c>' for i, cell in enumerate(row) if cell)
        + "</row>"
        for n, row in enumerate(rows, 1)
    )
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as book:
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
        book.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{body}</sheetData></worksheet>")
    return data.getvalue()


def mme_rows(make: Any) -> list[Any]:
    """Three tasks of two images; the reply is the first word of TASKS for the first question, the second for the second."""
    return [
        make(task, f"{n}.jpg", f"Is there a {what}? Please answer yes or no.", truth, reply)
        for task, replies in TASKS.items()
        for n in (1, 2)
        for what, truth, reply in zip(("dog", "cat"), ("Yes", "No"), replies, strict=True)
    ]


def hallusion_rows() -> list[dict[str, Any]]:
    return files.read_rows(files.DATA / "hallusion/hallusionbench.jsonl.gz", "HallusionBench")
