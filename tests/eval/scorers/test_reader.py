"""Files that are broken or doubtful get one sentence; ids and line ends are read as tables and old systems write them."""

import gzip
import io
import json
import zipfile

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import files
from vlm_fix.eval.scorers import answers, chair, pope
from vlm_fix.eval.scorers.amber import official
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import files as pope_files

ROW = {"image_id": 42, "caption": "A dog."}


def read(path, text, **how):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(row.id, row.reply) for row in answers.read(path, "{...}", **how).rows]


def zipped(**names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as book:
        for name, text in names.items():
            book.writestr(name.replace("__", "/"), text)
    return data.getvalue()


def damaged() -> bytes:
    whole = bytearray(gzip.compress(bytes(range(256)) * 400))
    whole[200:260] = b"\x00" * 60
    return bytes(whole)


LONG = "9" * 5000
BROKEN = {
    "a column twice": ("id,text,text\n1,a,b\n", "column 'text' twice"),
    "a column of TSV twice": ("id\ttext\ttext\n1\ta\tb\n", "column 'text' twice"),
    "a name twice": ('{"42": "A dog.", "42": "A cat."}', "name '42' twice"),
    "a name twice in a line": (
        '{"id": 1, "text": "a"}\n{"id": 2, "text": "a", "text": "b"}',
        "line 2 the name 'text' twice",
    ),
    "a name twice in an array": ('[{"id": 2, "text": "a", "text": "b"}]', "name 'text' twice"),
    "a number without end": (f'{{"id": {LONG}, "text": "a"}}\n', "Exceeds the limit"),
    "a number without end in a line": (
        f'{{"id": 1, "text": "a"}}\n{{"id": {LONG}, "text": "a"}}\n',
        "line 2.*Exceeds the",
    ),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "nested deeply in a line": ('{"id": 1, "text": "a"}\n{"id": ' + "[" * 100_000, "line 2.*nested too deeply"),
    "cut off": ('{"id": 1, "text": "a"}\n\n{"id": 2, "te', "line 3, the last: it is cut off: Unterminated string"),
    "damaged in the middle": ('{"id": 1, "text": "a"}\n{"id": 2, "te\n{"id": 3, "text": "a"}', "line 2: Unterminated"),
    "gzip, damaged": (damaged(), "Cannot read the answer file"),
    "gzip, cut off": (gzip.compress(b'{"id": 1}' * 99)[:20], "Cannot read the answer file"),
    "UTF-32": ('{"id": 1, "text": "a"}'.encode("utf-32"), "looks like UTF-32; .*iconv -f UTF-32"),
    "UTF-32 without a mark": ('{"id": 1, "text": "a"}'.encode("utf-32-le"), "looks like UTF-32"),
    "zip": (zipped(a__jsonl="{}"), "zip archive with a/jsonl: unpack it"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_get_one_sentence(fault, tmp_path):
    text, says = BROKEN[fault]
    with pytest.raises(VlmFixError, match=says) as error:
        read(tmp_path / "a", text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_column_of_parquet_twice(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_arrays([pa.array(["1"]), pa.array(["a"]), pa.array(["b"])], names=["id", "text", "text"])
    parquet.write_table(table, tmp_path / "a")
    with pytest.raises(VlmFixError, match="twice|Cannot read"):
        answers.read(tmp_path / "a", "{...}")
    (tmp_path / "b").write_bytes(b"PAR1aaaa")
    with pytest.raises(VlmFixError, match="as parquet"):
        answers.read(tmp_path / "b", "{...}")


@pytest.mark.parametrize(
    "number", ["Infinity", "1e400", "-Infinity", '"Infinity"', '"²"', f'"{LONG}"', "-3", "4.5", "true"]
)
def test_no_number_is_no_image(number, tmp_path):
    with pytest.raises(VlmFixError, match="no id of an image"):
        read(tmp_path / "a", f'{{"image_id": {number}, "caption": "A dog."}}', images=True)


@pytest.mark.parametrize("number", ["²", "٣", LONG, "1.5", "one"])
def test_no_number_is_no_id_of_amber(number, tmp_path):
    (tmp_path / "a").write_text(json.dumps([{"id": number, "response": "Yes"}]))
    with pytest.raises(VlmFixError, match="is no number"):
        official.score_file(tmp_path / "a", variant="pattern")


def test_no_number_is_no_place_in_a_joint_file(tmp_path):
    (tmp_path / "a").write_text(json.dumps([{"id": "²", "prompt": "Is there a dog?", "text": "Yes"}]))
    with pytest.raises(VlmFixError, match="do not line up"):
        pope_files.match(pope_files.official(), answers.read(tmp_path / "a", "{}"))


def test_ids_of_pandas_lose_their_point(tmp_path):
    path = tmp_path / "a"
    for text in ("id,text\n226988.0,Yes\n7.00,No\n", '[{"id": 226988.0, "text": "Yes"}, {"id": "7.0", "text": "No"}]'):
        assert read(path, text) == [("226988", "Yes"), ("7", "No")]
    assert read(path, "id,text\nv1.0,Yes\n1.5,No\n") == [("v1.0", "Yes"), ("1.5", "No")]
    path.write_text("image_id,caption\n42.0,A dog.\n")
    assert chair.files.load_captions(path) == [(42, "A dog.")]
    path.write_text("question_id,image,text,label\n1.0,a.jpg,Is there a dog?,yes\n")
    asked = pope_data.load_questions(path)
    for ids in ("1", "1.0"):
        path.write_text(f"question_id,answer\n{ids},Yes\n")
        assert pope.score.score(asked, pope_data.load_answers(path)).accuracy == 1


def test_an_object_from_id_to_a_list_of_one(tmp_path):
    assert read(tmp_path / "a", '{"42": ["A dog."], "43": "A cat.", "44": null}', images=True) == [
        ("42", "A dog."),
        ("43", "A cat."),
        ("44", None),
    ]


def test_lines_of_old_macs(tmp_path):
    assert read(tmp_path / "a", "id,text\r1,Yes\r2,No") == [("1", "Yes"), ("2", "No")]
    assert read(tmp_path / "a", 'id,text\r1,"Yes,\rit is"\r') == [("1", "Yes,\nit is")]
    assert read(tmp_path / "a", 'id,text\n1,"Yes,\rit is"\n') == [("1", "Yes,\rit is")]


def test_columns_without_a_name_may_be_several(tmp_path):
    assert read(tmp_path / "a", ",,id,text\n0,0,1,Yes\n") == [("1", "Yes")]
    (tmp_path / "a").write_text(json.dumps(ROW))
    assert files.read_rows(tmp_path / "a", "file") == [ROW]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_column_without_a_name_says_nothing(labelled, tmp_path):
    """Tables of pandas begin with the number of the row, which is no question, label or image."""
    (tmp_path / "a").write_text(",id,text" + ",label" * labelled + "\n5,1,Yes" + ",no" * labelled + "\n")
    (row,) = answers.read(tmp_path / "a", "{...}").rows
    assert (row.question, row.label, row.image, row.category) == ("", "no" if labelled else "", "", "")


@pytest.mark.parametrize("ids", ["a list", "pandas", "the index", "none"])
def test_a_table_by_its_columns(ids, tmp_path):
    texts: list | dict = {"0": "A dog.", "1": None}
    table = {"image_id": {"0": 42, "1": 43}, "caption": texts}
    table = {
        "a list": {"image_id": [42, 43], "caption": ["A dog.", None]},
        "pandas": table,
        "the index": {"caption": {"42": "A dog.", "43": None}},
        "none": {"caption": texts},
    }[ids]
    names = ["", ""] if ids == "none" else ["42", "43"]
    assert read(tmp_path / "a", json.dumps(table), images=ids != "none") == list(
        zip(names, ["A dog.", None], strict=True)
    )


@pytest.mark.parametrize("write", [int, str, lambda image: f"{image:012}", lambda image: f"val2014/{image:012}.jpg"])
def test_answers_by_the_number_of_the_image_and_the_question(write, tmp_path):
    asked = pope_data.coco_questions("popular")[:600]
    (tmp_path / "q").write_text("".join(json.dumps(vars(q)) + "\n" for q in asked))
    rows = [{"image_id": write(int(q.image[-16:-4])), "question": q.text, "answer": q.label} for q in reversed(asked)]
    (tmp_path / "a").write_text(json.dumps(rows))
    assert pope.BENCHMARK.score_files(str(tmp_path / "a"), questions=str(tmp_path / "q")).accuracy == 1
