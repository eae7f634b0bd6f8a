"""Every file format gives the same answers, and a file in another gets one sentence."""

import gzip
import io
import json
import zipfile

import pytest

from tests.support.answer_files import lines, read, sheet
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import files
from vlm_fix.eval.scorers import answers, mme

ROWS = [{"question_id": "1", "answer": 'Yes, "two" dogs\u2028or\x0cthree'}, {"question_id": "2", "answer": "No"}]
EXPECTED = [(row["question_id"], row["answer"]) for row in ROWS]


JSON_LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
QUOTED = 'question_id,answer\r\n1,"Yes, ""two"" dogs\u2028or\x0cthree"\r\n2,No\r\n'
FORMATS = {
    "JSON lines": JSON_LINES.encode(),
    "JSON lines with a byte order mark": JSON_LINES.encode("utf-8-sig"),
    "JSON lines of Windows, gzipped": gzip.compress(JSON_LINES.replace("\n", "\r\n").encode()),
    "a JSON array": json.dumps(ROWS, indent=1).encode(),
    "CSV": QUOTED.encode(),
    "CSV with semicolons": QUOTED.replace("id,a", "id;a").replace("1,", "1;").replace("2,", "2;").encode(),
    "TSV": QUOTED.replace("id,a", "id\ta").replace("1,", "1\t").replace("2,", "2\t").encode("utf-8-sig"),
    "an object from id to reply": json.dumps(dict(EXPECTED)).encode(),
    "xlsx": sheet([["question_id", "answer"], *[[i, a.replace("\x0c", " ")] for i, a in EXPECTED]]),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_answers(form, tmp_path):
    path = tmp_path / "answers.any"
    path.write_bytes(FORMATS[form])
    assert read(path) == (
        EXPECTED if form != "xlsx" else [(i, a.replace("\x0c", " ")) for i, a in EXPECTED]
    )  # XML has no form feed


def test_parquet_is_read_where_pyarrow_is_there(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([*ROWS, {"question_id": "3", "answer": None}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [*EXPECTED, ("3", None)]


def test_parquet_without_pyarrow_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(VlmFixError, match="pip install pyarrow, or write it as JSON lines"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "text, encoding, says",
    [
        (JSON_LINES, "utf-16", "looks like UTF-16; write it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8"),
        (JSON_LINES, "utf-16-le", "looks like UTF-16"),
        ('{"question_id": 1, "answer": "是的，有一只狗"}', "gbk", r"perhaps GBK\); .*iconv -f GB18030 -t UTF-8"),
        ('{"question_id": 1, "answer": "café"}', "latin-1", r"byte \d+ is not UTF-8; .*iconv -f ENCODING"),
        ('question_id,answer\n1,"Yes", no\n', "utf-8", "has 3 fields in row 2 and 2 names"),
        ("Yes\nNo\n", "utf-8", "nor a table with a line of names"),
        ('{"a": [{"id": 1}], "b": [{"id": 2}]}', "utf-8", "holds the lists a and b"),
        ("[1, 2]", "utf-8", "rows of another kind"),
    ],
)
def test_other_files_get_one_sentence(text, encoding, says, tmp_path):
    (tmp_path / "a").write_bytes(text.encode(encoding))
    with pytest.raises(VlmFixError, match=says) as error:
        read(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_rows_end_at_newlines_alone_everywhere(tmp_path):
    reply = "Yes\u2028a dog\x0b\x0c\x1e\x85."
    (tmp_path / "count.txt").write_text(f"a.jpg\tTwo?\tYes\t{reply}\na.jpg\tThree?\tNo\tNo\r\n", newline="\n")
    assert mme.load_results(tmp_path)[1] == [reply, "No"]
    assert files.read_rows(lines(tmp_path / "rows", [{"a": reply}]), "file") == [{"a": reply}]


def test_batches_and_conversations(tmp_path):
    def batch(id, content, **more):
        return {
            "id": f"batch_{id}",
            "custom_id": id,
            "response": {"body": {"choices": [{"message": {"content": content}}]}},
        } | more

    given = lines(tmp_path / "b.jsonl", [batch("7", "No."), batch("8", [{"type": "text", "text": "Yes."}])])
    found = answers.read(given, "{...}")
    assert [(row.id, row.reply) for row in found.rows] == [("7", "No."), ("8", "Yes.")]
    assert "rows of OpenAI's batches (reply in response, id in custom_id)" in found.told()
    failed = {"custom_id": "9", "response": None, "error": {"message": "too long"}}
    assert read(lines(tmp_path / "f", [batch("7", "No."), failed])) == [("7", "No."), ("9", None)]
    two = {
        "custom_id": "7",
        "response": {"body": {"choices": [{"message": {"content": "A"}}, {"message": {"content": "B"}}]}},
    }
    with pytest.raises(VlmFixError, match="not a text: write it as one"):
        read(lines(tmp_path / "t", [two]))
    turns = [{"from": "human", "value": "Is there a dog?"}, {"from": "gpt", "value": "Yes"}]
    (row,) = answers.read(lines(tmp_path / "c", [{"id": 3, "conversations": turns}]), "{...}").rows
    assert (row.id, row.question, row.reply) == ("3", "Is there a dog?", "Yes")
    with pytest.raises(VlmFixError, match="its keys are id, conversations"):  # nobody has answered yet
        read(lines(tmp_path / "d", [{"id": 3, "conversations": turns[:1]}]))


def test_a_list_under_a_name_of_its_own_is_not_called_chairs(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"model": "m", "results": [{"question_id": 1, "text": "No"}, {"question_id": 2, "text": "Yes"}]})
    )
    assert "one JSON object, rows in a list (reply in text" in answers.read(path, "{...}").told()


def broken_sheets():
    """Workbooks whose parts cannot be what they say: (name, bytes, what is told)."""
    good = sheet([["question_id", "answer"], ["1", "Yes"]])
    for name, cell in (("beyond", "9"), ("below", "-1"), ("no number", "x"), ("half", "1.5")):
        yield name, edited(good, lambda text, cell=cell: text.replace("<v>1</v>", f"<v>{cell}</v>"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("xl/worksheets/sheet1.xml", "<worksheet/>" * 200)
    data = bytearray(packed.getvalue())
    data[60:70] = b"\xff" * 10
    yield "deflated", bytes(data)
    data = bytearray(packed.getvalue())
    for sign, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(sign) + place] = 99  # a compression that nobody knows
    yield "packed otherwise", bytes(data)
    data = bytearray(packed.getvalue())
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(sign) + place] |= 1
    yield "with a password", bytes(data)


def edited(data, change):
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name).decode()))
    return made.getvalue()


@pytest.mark.parametrize("case", dict(broken_sheets()))
def test_a_broken_workbook_is_one_sentence(case, tmp_path):
    path = tmp_path / "answers.xlsx"
    path.write_bytes(dict(broken_sheets())[case])
    with pytest.raises(VlmFixError, match=r"The answers .*answers.xlsx is no xlsx workbook \(.+\): write it as CSV"):
        files.read_rows(path, "answers")
