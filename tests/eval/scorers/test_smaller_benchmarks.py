"""DASH-B, BEAF, Reefknot, OPOPE, FOHE, R-Bench and POPE by probability: complete synthetic answers against plain loops.

The official scripts were run beside these scorers on answers of this kind, and on real ones where they are public; the
figures agreed to the last digits. The loops here are written from their rules.
"""

import doctest
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.answer_files import lines
from tests.support.paths import DATA
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import length, tasks
from vlm_fix.eval.scorers import beaf, dash_b, listed, opope, pope_prob, reefknot
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.registry import once
from vlm_fix.eval.settings import Settings

LISTS = DATA / "dash_b"
REPLIES = ["Yes.", "No.", "yes it is", "No, there is not.", "I do not know", "The sky", "", "Yes. No"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert cli.main(["score", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("module", [beaf, dash_b, length, listed, opope, pope_prob, reefknot])
def test_worked_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.skipif(not LISTS.exists(), reason=f"DASH-B's lists are not at {LISTS}")
def test_dash_b_on_answers_to_all_its_images(tmp_path: Path, capsys: Any) -> None:
    rng, asked = random.Random(0), dash_b.questions(LISTS)
    assert len(asked) == 2682 and sum(q.label == "yes" for q in asked) == 1341
    assert asked[0].text == "Can you see a backpack in this image? Please answer only with yes or no."
    rows = [
        {"img_id": q.image.split("/")[-1], "object_name": q.object, "gt": q.label, "response": rng.choice(REPLIES)}
        for q in asked
    ]
    right = {"yes": 0, "no": 0}
    for row in rows:
        low = row["response"].lower()
        right[row["gt"]] += (row["gt"] == "yes") if "yes" in low else (row["gt"] == "no" and "no" in low)
    tnr, tpr = right["no"] / 1341, right["yes"] / 1341
    file = write(tmp_path / "answers.jsonl", rows)
    got = shown(capsys, "dash-b", file)["questions"]
    assert (got["accuracy"], got["tnr"], got["tpr"]) == (sum(right.values()) / 2682, tnr, tpr)
    assert got["harmonic"] == pytest.approx(2 * tpr * tnr / (tpr + tnr), abs=1e-15) and got["unparsed"] > 0
    assert cli.main(["compare", file, file, "--benchmark", "dash-b"]) == 0
    assert "no difference seen: accuracy" in capsys.readouterr().out
    write(tmp_path / "answers.jsonl", [*rows, rows[0]])
    assert cli.main(["score", "dash-b", file]) == 2
    assert "two answers of 1 image" in capsys.readouterr().err


def beaf_questions(rng: random.Random, images: int = 60) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(images):
        names = rng.sample(["dog", "cat", "car", "cup"], 3)
        labels = {name: rng.choice(["yes", "no"]) for name in names} | {names[0]: "yes"}
        for copy in range(rng.randint(1, 3)):  # 0 is the original
            for name in names:
                removed = copy > 0 and name == names[0]
                file = f"COCO_val2014_{i:012d}" + (f"_{copy:02d}" if copy else "") + ".jpg"
                row = {"id": len(rows), "image": file, "question": f"Is there a {name}?", "orig_img": copy == 0}
                rows.append({**row, "gt": "no" if removed else labels[name], "removed_q": removed})
    return rows


def test_beaf_on_every_pair(tmp_path: Path, capsys: Any) -> None:
    rng = random.Random(0)
    asked = beaf_questions(rng)
    said = [rng.choice(["yes", "no"]) for _ in asked]
    pairs, others, changed = dict.fromkeys(["yesno", "noyes", "yesyes", "nono"], 0), 0, 0
    for one, now in zip(asked, said, strict=True):
        if one["orig_img"]:
            continue
        stem = one["image"][:25]
        (was, before) = next(
            (q, a)
            for q, a in zip(asked, said, strict=True)
            if q["image"] == f"{stem}.jpg" and q["question"] == one["question"]
        )
        if one["removed_q"]:
            pairs[before + now] += 1
        else:
            others += 1
            changed += (before == was["gt"]) != (now == one["gt"])
    removed = sum(pairs.values())
    questions = write(tmp_path / "q.jsonl", asked)
    answers = write(tmp_path / "a.jsonl", [{"id": i, "answer": text.title() + "."} for i, text in enumerate(said)])
    got = shown(capsys, "beaf", questions, answers)["questions"]
    four = [got[name] for name in ("tu", "ig", "sb_yes", "sb_no")]
    assert four == [n / removed for n in pairs.values()] and sum(four) == pytest.approx(1)
    assert got["id"] == changed / others and removed > 50 < others
    assert got["accuracy"] == sum(a == q["gt"] for q, a in zip(asked, said, strict=True)) / len(asked)
    tu, steady = got["tu"], 1 - got["id"]
    assert got["f1_tu_id"] == pytest.approx(2 * tu * steady / (tu + steady))
    write(tmp_path / "q.jsonl", [q for q in asked if not q["orig_img"]])
    write(tmp_path / "a.jsonl", [{"id": q["id"], "answer": "No."} for q in asked if not q["orig_img"]])
    assert cli.main(["score", "beaf", questions, answers]) == 2
    assert "from which it was made" in capsys.readouterr().err


def reefknot_rows(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for i in range(80):
        kind = {"relation_type": rng.choice(["perception", "cognitive"]), "image_id": str(i // 2)}
        text = f"Is the cup on the table {i}? Please answer yes or no."
        rows.append({**kind, "type": "Yes/No", "query_prompt": text, "label": ("yes", "no")[i % 2]})
        choice = {"query_prompt": f"What is the relation {i}? A. on B. in C. at D. by", "label": "ABCD"[i % 4]}
        rows.append({**kind, **choice, "type": "Multichoice"})
    return rows


def test_reefknot_says_what_its_replies_lack(tmp_path: Path, capsys: Any) -> None:
    for kind, held in (("Multichoice", "the letter of a choice"), ("Yes/No", "yes or no")):
        rows = [row | {"response": "perhaps"} for row in reefknot_rows(random.Random(0)) if row["type"] == kind]
        file = lines(tmp_path / "a.jsonl", rows)
        assert cli.main(["score", "reefknot", file, "--scorer", "ours"]) == 0
        assert f"replies holds {held};" in capsys.readouterr().err


def test_reefknot_both_kinds_in_one_file(tmp_path: Path, capsys: Any) -> None:
    rng = random.Random(0)
    rows = reefknot_rows(rng)
    for row in rows:
        row["response"] = rng.choice(
            REPLIES if row["type"] == "Yes/No" else ["A", "b. in", "C", "D. by", "It is A", ""]
        )
    right: dict[str, list[bool]] = {}
    for row in rows:
        reply, label = row["response"].lower(), row["label"].lower()
        yes_no = row["type"] == "Yes/No"
        ok = ("yes" if "yes" in reply else "no") == label if yes_no else reply[:1] == label
        for part in (row["relation_type"], "questions"):
            right.setdefault(part if yes_no else f"choice, {part}", []).append(ok)
    file = write(tmp_path / "a.jsonl", rows)
    got = shown(capsys, "reefknot", file)
    assert {part: each["accuracy"] for part, each in got.items()} == {p: sum(ok) / len(ok) for p, ok in right.items()}
    worse = write(
        tmp_path / "b.jsonl", [row | {"response": "No" if row["type"] == "Yes/No" else "?"} for row in rows[::-1]]
    )
    assert cli.main(["compare", file, worse, "--benchmark", "reefknot", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["task"] for each in found} == {"reefknot", "reefknot-choice"}
    whole = next(each for each in found if each["task"] == "reefknot-choice" and each["part"] == "questions")
    assert whole["verdict"]["is"] == "worse" and whole["outcomes"]["mended"] == 0
    write(tmp_path / "a.jsonl", [row | {"response": ""} for row in rows])
    assert cli.main(["score", "reefknot", file]) == 2 and 'every "response" is empty' in capsys.readouterr().err


def test_fohe_leaves_out_answers_without_yes_or_no(tmp_path: Path, capsys: Any) -> None:
    rng = random.Random(0)
    asked = [
        {"question_id": i % 30, "image": f"{i}.jpg", "text": f"Q{i}?", "label": ("yes", "no")[i % 2]} for i in range(50)
    ]
    rows = [{"question_id": q["question_id"], "text": rng.choice(REPLIES)} for q in asked]
    kept = [
        ("yes" if "Yes" in r["text"] else "no", q["label"])
        for q, r in zip(asked, rows, strict=True)
        if "Yes" in r["text"] or "No" in r["text"]
    ]
    files = write(tmp_path / "q.jsonl", asked), write(tmp_path / "a.jsonl", rows)
    got = shown(capsys, "fohe", *files)["questions"]
    assert got["n"] == len(kept) < 50 and got["accuracy"] == sum(a == b for a, b in kept) / len(kept)
    assert got["left_out"] == 50 - len(kept)
    assert got["misread"] == sum(r["text"] == "yes it is" for r in rows) > 0  # those that are left out count
    write(tmp_path / "a.jsonl", rows[1:])
    assert (
        cli.main(["score", "fohe", *files]) == 2
        and "50 questions and 49 answers do not line up" in capsys.readouterr().err
    )


def test_r_bench_averages_its_subsets(tmp_path: Path, capsys: Any) -> None:
    rng = random.Random(0)
    asked = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Q{i}?", "label": ("yes", "no")[i % 2]} for i in range(60)
    ]
    rows = [{"question_id": i, "text": rng.choice(REPLIES[:4])} for i in range(55)]  # five without an answer
    subsets = []
    for number in range(3):
        subsets.append(tmp_path / f"ids{number}.json")
        subsets[-1].write_text(json.dumps(rng.sample(range(60), 30)))
    files = write(tmp_path / "q.jsonl", asked), write(tmp_path / "a.jsonl", rows)
    got = shown(capsys, "r-bench", *files, "--subsets", ",".join(map(str, subsets)))
    f1 = []
    for path in subsets:
        ids = [i for i in json.loads(path.read_text()) if i < 55]
        said = {i: "no" if "No" in rows[i]["text"] else "yes" for i in ids}
        tp = sum(said[i] == "yes" == asked[i]["label"] for i in ids)
        p = tp / (sum(one == "yes" for one in said.values()) + 1e-5)
        r = tp / (sum(asked[i]["label"] == "yes" for i in ids) + 1e-5)
        f1.append(2 * p * r / (p + r + 1e-5))
        assert got[str(path)]["n"] == len(ids) and got[str(path)]["f1"] == pytest.approx(f1[-1], abs=1e-15)
    assert got["mean of the subsets"]["f1"] == pytest.approx(sum(f1) / 3) and got["questions"]["n"] == 55


def test_opope_asks_captions(tmp_path: Path, capsys: Any, recwarn: Any) -> None:
    rng, asked = random.Random(0), pope_data.coco_questions("adversarial")
    names = [opope.object_of(q) for q in asked]
    images = list(dict.fromkeys(opope.image_id(q) for q in asked))[:400]
    captions = {i: f"A {rng.choice(names)} beside {rng.choice(names)}s, and carrots." for i in images}
    file = write(tmp_path / "c.jsonl", [{"image_id": i, "caption": text} for i, text in captions.items()])
    mine = [(name, q) for name, q in zip(names, asked, strict=True) if opope.image_id(q) in captions]
    said = [any(word in captions[opope.image_id(q)] for word in name.split()) for name, q in mine]
    tp = sum(yes and q.label == "yes" for yes, (_, q) in zip(said, mine, strict=True))
    got = shown(capsys, "opope", "coco:adversarial", file)["questions"]
    precision, recall = tp / sum(said), tp / sum(q.label == "yes" for _, q in mine)
    assert got["n"] == len(mine) == 2400 and (got["precision"], got["recall"]) == (precision, recall)
    assert got["f_beta"] == pytest.approx(1.04 * precision * recall / (0.04 * precision + recall))
    ours = shown(capsys, "opope", "coco:adversarial", file, "--scorer", "ours", "--variant", "pattern")["questions"]
    assert ours["yes_ratio"] < got["yes_ratio"]  # no car in carrots
    with pytest.raises(VlmFixError, match="No object can be read"):
        opope.object_of(asked[0].__class__(1, "a.jpg", "What is this?", "no"))


def test_pope_by_probability(tmp_path: Path, capsys: Any) -> None:
    rng, asked = random.Random(0), pope_data.coco_questions("popular")
    rows = []
    for q in asked:
        p = round(min(max(rng.gauss(0.6 if q.label == "yes" else 0.4, 0.2), 0.02), 0.98), 2)  # with ties
        rows.append({"question_id": q.question_id, "p_yes": 0.9 * p, "p_no": 0.9 * (1 - p)})
    rows[0] |= {"yes_tokens": ["Yes", "yes"], "no_tokens": ["No", "no"]}
    got = shown(capsys, "pope-prob", "coco:popular", write(tmp_path / "p.jsonl", rows))["questions"]
    p = [row["p_yes"] / (row["p_yes"] + row["p_no"]) for row in rows]
    yes, no = ([one for one, q in zip(p, asked, strict=True) if q.label == label] for label in ("yes", "no"))
    wins = sum((a > b) + (a == b) / 2 for a in yes for b in no)
    assert got["auroc"] == pytest.approx(wins / len(yes) / len(no), abs=1e-12) and got["mass"] == pytest.approx(0.9)
    right = [(r["p_yes"] > r["p_no"]) == (q.label == "yes") for r, q in zip(rows, asked, strict=True)]
    assert got["accuracy"] == sum(right) / 3000 and got["yes_tokens"] == "'Yes' 'yes'"
    sure, error = [max(one, 1 - one) for one in p], 0.0
    for low in range(10):
        mine = [(s, ok) for s, ok in zip(sure, right, strict=True) if low <= 10 * s < low + 1]
        error += abs(sum(s for s, _ in mine) - sum(ok for _, ok in mine)) / 3000
    assert got["ece"] == pytest.approx(error, abs=1e-12)
    del rows[0]["yes_tokens"]
    with pytest.warns(UserWarning, match="does not name its yes_tokens"):
        pope_prob.results("coco:popular", write(tmp_path / "p.jsonl", rows))


def test_hallucinations_at_equal_length_are_what_the_counts_were_made_of() -> None:
    rng = random.Random(0)

    def rows(rate: float, words: int) -> list[dict[str, Any]]:
        made = []
        for image in range(1500):
            n = rng.randint(words // 2, words)
            wrong = sum(rng.random() < rate for _ in range(n))
            made.append({"image": image, "tokens": n, "hallucinated": wrong})
        return made

    base, shorter, better = rows(0.02, 100), rows(0.02, 60), rows(0.015, 100)
    same, less = length.rate_ratio(base, shorter), length.rate_ratio(base, better)
    assert same and less and same["low"] < 1 < same["high"] and 0.9 < same["exponent"] < 1.1
    assert less["low"] < 0.75 < less["high"] < 1
    assert length.rate_ratio(base, [row | {"hallucinated": 0} for row in base]) is None
    assert length.rate_ratio(base, base) == pytest.approx(
        {"ratio": 1, "low": 1, "high": 1, "exponent": 1, "extrapolated": False}, abs=0.1
    )


def test_the_same_captions_have_the_same_rate_at_equal_length() -> None:
    for seed in range(20):  # the interval has no width, and rounding gave some of the variances a minus
        rng = random.Random(seed)
        rows = [{"image": i, "tokens": rng.randint(50, 90), "hallucinated": rng.randint(0, 4)} for i in range(200)]
        for again in (rows, rows[::-1]):
            same = length.rate_ratio(rows, again)
            assert same and [same[name] for name in ("ratio", "low", "high")] == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A folder of each benchmark that `vlm-fix eval` asks, with empty questions about three small images."""
    picture = Image.new("RGB", (32, 32))

    def save(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)

    for kind, files in (("neg", ["1.png", "2.png"]), ("pos", ["3.png"])):
        for file in files:
            save(f"dash-b/{kind}/coco/bed/{file}")
        (tmp_path / f"dash-b/dash_benchmark_{kind}.json").write_text(json.dumps({"coco": {"bed": files}}))
    asked = beaf_questions(random.Random(1), 3)
    for row in asked:
        save(f"beaf/images/{row['image']}")
    write(tmp_path / "beaf/beaf_qna.json", asked)
    rows = reefknot_rows(random.Random(0))[:24]
    for row in rows:
        save(f"reefknot/VG_100K/{row['image_id']}.jpg")
    write(tmp_path / "reefknot/YESNO.jsonl", [row for row in rows if row["type"] == "Yes/No"])
    write(tmp_path / "reefknot/Multichoice.jsonl", [row for row in rows if row["type"] == "Multichoice"])
    return {name: tmp_path / name for name in ("dash-b", "beaf", "reefknot")}


def test_eval_builds_them_and_right_answers_score_one(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        for task in tasks.build(Settings(name, data=f"{name}:{folder}")):
            labels = {sample.id: sample.reference["label"] for sample in task.samples}
            assert len(labels) == len(task.samples)
            results = task.score(labels)
            assert all(result.figures["accuracy"] == 1 for result in results.values())
            assert task.sizes == {part: result.n for part, result in results.items()}
            assert all(tasks.load_image(sample).size == (32, 32) for sample in task.samples)
        few = tasks.build(Settings(name, data=f"{name}:{folder}", limit=1))
        assert all(len({sample.file.split("_0")[0] for sample in task.samples}) == 1 for task in few)
    next((folders["beaf"] / "images").iterdir()).unlink()
    with pytest.raises(VlmFixError, match="1 of .* images are missing"):
        tasks.build(Settings("beaf", data=f"beaf:{folders['beaf']}"))


def test_packaged_questions_about_other_images(tmp_path: Path) -> None:
    own = DATA / "pope"
    for source in ("aokvqa", "gqa"):
        for kind in ("random", "popular", "adversarial"):
            asked = pope_data.load_questions(f"{source}:{kind}")
            assert len(asked) == 3000 and len({q.image for q in asked}) == 500
            if own.exists():
                assert asked == pope_data.load_questions(own / f"{source}_pope_seem_{kind}.json")
    names = list(dict.fromkeys(q.image for q in pope_data.load_questions("gqa:random")))[:2]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (task,) = tasks.build(Settings("pope", data=f"coco:{tmp_path}", questions=("gqa",), limit=2))
    assert list(task.sizes) == ["gqa random", "gqa popular", "gqa adversarial"] and task.sizes["gqa random"] == 12


def test_no_answer_is_counted_twice() -> None:
    assert once("pope", ["random", "popular", "random RePOPE"]) == ["random", "popular"]
    assert once("amber-qa", ["existence", "attribute", "questions"]) == ["existence", "attribute"]
    assert once("hallusion", ["overall", "VD", "VS"]) == ["VD", "VS"] and once("hallusion", ["overall"]) == ["overall"]
    assert once("mme", ["existence", "count", "hallucination"]) == ["existence", "count"]
    assert once("chair", ["captions"]) == ["captions"]


def test_answers_to_other_questions_and_ids_that_come_twice_are_refused(tmp_path: Path, capsys: Any) -> None:
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": f"Is the dog on {n}?", "label": "no"} for n in range(3)]
    questions = write(tmp_path / "q.jsonl", asked)
    rows = [{"question_id": n, "prompt": f"Is the dog on {n}? Yes or no?", "text": "No"} for n in range(3)]
    assert shown(capsys, "r-bench", questions, write(tmp_path / "a.jsonl", rows))["questions"]["accuracy"] == 1
    moved = [{**row, "question_id": 2 - n} for n, row in enumerate(rows)]
    for benchmark, wrong, message in (
        ("r-bench", moved, "under id '2', where"),
        ("r-bench", [*rows, rows[0]], "question_id '0' comes twice"),
        ("fohe", [{**row, "prompt": "Is it red?"} for row in rows], "answers 'Is it red?' under id"),
    ):
        assert cli.main(["score", benchmark, questions, write(tmp_path / "a.jsonl", wrong)]) == 2
        assert message in capsys.readouterr().err
    edited = [{"id": n, "image": f"{n}.jpg", "question": f"Dog {n}?", "gt": "yes", "orig_img": True} for n in range(2)]
    beaf_file = write(tmp_path / "b.jsonl", [{**row, "removed_q": False} for row in edited])
    answers = write(tmp_path / "a.jsonl", [{"id": n, "question": f"Dog {1 - n}?", "answer": "Yes"} for n in range(2)])
    assert cli.main(["score", "beaf", beaf_file, answers]) == 2
    assert "row 1 answers 'Dog 1?', but BEAF question 0 is 'Dog 0?'" in capsys.readouterr().err


def test_dash_b_leaves_out_what_its_answers_cannot_tell(tmp_path: Path, capsys: Any) -> None:
    rows = [{"img_id": f"{n}.png", "object_name": "bed", "gt": "yes", "text": "Yes"} for n in range(3)]
    assert cli.main(["score", "dash-b", write(tmp_path / "a.jsonl", rows), "--json"]) == 0
    told = capsys.readouterr()
    got = json.loads(told.out)["questions"]
    assert got["tpr"] == got["accuracy"] == 1 and not {"tnr", "harmonic"} & got.keys()
    assert "3 of DASH-B's 2682 images" in told.err and "no image has the label no, so tnr and harmonic" in told.err
    assert cli.main(["compare", *[str(tmp_path / "a.jsonl")] * 2, "--benchmark", "dash-b", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert not {"tnr", "harmonic"} & told["delta"].keys() and "tpr" in told["delta"]
    write(tmp_path / "a.jsonl", [{**row, "response": "No"} for row in rows])
    assert cli.main(["score", "dash-b", str(tmp_path / "a.jsonl")]) == 2
    assert "--answer-key" in capsys.readouterr().err


def test_probabilities_from_csv_are_those_of_json(tmp_path: Path, capsys: Any) -> None:
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": "A dog?", "label": ("yes", "no")[n % 2]} for n in range(4)]
    questions = write(tmp_path / "q.jsonl", asked)
    tokens = {"yes_tokens": ["Yes", "yes"], "no_tokens": ["No"]}
    rows = [{"question_id": n, "p_yes": 0.2 * n, "p_no": 0.3, **tokens} for n in range(4)]
    table = "".join(f"{n}.0;{0.2 * n};0.3;Yes yes;No\n" for n in range(4))
    (tmp_path / "a.csv").write_text("question_id;p_yes;p_no;yes_tokens;no_tokens\n" + table)
    expected = shown(capsys, "pope-prob", questions, write(tmp_path / "a.jsonl", rows))
    assert shown(capsys, "pope-prob", questions, str(tmp_path / "a.csv")) == expected
    (tmp_path / "a.csv").write_text("question_id;p_yes;p_no\n0;much;0.3\n")
    assert cli.main(["score", "pope-prob", questions, str(tmp_path / "a.csv")]) == 2
    assert "row 1: p_yes 'much' and p_no '0.3' are not two probabilities" in capsys.readouterr().err


def test_labels_that_differ_from_the_questions_are_told_of_probabilities(tmp_path: Path, capsys: Any) -> None:
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": "Is there a dog?", "label": "yes"} for n in (1, 2)]
    rows = [{"question_id": n, "image": f"val/{n}.jpg", "p_yes": 0.6, "p_no": 0.1} for n in (1, 2)]
    rows[0]["label"], rows[1]["label"] = "Yes", "no"
    write(tmp_path / "q", asked), write(tmp_path / "a", rows)
    assert cli.main(["score", "pope-prob", str(tmp_path / "q"), str(tmp_path / "a")]) == 0
    assert "1 label of" in capsys.readouterr().err


def test_fohe_tells_what_it_leaves_out_and_compares_what_both_were_asked(tmp_path: Path, capsys: Any) -> None:
    asked = [{"question_id": i, "image": f"{i}.jpg", "text": f"Q{i}?", "label": ("yes", "no")[i % 2]} for i in range(6)]
    files = [write(tmp_path / "q", asked), str(tmp_path / "a"), str(tmp_path / "b")]
    for path, texts in (
        (files[1], ["Yes", "No", "yes, it is", "Oui", "Yes", "No"]),
        (files[2], ["Yes", "Yes", "No", "no", "Yes", "No"]),
    ):
        write(Path(path), [{"question_id": i, "text": text} for i, text in enumerate(texts)])
    assert cli.main(["score", "fohe", *files[:2]]) == 0
    err = capsys.readouterr().err
    assert "of 6 answers 2 hold neither Yes nor No, such as 'yes, it is'" in err and "; --scorer ours reads them" in err
    assert shown(capsys, "fohe", *files[:2], "--scorer", "ours")["questions"]["n"] == 6
    compared = ["compare", *files[1:], "--benchmark", "fohe", "--questions", files[0]]
    assert cli.main([*compared, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["delta"]["accuracy"]["base"] == 1 and found["delta"]["accuracy"]["method"] == 3 / 5
    assert cli.main([*compared, "--scorer", "vcd"]) == 2
    assert "--scorer vcd is none of fohe: choose from official, ours" in capsys.readouterr().err
    write(Path(files[1]), [{"question_id": i, "text": "yes"} for i in range(6)])
    assert cli.main(["score", "fohe", *files[:2]]) == 2
    err = capsys.readouterr().err
    assert "of 6 answers 6 hold neither Yes nor No, such as 'yes'" in err and "--scorer ours" in err


@pytest.mark.parametrize("benchmark", ["fohe", "r-bench"])
def test_the_option_that_a_note_names_exists(benchmark: str, tmp_path: Path, capsys: Any) -> None:
    asked = [{"question_id": i, "image": "a.jpg", "text": "Q?", "label": "no"} for i in range(2)]
    rows = [{"question_id": 0, "text": "NO. Not Yes"}, {"question_id": 1, "text": "No"}]
    files = write(tmp_path / "q", asked), write(tmp_path / "a", rows)
    assert cli.main(["score", benchmark, *files]) == 0
    assert "against its plain word" in (err := capsys.readouterr().err) and "--scorer ours" in err
    assert shown(capsys, benchmark, *files, "--scorer", "ours")["questions"]["accuracy"] == 1
