"""Captions, AMBER and MME in every layout that people have."""

import json
import random

import pytest

from tests.support.answer_files import SUFFIX, TASKS, lines, mme_rows
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import chair, mme
from vlm_fix.eval.scorers.amber import data as amber_data
from vlm_fix.eval.scorers.amber import official as amber_official

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
    result = chair.BENCHMARK.score_files(str(tmp_path / "a.json"), variant="pattern")
    assert [(c.image_id, c.caption) for c in result.captions] == list(CAPTIONS.items())
    assert result.chair_s == 0.5 and [o.node for o in result.captions[0].hallucinated] == ["zebra"]


def test_a_caption_of_null_is_left_out_and_told(tmp_path):
    told: list[str] = []
    said = [{"image_id": 9, "caption": "A giraffe."}, {"image_id": 25, "caption": "A giraffe."}]
    whole = chair.BENCHMARK.score_files(lines(tmp_path / "b", said[1:]), variant="pattern")
    path = lines(tmp_path / "a", [{**said[0], "caption": None}, said[1]])
    assert chair.BENCHMARK.score_files(path, variant="pattern", tell=told.append) == whole
    where = "plain rows (reply in caption, id in image_id)"
    assert told == [f"read 2 answers from {path}: JSON lines, {where}; 1 of them null, which are left out"]
    with pytest.raises(VlmFixError, match="all 2 are null"):
        chair.BENCHMARK.score_files(
            lines(tmp_path / "c", [{**row, "caption": None} for row in said]), variant="pattern"
        )


def test_failing_is_no_way_to_fewer_hallucinations(tmp_path, capsys):
    base = [{"image_id": image, "caption": "A giraffe and a zebra."} for image in (9, 25, 30, 34)]
    failed = lines(tmp_path / "m", [{**row, "caption": None} if row["image_id"] == 9 else row for row in base])
    options = ["compare", lines(tmp_path / "b", base), failed, "--benchmark", "chair", "--variant", "pattern"]
    assert cli.main(options) == 2
    assert "--common" in capsys.readouterr().err
    assert cli.main([*options, "--common"]) == 0
    assert "no difference seen" in capsys.readouterr().out


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


def test_mme_in_one_file_equals_its_folder_and_is_in_points(tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    for task in TASKS:
        rows = mme_rows(lambda t, *fields: (t, "\t".join(fields)))
        (folder / f"{task}.txt").write_text("".join(f"{row}\n" for t, row in rows if t == task))
    expected = mme.BENCHMARK.score_files(str(folder))
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
        assert mme.BENCHMARK.score_files(lines(tmp_path / "a", mme_rows(make))) == expected, name
    csv = "category,image,question,label,response\n" + "".join(
        ",".join(row.values()) + "\n" for row in mme_rows(layouts["plain"])
    )
    (tmp_path / "a.csv").write_text(csv)
    assert mme.BENCHMARK.score_files(str(tmp_path / "a.csv")) == expected
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
    assert mme.BENCHMARK.score_files(llava, questions=str(release)) == expected
    assert cli.main(["score", "mme", llava]) == 2
    assert "row 1: no truth; add it, or give MME's folder with --questions" in capsys.readouterr().err
    assert cli.main(["score", "mme", str(folder), "--questions", str(release)]) == 2
    assert "--questions has no effect on a folder of TASK.txt" in capsys.readouterr().err


@pytest.mark.parametrize("images", [True, False])
def test_an_empty_text_is_an_answer_and_an_empty_cell_a_failure_and_both_are_told(images, tmp_path):
    from vlm_fix.eval.scorers import answers as reader

    key = "caption" if images else "response"
    rows = [{"id": str(n), key: text} for n, text in enumerate(["A dog, yes.", "", " ", None, "No"], 1)]
    table = "".join(f'{row["id"]},"{row[key] or ""}"\n' for row in rows)
    (tmp_path / "table").write_text(f"id,{key}\n{table}")
    found = reader.read(lines(tmp_path / "rows", rows), "{}", images=images)
    assert [row.reply for row in found.rows] == ["A dog, yes.", "", " ", None, "No"]
    assert "; 1 of them null, which count as failed; 2 of them empty texts, which count as answers" in found.told()
    cells = reader.read(tmp_path / "table", "{}", images=images)
    assert [row.reply for row in cells.rows if row.reply and row.reply.strip()] == ["A dog, yes.", "No"]
    assert [row.reply for row in cells.rows].count(None) >= 2 and "null, which count as failed" in cells.told()
