"""AMBER, MME and HallusionBench through `vlm-fix eval`, on the bundled model and on folders made of Picto's scenes."""

import html
import json
import os
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto, tasks
from vlm_fix.eval.report import page
from vlm_fix.eval.report import tables as report
from vlm_fix.eval.run import loading, runner, summary
from vlm_fix.eval.run.runner import Settings
from vlm_fix.eval.scorers import hallusion
from vlm_fix.eval.scorers.amber import data as amber_data

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def loaded():
    return loading.load_model(MODEL)


@pytest.fixture(scope="module")
def scenes():
    return picto.scenes("test", 6, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, scenes):
    """Image folders of the three benchmarks in their own layouts: 4 images, 2 of each of two tasks, every figure."""
    root = tmp_path_factory.mktemp("suite")
    for kind in tasks.OWN_IMAGES:
        (root / kind).mkdir()
    for number, scene in enumerate(scenes[:4], 1):
        scene.image.save(root / "amber" / f"AMBER_{number}.jpg")
        task = root / "mme" / ("existence", "count")[number % 2]
        task.mkdir(exist_ok=True)
        scene.image.save(task / f"{number}.jpg")
        there, absent = scene.objects[0][0], next(name for name in picto.CATEGORIES if name not in scene.names)
        lines = [f"Is there a {there} in the image?\tYes\n", f"Is there a {absent} in the image?\tNo\n"]
        (task / f"{number}.txt").write_text("".join(lines))
    for question in hallusion.questions():
        if question.image:
            figure = root / "hallusion" / "hallusion_bench" / question.image
            if not figure.is_file():
                figure.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / "amber" / "AMBER_1.jpg", figure)
    return root


def run(folder, loaded, **settings):
    given = {
        "model": MODEL,
        "methods": (("pai:alpha=0.5",),),
        "variant": "pattern",
        "batch_size": 8,
        "max_new_tokens": 32,
    }
    results = runner.evaluate(Settings(**given | settings), folder, console=QUIET, loaded=loaded)
    report.write(results, folder)
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory, loaded):
    """(folder, results) of AMBER on Picto."""
    folder = tmp_path_factory.mktemp("world") / "a"
    return folder, run(folder, loaded, benchmark="amber", data="picto:shift", limit=6)


def rewritten(folder, answer):
    """The rows of samples.jsonl with other answers."""
    file = folder / "samples.jsonl"
    rows = [row | {"answer": answer(row)} for row in map(json.loads, file.read_text().splitlines())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def marks(folder):
    """(class, title, text) of the marked words of a report with every sample that differs."""
    found = re.findall(r'<mark class="(\w+)" title="([^"]*)">([^<]*)</mark>', page.page([folder], 10_000))
    return [tuple(map(html.unescape, each)) for each in found]


def divided(rows):
    """Of yes/no rows those to which the runs did not all give the right, or not all a wrong, answer."""
    right = {}
    for row in rows:
        right.setdefault(row["id"], set()).add(row["answer"].lower() == row["label"])
    return [row for row in rows if len(right[row["id"]]) == 2]


def test_the_report_marks_the_words_of_amber_and_its_answers(world, tmp_path):
    folder = shutil.copytree(world[0], tmp_path / "w")
    rng = random.Random(0)

    def answer(row):
        if row["benchmark"] == "amber-qa":
            return rng.choice(["yes", "no"])
        right, wrong = row["ground_truth"][0], row["hallu"][0]
        return (
            f"There is a {right} & a {right}" if row["run"] == "baseline" else f"a {wrong}, <i> a {right} and a zebra"
        )

    rows = rewritten(folder, answer)
    expected = []
    for row in rows:
        if row["benchmark"] == "amber":
            right, wrong = row["ground_truth"][0], row["hallu"][0]
            for name in (right, right) if row["run"] == "baseline" else (wrong, right, "zebra"):
                there = name in row["ground_truth"]
                title = f"in the image, as {name}" if there else "not there"
                title = "typical, but not there" if name in row["hallu"] else title
                expected.append(("good" if there else "bad", f"{name}: {title}", name))
    asked = divided([row for row in rows if row["benchmark"] == "amber-qa"])
    assert len(asked) > 4
    signs = {True: ("good", "right", "✓"), False: ("bad", "wrong", "✗")}
    seen = marks(folder)
    answered = [mark for mark in seen if mark[1] in ("right", "wrong")]
    told = [signs[row["answer"] == row["label"]] for row in asked]
    assert sorted(answered) == sorted((k, t, f"{s} {r['answer']}") for (k, t, s), r in zip(told, asked, strict=True))
    assert sorted(mark for mark in seen if mark not in answered) == sorted(expected)
    assert len({title.split(": ")[1] for kind, title, _ in expected if kind == "bad"}) == 2
    whole = page.page([folder], 2)
    assert "&lt;i&gt;" in whole and "typical of it and not there: " in whole and whole.count("data:image/jpeg") == 4
    assert whole.count("<svg") == 4  # cover and CHAIR, yes-ratio and accuracy, each with its key
    assert "AMBER score" in whole and f"2 of {len(asked) // 2}, chosen" in whole


def test_amber_runs_on_the_bundled_world(world):
    folder, results = world
    assert list(results["settings"]["data"]) == ["amber", "amber-qa"]
    assert results["scorers"] == {"amber": "picto, pattern words", "amber-qa": "ours"}
    captions, asked = tasks.build(Settings(benchmark="amber", data="picto:shift", limit=6, variant="pattern"))
    assert captions.sizes == {"captions": 6} and set(asked.sizes) == {"existence"}
    for each in results["runs"].values():
        assert each["amber"]["captions"]["n"] == 6 and each["amber"]["captions"]["cover"] > 0.3
        assert each["amber-qa"]["existence"]["unparsed"] == 0
        existence = each["amber-qa"]["existence"]  # every label is no
        assert existence["accuracy"] == existence["recall"] == pytest.approx(1 - existence["yes_ratio"])
    rows = [(s.reference, s.image_id) for s in captions.samples]
    shown = {scene.image_id: scene for scene in picto.scenes("shift", 6, 0)}
    for reference, image_id in rows:
        assert set(reference["ground_truth"]) == shown[image_id].names
        assert not set(reference["hallu"]) & shown[image_id].names
    text = (folder / "table.md").read_text()
    head = next(row for row in text.splitlines() if "| Hal |" in row)
    assert head == "| method | CHAIR | cover | Hal | Cog | AMBER score |"
    row = next(row for row in text.splitlines() if row.startswith("| `pai:alpha=0.5` |"))
    assert re.fullmatch(r" \d+\.\d \([+-]\d+\.\d \[-?\d+\.\d, -?\d+\.\d\](\\\*)?\) ", row.split("|")[-2])


def test_the_amber_score_is_of_captions_and_questions_drawn_together():
    """Figures, several seeds and the paired interval against loops over the images, from the counts of made-up answers."""
    made = tasks.build(Settings(benchmark="amber", data="picto:shift", limit=5, variant="pattern"))
    rng, counts, said = random.Random(0), {}, {}
    for run, seeds in (("baseline", [1]), ("method", [1, 2])):
        for seed in seeds:
            for task in made:
                for sample in task.samples:
                    if task.benchmark == "amber":
                        right, wrong = (rng.choice(sample.reference[k]) for k in ("ground_truth", "hallu"))
                        n = rng.randint(0, 2)
                        text, count = f"There is a {right}" + f" and a {wrong}" * n, (n, n + 1, 0, 0, 0)
                    else:  # every label is no
                        text = rng.choice(["Yes", "No", "No"])
                        count = (0, 0, text == "No", text == "No", 1)
                    row = {"id": sample.id, "seed": seed, "answer": text, "error": None}
                    said.setdefault((run, task.benchmark), []).append(row)
                    counts.setdefault((run, seed), {}).setdefault(sample.file, []).append(count)

    def score(images):
        wrong, mentions, right, said_no, no = (sum(c[i] for rows in images for c in rows) for i in range(5))
        precision, recall = right / said_no if said_no else 0, right / no if no else 0
        f1 = 2 * precision * recall / (precision + recall) if right else 0
        return (1 - (wrong / mentions if mentions else 0) + f1) / 2

    found = summary.summarise(["baseline", "method"], made, lambda run, benchmark: said[run, benchmark])
    base, method = (found[run]["amber"]["captions"] for run in ("baseline", "method"))
    of = {key: score(list(images.values())) for key, images in counts.items()}
    assert base["score"] == pytest.approx(of["baseline", 1]) and "score" not in base["delta"]
    assert base["score"] == pytest.approx((1 - base["chair"] + found["baseline"]["amber-qa"]["existence"]["f1"]) / 2)
    assert method["seeds"]["score"]["values"] == pytest.approx([of["method", 1], of["method", 2]])
    files = list(counts["baseline", 1])
    both = {f: counts["method", 1][f] + counts["method", 2][f] for f in files}
    assert method["score"] == pytest.approx(score(list(both.values())))
    draws = np.random.default_rng(0)
    differences = []
    for _ in range(2000):
        times = draws.multinomial(5, [0.2] * 5)
        drawn = [f for f, k in zip(files, times, strict=True) for _ in range(k)]
        differences.append(score([both[f] for f in drawn]) - score([counts["baseline", 1][f] * 2 for f in drawn]))
    delta = method["delta"]["score"]
    assert delta["delta"] == pytest.approx(method["score"] - base["score"]) and delta["low"] < delta["high"]
    assert [delta["low"], delta["high"]] == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())


def test_a_caption_of_picto_is_judged_by_its_objects():
    captions, _ = tasks.build(Settings(benchmark="amber", data="picto:shift", limit=3, variant="pattern"))
    said = {
        s.id: f"There is a {s.reference['ground_truth'][0]} and a {s.reference['hallu'][0]}." for s in captions.samples
    }
    figures = captions.score(said)["captions"].figures
    truths = sum(len(s.reference["ground_truth"]) for s in captions.samples)
    hallus = sum(len(s.reference["hallu"]) for s in captions.samples)
    assert figures == {"chair": 1 / 2, "cover": 3 / truths, "hal": 1, "cog": 3 / hallus}


def test_amber_reads_its_folder(folders, loaded, tmp_path):
    settings = Settings(benchmark="amber", data=f"amber:{folders}/amber", limit=4, variant="pattern")
    captions, asked = tasks.build(settings)
    assert [s.file for s in captions.samples] == [f"AMBER_{i}.jpg" for i in range(1, 5)]
    assert len(asked.samples) == sum(q.image in {s.file for s in captions.samples} for q in amber_data.questions())
    assert set(asked.sizes) == {"existence", "attribute", "relation", "questions"}
    right = {s.id: s.reference["label"].capitalize() for s in asked.samples}
    assert {r.figures["accuracy"] for r in asked.score(right).values()} == {1}
    (few,) = (t for t in tasks.build(replace(settings, limit=2, seed=1)) if t.benchmark == "amber")
    assert len(few.samples) == 2
    with pytest.raises(VlmFixError, match="1000 of 1004 images are missing"):
        tasks.build(replace(settings, limit=None))


def test_mme_and_hallusion_run_through_the_same_runner(folders, loaded, tmp_path):
    results = run(tmp_path / "m", loaded, benchmark="mme", data=f"mme:{folders}/mme", scorer="ours")
    scores = results["runs"]["baseline"]["mme"]
    assert {task: each["n"] for task, each in scores.items()} == {"existence": 4, "count": 4}
    assert scores["existence"]["score"] == scores["existence"]["accuracy"] + scores["existence"]["accuracy_plus"]
    results = run(tmp_path / "h", loaded, benchmark="hallusion", data=f"hallusion:{folders}/hallusion", limit=2)
    scores = results["runs"]["baseline"]["hallusion"]
    for name in ("m", "h"):
        rng = random.Random(0)
        asked = divided(rewritten(tmp_path / name, lambda row, rng=rng: rng.choice(["Yes", "No"])))
        found = sorted((kind, text) for kind, _, text in marks(tmp_path / name))
        told = [("good", "✓") if row["answer"].lower() == row["label"] else ("bad", "✗") for row in asked]
        assert found == sorted((kind, f"{sign} {row['answer']}") for (kind, sign), row in zip(told, asked, strict=True))
        assert len(found) > 2 and page.page([tmp_path / name]).count("<svg") == 2
    assert scores["overall"]["n"] == sum(scores[kind]["n"] for kind in ("VD", "VS") if kind in scores)
    assert results["scorers"]["hallusion"].startswith("vlmevalkit, groups of tianyi-lab/HallusionBench@744007c")
    (whole,) = tasks.build(Settings(benchmark="hallusion", data=f"hallusion:{folders}/hallusion"))
    assert len(whole.samples) == 951
    (few,) = tasks.build(Settings(benchmark="mme", data=f"mme:{folders}/mme", limit=1))
    assert few.sizes == {"existence": 2, "count": 2}


def test_a_failed_answer_is_wrong(folders):
    (task,) = tasks.build(Settings(benchmark="mme", data=f"mme:{folders}/mme"))
    right = {s.id: s.reference["label"] for s in task.samples}
    assert task.score(right)["count"].figures["score"] == 2
    first = next(s.id for s in task.samples if s.id.startswith("count"))
    lost = task.score({**right, first: None})["count"]
    assert lost.figures["accuracy"] == 3 / 4 and lost.figures["accuracy_plus"] == 1 / 2 and lost.unparsed == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "eval mme",
            "eval mme reads --data mme:DIR, not 'picto': give the folder of its images, MME_Benchmark_release",
        ),
        (
            "eval hallusion",
            "not 'picto': give the folder of its images, as in hallusion_bench.zip, linked on github.com/",
        ),
        ("eval hallusion --data hallusion:/none", "346 of 346 images are missing in /none"),
        ("eval hallusion --data hallusion:/none", "put them there, as in hallusion_bench.zip, linked on github.com/"),
        (
            "eval amber --data coco:/none",
            "reads --data amber:DIR, not 'coco:/none': give the folder of its images, as linked ",
        ),
        ("eval amber --data amber:/none", "1004 of 1004 images are missing in /none"),
        ("eval hallusion --data hallusion:/none --prompt Well?", "must hold {question}"),
        ("eval mme --data mme:/none", "/none holds none of MME's tasks"),
    ],
)
def test_bad_input_gets_one_sentence(command, words, capsys, tmp_path):
    assert cli.main([*command.split(), "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
