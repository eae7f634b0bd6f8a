"""The reader of answers: every layout and file format that people have, one value each; and what it refuses to guess."""

import doctest
import gzip
import io
import json
import random
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import DATA
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import files
from vlm_fix.eval.scorers import answers, chair, hallusion, mme, pope, yesno
from vlm_fix.eval.scorers.amber import data as amber_data
from vlm_fix.eval.scorers.amber import official as amber_official
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import files as pope_files

LLAVA = DATA / "pope" / "answers_llava15"
needs_llava = pytest.mark.skipif(not LLAVA.exists(), reason=f"LLaVA's answers are not in {LLAVA}")
OFFICIAL = {  # printed by POPE's evaluate.py on LLaVA-1.5-7B's answers: TP, FP, TN, FN
    "random": (1339, 98, 1402, 161),
    "popular": (1339, 216, 1284, 161),
    "adversarial": (1341, 366, 1134, 159),
}
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
SUFFIX = "\nAnswer the question using a single word or phrase."


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, **how) -> list[tuple[str, str | None]]:
    return [(row.id, row.reply) for row in answers.read(path, "{...}", **how).rows]


# ------------------------------------------------------------------------------------------------------- file formats

ROWS = [{"question_id": "1", "answer": 'Yes, "two" dogs\u2028or\x0cthree'}, {"question_id": "2", "answer": "No"}]
EXPECTED = [(row["question_id"], row["answer"]) for row in ROWS]


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


# ------------------------------------------------------------------------------------------- nothing is guessed (S10)


@pytest.mark.parametrize(
    "row, how, says",
    [
        ({"question_id": 1, "text": "Is it?", "answer": "Yes"}, {}, 'both "text" and "answer" .* --answer-key answer'),
        ({"image_id": 1, "caption": "A", "text": "B"}, {"images": True}, 'both "caption" and "text"'),
        ({"id": 1, "response_vcd": "A", "response_pai": "B"}, {}, 'both "response_vcd" and "response_pai"'),
        ({"id": 1, "question_id": 2, "text": "A"}, {}, r'both "question_id" \(2\) and "id" \(1\) .* --id-key'),
        ({"image_id": 9, "id": 8, "caption": "A"}, {"images": True}, r'both "image_id" \(9\) and "id" \(8\)'),
        ({"image": "COCO_val2014_000000000009.jpg", "question_id": 8, "text": "A"}, {"images": True}, "--id-key image"),
        ({"id": 1, "words": "A"}, {}, 'no "text" or "answer" .*its keys are id, words.*--answer-key'),
        ({"id": 1, "text": "A"}, {"keys": answers.Keys("says")}, 'no "says" .*as --answer-key'),
        ({"id": 1, "text": "A"}, {"keys": answers.Keys(None, "says")}, 'no "says" .*as --id-key'),
        ({"id": 1, "text": ["A", "B"]}, {}, r"the reply in \"text\" is \['A', 'B'\], not a text"),
        ({"id": 1, "text": True}, {}, "is True, not a text"),
        ({"id": True, "text": "A"}, {}, "is True, which is no id"),
    ],
)
def test_two_candidates_are_an_error_that_names_both(row, how, says, tmp_path):
    with pytest.raises(VlmFixError, match=says):
        read(lines(tmp_path / "a", [row]), **how)


def test_the_options_decide(tmp_path, capsys):
    questions = [{"question_id": i, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"} for i in (1, 2)]
    asked = lines(tmp_path / "q", questions)
    given = lines(tmp_path / "a", [{**row, "id": 7, "answer": "yes"} for row in questions])
    assert cli.main(["score", "pope", asked, given]) == 2
    assert "--answer-key answer" in capsys.readouterr().err
    assert cli.main(["score", "pope", asked, given, "--answer-key", "answer"]) == 2
    assert "--id-key question_id" in capsys.readouterr().err
    keys = ["--answer-key", "answer", "--id-key", "question_id", "--json"]
    assert cli.main(["score", "pope", asked, given, *keys]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["accuracy"] == 1
    assert "JSON lines, plain rows (reply in answer, id in question_id)" in err
    captions = [{"image_id": 9, "text": "Describe the zebra.", "answer": "A bowl."}]
    path = lines(tmp_path / "c", captions)
    assert cli.main(["score", "chair", path, "--variant", "pattern"]) == 2
    assert cli.main(["score", "chair", path, "--variant", "pattern", "--answer-key", "answer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chair_s"] == 0


def test_candidates_that_say_the_same_are_no_conflict(tmp_path):
    row = {"image_id": 391895, "image": "val2014/COCO_val2014_000000391895.jpg", "id": "cap_2", "caption": "A dog"}
    assert read(lines(tmp_path / "a", [row]), images=True) == [("391895", "A dog")]


@pytest.mark.parametrize(
    "name, number",
    [
        ("COCO_val2014_000000391895.jpg", 391895),
        ("COCO_train2014_000000000042", 42),
        ("/data/val2017/000000062554.png", 62554),
        (r"D:\coco\COCO_val2014_000000391895.JPG", 391895),
        ("391895", 391895),
        (42.0, 42),
        ("42.jpg", 42),
        *[(name, None) for name in ("COCO_val2014_000000391895_25", "COCO_val2014_391895.jpg", "vg_123.jpg", "img25")],
        *[(name, None) for name in ("COCO_val2014_0000000391895.jpg", "000000391895_blur.jpg", 4.5, True, "")],
    ],
)
def test_an_image_is_named_by_its_12_digits_or_refused(name, number, tmp_path):
    path = lines(tmp_path / "a", [{"image_id": name, "caption": "A dog"}])
    if number is not None:
        assert chair.files.load_captions(path) == [(number, "A dog")]
    else:
        with pytest.raises(VlmFixError, match="which is no id of an image: a number, or a COCO name with 12 digits"):
            chair.files.load_captions(path)


def test_worked_example():
    assert doctest.testmod(answers) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------- POPE


def counts(found: dict) -> tuple:
    return tuple(found[name] for name in ("tp", "fp", "tn", "fn"))


@pytest.fixture(scope="module")
def replies():
    """LLaVA-1.5-7B's real answers by split."""
    return {kind: files.read_rows(LLAVA / f"coco_{kind}.jsonl", "answers") for kind in OFFICIAL}


@pytest.fixture
def joint(replies):
    """The same in LLaVA's joint file: three splits one after the other, ids with offsets, no image."""
    return [
        {"question_id": offset + row["question_id"], "prompt": row["prompt"] + SUFFIX, "text": row["text"]}
        for kind, offset in OFFSETS.items()
        for row in replies[kind]
    ]


def kit_rows(replies):
    """VLMEvalKit's POPE: a question that several splits share comes once, its category names them all."""
    merged: dict = {}
    for kind, rows in replies.items():
        for question, row in zip(pope_data.coco_questions(kind), rows, strict=True):
            first = {"question": question.text, "answer": question.label.capitalize(), "prediction": row["text"]}
            merged.setdefault((question.image, question.text), first | {"kinds": []})["kinds"].append(kind)
    return [
        {"index": i, **{k: row[k] for k in ("question", "answer", "prediction")}, "category": ",".join(row["kinds"])}
        for i, row in enumerate(merged.values())
    ]


@needs_llava
def test_llavas_joint_file_is_three_splits(joint, tmp_path):
    found = pope.score_files(lines(tmp_path / "a", joint))
    assert {split: counts(found[split]) for split in OFFICIAL} == OFFICIAL
    checked = [*(f"{split} RePOPE" for split in OFFSETS), "mean", "overall", "mean RePOPE", "overall RePOPE"]
    assert list(found) == [*OFFSETS, *checked]
    assert found["mean"]["accuracy"] == pytest.approx((0.825 + 0.91367 + 0.87433) / 3, abs=1e-5)
    shuffled = random.Random(0).sample(joint, len(joint))
    assert pope.score_files(lines(tmp_path / "b", shuffled)) == found
    as_text = [{**row, "question_id": str(row["question_id"])} for row in joint]
    assert pope.score_files(lines(tmp_path / "c", as_text)) == found
    two = [row for row in joint if row["question_id"] > 10_000_000]
    assert pope.score_files(lines(tmp_path / "d", two)).keys() == {
        *("random", "popular", "mean", "overall"),
        *("random RePOPE", "popular RePOPE", "mean RePOPE", "overall RePOPE"),
    }


@needs_llava
def test_the_older_release_has_8910_questions(joint, tmp_path):
    """`random` of 2910 questions, by the package, by a folder of label files, and by a question file without labels."""
    old = pope_files.official()[pope_files.OLD]
    assert len(old) == 2910 and sum(question.label == "yes" for question in old) == 1500
    rng = random.Random(1)
    mine = [
        {"question_id": 10_000_000 + i, "prompt": q.text + SUFFIX, "text": rng.choice(["Yes", "No"])}
        for i, q in enumerate(old, 1)
    ]
    rows = joint[:3000] + mine + joint[6000:]
    right = sum((row["text"] == "Yes") == (q.label == "yes") for row, q in zip(mine, old, strict=True))
    path = lines(tmp_path / "a", rows)
    found = pope.score_files(path)
    assert [found[split]["n"] for split in OFFSETS] == [3000, 2910, 3000]
    assert found["random"]["accuracy"] == right / 2910
    assert {split: counts(found[split]) for split in ("popular", "adversarial")} == {
        split: OFFICIAL[split] for split in ("popular", "adversarial")
    }
    folder = tmp_path / "coco"
    folder.mkdir()
    by_split = {"popular": pope_data.coco_questions("popular"), "adversarial": pope_data.coco_questions("adversarial")}
    for split, questions in (by_split | {"random": old}).items():
        lines(folder / f"coco_pope_{split}.json", [vars(q) for q in questions])
    assert pope.score_files(path, str(folder)) == found
    unlabelled = [
        {"question_id": row["question_id"], "image": q.image, "text": row["prompt"], "category": split}
        for split, part, questions in (
            ("adversarial", joint[:3000], by_split["adversarial"]),
            ("random", mine, old),
            ("popular", joint[6000:], by_split["popular"]),
        )
        for row, q in zip(part, questions, strict=True)
    ]
    asked = lines(tmp_path / "llava_pope_test.jsonl", unlabelled)
    by_id = pope.score_files(lines(tmp_path / "b", rows[::-1]), asked)  # whatever the order
    assert {split: counts(by_id[split]) for split in OFFSETS} == {split: counts(found[split]) for split in OFFSETS}


@needs_llava
def test_an_incomplete_joint_file_says_how_far_it_goes(joint, tmp_path):
    with pytest.raises(
        VlmFixError, match=r"5712 answers, of which the first 3000 .* \(3000 of adversarial\); give all"
    ):
        pope.score_files(lines(tmp_path / "a", joint[:5712]))
    joint[4000]["prompt"] = "Is there a unicorn in the image?"
    with pytest.raises(VlmFixError, match="the first 3000 are those to whole splits"):
        pope.score_files(lines(tmp_path / "a", joint))


@needs_llava
@pytest.mark.parametrize(
    "form", ["plain", "upper and spaces", "CSV", "lmms-eval", "id and response", "image and prompt"]
)
def test_one_split_in_every_layout(form, replies, tmp_path):
    rows = replies["popular"]
    made = {
        "plain": [{"question_id": row["question_id"], "answer": row["text"]} for row in rows],
        "upper and spaces": [{"question": f" {r['prompt'].upper()}  ", "answer": r["text"]} for r in rows],
        "CSV": [{"question_id": row["question_id"], "text": row["text"]} for row in rows],
        "lmms-eval": [
            {
                "doc_id": i,
                "target": question.label,
                "filtered_resps": row["text"],
                "input": row["prompt"] + SUFFIX,
                "pope_accuracy": {"question_id": str(row["question_id"]), "score": 1.0, "prediction": "-"},
            }
            for i, (row, question) in enumerate(zip(rows, pope_data.coco_questions("popular"), strict=True))
        ],
        "id and response": [{"id": str(row["question_id"]), "response": row["text"]} for row in rows],
        "image and prompt": [
            {
                "question_id": 3 * i,
                "image": f"val2014/{row['image']}",
                "prompt": row["prompt"] + SUFFIX,
                "text": row["text"],
            }
            for i, row in enumerate(rows)
        ],
    }[form]
    path = lines(tmp_path / "a", made)
    if form == "CSV":
        body = "".join(f"{row['question_id']},{row['text']}\n" for row in made)
        path = str(tmp_path / "a.csv")
        Path(path).write_text("question_id,text\n" + body)
    questions = lines(tmp_path / "q.json", [vars(q) for q in pope_data.coco_questions("popular")])
    assert counts(pope.score_files(path, questions).to_dict()) == OFFICIAL["popular"]
    if form in ("upper and spaces", "lmms-eval"):  # the questions tell which split it is
        assert counts(pope.score_files(path).to_dict()) == OFFICIAL["popular"]


@needs_llava
def test_vlmevalkits_file_has_labels_and_splits_of_its_own(replies, tmp_path):
    told: list[str] = []
    rows = kit_rows(replies)
    found = pope.score_files(lines(tmp_path / "a", rows), scorer="vlmevalkit", tell=told.append)
    assert len(rows) == 5127 and [found[kind]["n"] for kind in OFFICIAL] == [3000] * 3
    # printed by VLMEvalKit@e8e78f0 on this file: F1 and accuracy
    printed = {
        "random": (91.181478, 91.366667),
        "popular": (87.688278, 87.466667),
        "adversarial": (83.504833, 82.366667),
    }
    for split, figures in (printed | {"overall": (87.345075, 87.066667)}).items():
        assert [100 * found[split][name] for name in ("f1", "accuracy")] == pytest.approx(figures, abs=1e-6)
    assert "rows of VLMEvalKit (reply in prediction, id in index)" in told[0] and "of the answer file" in told[1]
    sheet_rows = [[*rows[0]], *[[str(cell) for cell in row.values()] for row in rows]]
    (tmp_path / "model_POPE.xlsx").write_bytes(sheet(sheet_rows))
    assert pope.score_files(str(tmp_path / "model_POPE.xlsx"), scorer="vlmevalkit") == found


def test_labels_that_differ_are_told(tmp_path):
    told: list[str] = []
    asked = lines(tmp_path / "q", [{"question_id": 1, "image": "a.jpg", "text": "A dog?", "label": "yes"}])
    given = lines(tmp_path / "a", [{"question_id": 1, "label": "no", "text": "Yes"}])
    assert pope.score_files(given, asked, tell=told.append).accuracy == 1
    assert told[-1] == "note: 1 label of the answer file differs from the questions', which are used"


# --------------------------------------------------------------------------------------------------------------- CHAIR

CAPTIONS = {9: "A bowl of broccoli and a zebra.", 25: "Two giraffes near a tree."}
CHAIR = {
    "imgToEval": {
        "imgToEval": {str(i): {"image_id": i, "caption": c} for i, c in CAPTIONS.items()},
        "overall": {"CIDEr": 1.0},
    },
    "imgToEval, ids as names alone": {"imgToEval": {str(i): {"caption": c} for i, c in CAPTIONS.items()}},
    "sentences": {
        "sentences": [{"image_id": i, "caption": c, "metrics": {"CHAIRs": 0}} for i, c in CAPTIONS.items()],
        "overall_metrics": {"CHAIRs": 0.5},
    },
    "id and response": [{"id": i, "response": c} for i, c in CAPTIONS.items()],
    "LLaVA": [{"question_id": str(i), "prompt": "Describe.", "text": c} for i, c in CAPTIONS.items()],
    "names": [{"image": f"COCO_train2014_{i:012}.jpg", "text": c} for i, c in CAPTIONS.items()],
    "id to caption": {f"COCO_train2014_{i:012}.jpg": c for i, c in CAPTIONS.items()},
    "lmms-eval": [
        {"doc_id": n, "filtered_resps": [c], "chair_s": {"answer": [], "pred": [], "image_id": i}, "target": "[]"}
        for n, (i, c) in enumerate(CAPTIONS.items())
    ],
}


@pytest.mark.parametrize("layout", CHAIR)
def test_captions_in_every_layout(layout, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CHAIR[layout]))
    result = chair.score_files(str(tmp_path / "a.json"), variant="pattern")
    assert [(c.image_id, c.caption) for c in result.captions] == list(CAPTIONS.items())
    assert result.chair_s == 0.5 and [o.node for o in result.captions[0].hallucinated] == ["zebra"]


def test_a_caption_of_null_is_left_out_and_told(tmp_path):
    told: list[str] = []
    said = [{"image_id": 9, "caption": "A giraffe."}, {"image_id": 25, "caption": "A giraffe."}]
    whole = chair.score_files(lines(tmp_path / "b", said[1:]), variant="pattern")
    path = lines(tmp_path / "a", [{**said[0], "caption": None}, said[1]])
    assert chair.score_files(path, variant="pattern", tell=told.append) == whole
    where = "plain rows (reply in caption, id in image_id)"
    assert told == [f"read 2 answers from {path}: JSON lines, {where}; 1 of them null, which are left out"]
    with pytest.raises(VlmFixError, match="all 2 are null"):
        chair.score_files(lines(tmp_path / "c", [{**row, "caption": None} for row in said]), variant="pattern")


def test_failing_is_no_way_to_fewer_hallucinations(tmp_path, capsys):
    base = [{"image_id": image, "caption": "A giraffe and a zebra."} for image in (9, 25, 30, 34)]
    failed = lines(tmp_path / "m", [{**row, "caption": None} if row["image_id"] == 9 else row for row in base])
    options = ["compare", lines(tmp_path / "b", base), failed, "--benchmark", "chair", "--variant", "pattern"]
    assert cli.main(options) == 2
    assert "--common" in capsys.readouterr().err
    assert cli.main([*options, "--common"]) == 0
    assert "no difference seen" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- AMBER


@pytest.mark.parametrize("layout", ["id, response_*", "LLaVA", "ids as texts", "VLMEvalKit"])
def test_ambers_questions_in_every_layout(layout, tmp_path):
    rng = random.Random(0)
    asked = [q for q in amber_data.questions() if q.kind == "relation"]
    said = [rng.choice(["Yes", "No"]) for _ in asked]
    right = sum(one.lower() == q.label for one, q in zip(said, asked, strict=True)) / len(asked)
    rows = [
        {
            "id, response_*": {"id": q.id, "response_llava": one},
            "LLaVA": {"question_id": q.id, "prompt": q.text, "text": one},
            "ids as texts": {"id": str(q.id), "response": one},
            "VLMEvalKit": {
                "index": n,
                "question": q.text,
                "answer": q.label,
                "prediction": one,
                "category": "discriminative-relation",
                "image_path": q.image,
            },
        }[layout]
        for n, (q, one) in enumerate(zip(asked, said, strict=True))
    ]
    found = amber_official.score_file(lines(tmp_path / "a", rows), variant="pattern")
    assert found["relation"].figures["accuracy"] == right and found["relation"].n == 1664


# ----------------------------------------------------------------------------------------------------------------- MME

TASKS = {"existence": ["Yes", "No"], "count": ["Yes", "Yes"], "OCR": ["No", "No"]}


def mme_rows(make):
    """Three tasks of two images; the reply is the first word of TASKS for the first question, the second for the second."""
    return [
        make(task, f"{n}.jpg", f"Is there a {what}? Please answer yes or no.", truth, reply)
        for task, replies in TASKS.items()
        for n in (1, 2)
        for what, truth, reply in zip(("dog", "cat"), ("Yes", "No"), replies, strict=True)
    ]


def test_mme_in_one_file_equals_its_folder_and_is_in_points(tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    for task in TASKS:
        rows = mme_rows(lambda t, *fields: (t, "\t".join(fields)))
        (folder / f"{task}.txt").write_text("".join(f"{row}\n" for t, row in rows if t == task))
    expected = mme.score_files(str(folder))
    assert {task: each["score"] for task, each in expected.items()} == {"existence": 200, "count": 50, "OCR": 50}
    layouts = {
        "plain": lambda t, i, q, l, r: {"category": t, "image": i, "question": q, "label": l, "response": r},
        "VLMEvalKit": lambda t, i, q, l, r: {
            "index": f"{t}{i}{q}",
            "category": t,
            "image_path": f"{t}/{i}",
            "question": q,
            "answer": l,
            "prediction": r,
        },
        "lmms-eval": lambda t, i, q, l, r: {
            "doc_id": f"{t}{i}{q}",
            "target": l,
            "input": q,
            "filtered_resps": [r],
            "mme_perception_score": {"question_id": f"{t}/{i}", "category": t, "score": 1.0},
        },
    }
    for name, make in layouts.items():
        assert mme.score_files(lines(tmp_path / "a", mme_rows(make))) == expected, name
    csv = "category,image,question,label,response\n" + "".join(
        ",".join(row.values()) + "\n" for row in mme_rows(layouts["plain"])
    )
    (tmp_path / "a.csv").write_text(csv)
    assert mme.score_files(str(tmp_path / "a.csv")) == expected
    release = tmp_path / "release"
    for task in TASKS:
        (release / task).mkdir(parents=True)
        for n in (1, 2):
            (release / task / f"{n}.jpg").write_bytes(b"")
            asked = [f"Is there a {what}? Please answer yes or no.\t{l}" for what, l in (("dog", "Yes"), ("cat", "No"))]
            (release / task / f"{n}.txt").write_text("\n".join(asked))
    llava = lines(
        tmp_path / "llava.jsonl",
        mme_rows(
            lambda t, i, q, l, r: {
                "question_id": f"{t}/images/{i}",
                "prompt": q.replace(" Please answer yes or no.", SUFFIX),
                "text": r,
            }
        ),
    )
    assert mme.score_files(llava, questions=str(release)) == expected
    assert cli.main(["score", "mme", llava]) == 2
    assert "row 1: no truth; add it, or give MME's folder with --questions" in capsys.readouterr().err
    assert cli.main(["score", "mme", str(folder), "--questions", str(release)]) == 2
    assert "--questions has no effect on a folder of TASK.txt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ HallusionBench


def asked() -> list[dict]:
    return files.read_rows(files.DATA / "hallusion/hallusionbench.jsonl.gz", "HallusionBench")


def place(row: dict, visual: bool = False) -> str:
    keys = ("category", "subcategory", *["visual_input"] * visual, "set_id", "figure_id", "question_id")
    return "_".join(row[key] for key in keys)


@pytest.mark.parametrize("layout", ["official", "LLaVA", "LLaVA in order", "VLMEvalKit", "lmms-eval"])
def test_hallusionbench_in_every_layout(layout, tmp_path):
    rows = [row for row in asked() if row["visual_input"] != "0"]  # 951, as other harnesses ask
    rng = random.Random(3)
    said = [rng.choice(["Yes.", "No."]) for _ in rows]
    made = [
        {
            "official": {**row, "model_prediction": one},
            "LLaVA": {"question_id": place(row), "prompt": row["question"], "text": one},
            "LLaVA in order": {"question_id": n, "prompt": row["question"] + SUFFIX, "text": one},
            "VLMEvalKit": {"index": place(row, True), "question": row["question"], "answer": "Yes", "prediction": one},
            "lmms-eval": {"doc_id": n, "filtered_resps": one, "target": "1", "aAcc": {**row, "model_prediction": one}},
        }[layout]
        for n, (row, one) in enumerate(zip(rows, said, strict=True))
    ]
    told: list[str] = []
    found = hallusion.score_files(lines(tmp_path / "a", made), tell=told.append)["overall"]
    right = sum((one == "Yes.") == (row["gt_answer"] == "1") for row, one in zip(rows, said, strict=True))
    assert found["n"] == 951 and found["aAcc"] == right / 951
    assert found["mean"] == pytest.approx((found["aAcc"] + found["fAcc"] + found["qAcc"]) / 3)
    assert told[-1].startswith(
        "note: 951 of HallusionBench's 1129 questions are answered; the others (first VS_chart_0_0_0)"
    )


def test_hallusionbench_of_vlmevalkit_has_its_figures(tmp_path):
    """Printed by VLMEvalKit@e8e78f0 on these answers: aAcc, fAcc and qAcc."""
    rng = random.Random(0)
    odd = ["Yes, it is", "No.", "Unclear", "Yes and no"]
    rows = []
    for question in [q for q in hallusion.questions() if q.image]:
        index = [question.category, question.subcategory, question.visual]
        reply = question.label if rng.random() < 0.7 else rng.choice(odd)
        row = {"index": "_".join([*index, question.set, question.figure, question.question]), "prediction": reply}
        rows.append(row | {"question": question.text, "answer": question.label.capitalize()})
    found = hallusion.score_files(lines(tmp_path / "a", rows))
    printed = {
        "overall": (75.920084, 48.554913, 57.362637),
        "VD": (77.326565, 53.478261, 58.844765),
        "VS": (73.611111, 38.793103, 55.056180),
    }
    for part, figures in printed.items():
        assert [100 * found[part][name] for name in ("aAcc", "fAcc", "qAcc")] == pytest.approx(figures, abs=1e-6)
        assert 100 * found[part]["mean"] == pytest.approx(sum(figures) / 3, abs=1e-6)


@pytest.mark.parametrize("kind", [int, str, float])
def test_marks_of_a_judge_in_every_writing(kind, tmp_path):
    rng = random.Random(5)
    marks = [rng.choice([0, 1, 1, 2]) for _ in asked()]
    rows = [{**row, "gpt4v_output_gpt_check": kind(mark)} for row, mark in zip(asked(), marks, strict=True)]
    if kind is float:
        rows = [{**row, "gpt4v_output_gpt_check": int(row["gpt4v_output_gpt_check"])} for row in rows]
    found = hallusion.score_files(lines(tmp_path / "a", rows))["overall"]  # marks alone: the scorer is official
    blind = [row["category"] == "VS" and row["figure_id"] == "0" for row in asked()]
    right = sum(mark == 1 or (mark == 2 and alone) for mark, alone in zip(marks, blind, strict=True))
    assert found["scorer"] == "official" and found["aAcc"] == right / 1129


def test_hallusionbench_null_is_a_failure_and_a_missing_key_a_question_not_asked(tmp_path):
    rows = [{**row, "model_prediction": None} for row in asked()]
    assert hallusion.score_files(lines(tmp_path / "a", rows))["overall"]["aAcc"] == 0  # in 178 it counted as right
    for row in rows[:1000]:
        row["model_prediction"] = {"0": "No", "1": "Yes"}[row["gt_answer"]]
    rows = [row for row in rows[:1000]] + [
        {k: v for k, v in row.items() if k != "model_prediction"} for row in rows[1000:]
    ]
    found = hallusion.score_files(lines(tmp_path / "b", rows))["overall"]
    assert found["n"] == 1000 and found["aAcc"] == found["qAcc"] == found["fAcc"] == 1
    with pytest.raises(VlmFixError, match="all replies in model_prediction are 0, 1 or 2: if a judge gave these marks"):
        hallusion.score_files(lines(tmp_path / "c", [{**row, "model_prediction": "1"} for row in asked()]))


# ------------------------------------------------------------------------------------------------------ misread answers

REPLIES = [
    "YES",
    "**No**",
    "<think>Is there a dog? Yes, perhaps.</think>\nNo.",
    "是的",
    "没有。",
    "Non.",
    "NO!",
    "Yes",
    "A dog.",
]
PLAIN = ["yes", "no", "no", "yes", "no", "no", "no", "yes", "unknown"]


@pytest.mark.parametrize("scorer", ["official", "opera", "vcd", "lmms", "vlmevalkit", "ours"])
def test_misread_answers_are_counted_for_every_scorer(scorer):
    said = [yesno.verdict(reply, "no", scorer) for reply in REPLIES]
    wrong = [r for r, one, plain in zip(REPLIES, said, PLAIN, strict=True) if plain not in ("unknown", one)]
    found = yesno.misread([*REPLIES, None], [*said, "unknown"])
    assert found.n == len(wrong) and (scorer == "ours") == (not wrong)
    if wrong:
        assert found.example.startswith(f'"{wrong[0][:10]}')
    assert [yesno.plain(reply) for reply in REPLIES] == PLAIN


@pytest.mark.parametrize("benchmark", ["pope", "amber", "mme", "hallusion"])
def test_the_command_says_how_many_are_misread_and_what_reads_them(benchmark, tmp_path, capsys):
    if benchmark == "pope":
        rows = [{"question_id": i, "image": "a.jpg", "text": "A dog?", "label": "no"} for i in (1, 2)]
        given = ["NO!", "No"]
        where = [
            lines(tmp_path / "q", rows),
            lines(tmp_path / "a", [{"id": i + 1, "text": t} for i, t in enumerate(given)]),
        ]
    elif benchmark == "amber":
        asked_ = [q for q in amber_data.questions() if q.kind == "relation"]
        where = [lines(tmp_path / "a", [{"id": q.id, "response": "No" if n else "no."} for n, q in enumerate(asked_)])]
    elif benchmark == "mme":
        rows = mme_rows(lambda t, i, q, l, r: {"category": t, "image": i, "question": q, "label": l, "response": r})
        rows[0]["response"] = "**Yes**, there is"
        rows[0]["response"] = "<b>Answer</b>: Yes"
        where = [lines(tmp_path / "a", rows)]
    else:
        rows = [{**row, "model_prediction": "No" if n else "Nein"} for n, row in enumerate(asked())]
        where = [lines(tmp_path / "a", rows)]
    assert cli.main(["score", benchmark, *where, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    parts = [found] if benchmark == "pope" else list(found.values())
    assert max(part["misread"] for part in parts) == 1
    notes = [line for line in err.splitlines() if "takes 1 answer against its plain word: " in line]
    assert notes and all(line.endswith("; --scorer ours reads it") for line in notes)
    assert cli.main(["score", benchmark, *where, "--scorer", "ours"]) == 0
    assert "plain word" not in capsys.readouterr().err
