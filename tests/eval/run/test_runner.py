"""The runner on the bundled model: kill and resume, batch == single, failures counted, honest pairing, tables."""

import itertools
import json
import math
import os
import random
import re
import warnings
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto, tasks
from vlm_fix.eval.report import tables as report
from vlm_fix.eval.run import generation, loading, runner, summary
from vlm_fix.eval.run.runner import Settings, evaluate
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.pope import data as pope_data

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")
SMALL = {"model": MODEL, "limit": 6, "batch_size": 5, "max_new_tokens": 24, "variant": "pattern", "seed": 3}
QUIET = Console(quiet=True)


def run(folder, resume=False, **settings):
    results = evaluate(Settings(**{**SMALL, **settings}), folder, resume=resume, console=QUIET)
    report.write(results, folder)
    return results


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def untimed(results):
    """results.json without what a clock or a memory meter said."""
    return {key: value for key, value in results.items() if key not in ("date", "speed")}


TIMED = ("batch_seconds", "batch_first_token", "peak_mb")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run, its folder and what it returned."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, methods=(("pai:alpha=0.5",), ("vcd",)))


@pytest.fixture(scope="module")
def loaded():
    return loading.load_model(MODEL)[:2]


def test_everything_is_written_and_counted(whole):
    folder, results = whole
    assert json.loads((folder / "results.json").read_text()) == results
    assert Image.open(folder / "figure.png").getcolors(maxcolors=200) is None  # drawn on, not blank
    assert list(results["runs"]) == ["baseline", "pai:alpha=0.5", "vcd"]
    assert results["scorers"] == {
        "pope": "official, RUCAIBox/POPE@3df3ba1",
        "chair": "pattern, LisaAnne/Hallucination@6e4d33c",
    }
    assert (
        results["settings"]["model"]["weights"].startswith("sha256:")
        and results["hardware"]
        and results["processes"] == 1
    )
    said = rows(folder)
    for name in results["runs"]:
        assert sum(r["run"] == name and r["benchmark"] == "chair" for r in said) == 6
        asked = [r for r in said if r["run"] == name and r["benchmark"] == "pope"]
        assert len({r["id"] for r in asked}) == len(asked)  # shared positives are asked once ...
        assert sum(len(r["splits"]) for r in asked) == 3 * 36  # ... and counted in every split
        for split in ("random", "popular", "adversarial"):
            assert results["runs"][name]["pope"][split]["n"] == 36
            assert results["runs"][name]["pope"][split]["failed"] == 0
    for speeds in results["speed"].values():
        for speed in speeds.values():
            assert speed["tokens_per_second"] > 0 and 0 < speed["first_token_seconds"] < 60 and speed["peak_mb"] > 50


def test_numbers_follow_from_the_answers(whole):
    folder, results = whole
    accuracy = {}
    for name in ("baseline", "vcd"):
        asked = [r for r in rows(folder) if r["run"] == name and "random" in r.get("splits", ())]
        right = [yesno.verdict(r["answer"], r["label"], "official") == r["label"] for r in asked]
        accuracy[name] = sum(right) / len(right)
        assert results["runs"][name]["pope"]["random"]["accuracy"] == pytest.approx(accuracy[name])
    delta = results["runs"]["vcd"]["pope"]["random"]["delta"]["accuracy"]
    assert delta["delta"] == pytest.approx(accuracy["vcd"] - accuracy["baseline"])
    assert delta["low"] <= delta["delta"] <= delta["high"]
    assert results["runs"]["baseline"]["pope"]["random"]["delta"] == {}


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path, cut):
    folder, results = whole
    text = (folder / "samples.jsonl").read_bytes()
    keep = (0, len(text) - 1)[cut] if cut < 2 else random.Random(cut).randrange(len(text))  # mostly inside a line
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "samples.jsonl").write_bytes(text[:keep])
    again = run(tmp_path, resume=True, methods=(("pai:alpha=0.5",), ("vcd",)))
    assert untimed(again) == untimed(results)
    key = lambda r: (r["run"], r["benchmark"], r["batch"], r["id"])  # noqa: E731
    strip = lambda r: {k: v for k, v in r.items() if k not in TIMED}  # noqa: E731
    assert [strip(r) for r in sorted(rows(tmp_path), key=key)] == [strip(r) for r in sorted(rows(folder), key=key)]


def test_a_resumed_sampling_run_draws_the_same_answers(tmp_path):
    how = {"benchmark": "chair", "sample": True, "temperature": 1.5, "batch_size": 2}
    first = run(tmp_path / "a", **how)
    other = run(tmp_path / "b", **{**how, "seed": 4})
    lines = (tmp_path / "a/samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a/samples.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # a batch and a half, torn
    before = [json.loads(line)["answer"] for line in lines]
    assert list(first["runs"]) == ["baseline", "greedy"]  # a greedy row beside a sampled one, unasked
    assert untimed(run(tmp_path / "a", resume=True, **how)) == untimed(first)
    assert [r["answer"] for r in rows(tmp_path / "a")] == before
    assert [r["answer"] for r in rows(tmp_path / "b")] != before and other["settings"]["seed"] == 4


def test_a_watched_run_can_be_ended_and_continued(whole, tmp_path):
    class Enough(Exception):
        pass

    def watch(*where):
        seen.append(where)
        if len(seen) == 3:
            raise Enough

    seen, loaded = [], loading.load_model(MODEL)
    settings = Settings(**SMALL, methods=(("pai:alpha=0.5",), ("vcd",)))
    with pytest.raises(Enough):
        evaluate(settings, tmp_path, console=QUIET, loaded=loaded, watch=watch)
    assert not hasattr(loaded[0], "_vlm_fix_engine") and len(rows(tmp_path)) == seen[-1][1] > 0
    results = evaluate(settings, tmp_path, resume=True, console=QUIET, loaded=loaded, watch=lambda *w: seen.append(w))
    assert untimed(results) == untimed(whole[1])
    assert [w for w in seen if w[1] == w[2]] == [(run, seen[0][2], seen[0][2]) for run in results["runs"]]


def test_resume_refuses_other_settings_and_a_new_run_an_old_folder(whole):
    folder, _ = whole
    with pytest.raises(VlmFixError, match=r"made with batch_size = 5, not 4: resume with the same settings"):
        run(folder, resume=True, methods=(("pai:alpha=0.5",), ("vcd",)), batch_size=4)
    with pytest.raises(VlmFixError, match="already holds a run: add --resume"):
        run(folder)


def test_batches_partition_the_samples():
    samples = [tasks.sample.Sample(str(i), i, "", Path(), "x " * (i % 7), {}) for i in range(23)]
    made = generation.batches(samples, 5)
    assert sorted(s.id for b in made for s in b) == sorted(s.id for s in samples)
    assert [len(b) for b in made] == [5, 5, 5, 5, 3]
    assert all(len(a[-1].prompt) <= len(b[0].prompt) for a, b in itertools.pairwise(made))


def test_a_batch_answers_as_its_samples_alone(loaded):
    (task,) = tasks.build(Settings(**SMALL, benchmark="chair"))
    prompts = [s.prompt if i % 2 else f"{s.prompt} Is there a dog in the image?" for i, s in enumerate(task.samples)]
    images = [tasks.sample.load_image(s) for s in task.samples]
    how = Settings(**SMALL).generate_kwargs(24)
    together = generation.generate(*loaded, images, prompts, 0, **how)
    alone = [generation.generate(*loaded, [i], [p], 0, **how) for i, p in zip(images, prompts, strict=True)]
    assert together.texts == [a.texts[0] for a in alone]
    assert together.tokens == [a.tokens[0] for a in alone]
    for text, tokens, finished in zip(together.texts, together.tokens, together.finished, strict=True):
        said = len(loaded[1].tokenizer(text, add_special_tokens=False)["input_ids"])
        assert 0 < said <= tokens and (tokens == 24 or finished)
    assert together.first_token < together.seconds


def official(folder, n):
    """The images of POPE's first questions, as one-coloured files, and their paths in order."""
    names = list(dict.fromkeys(q.image for q in pope_data.coco_questions("random")))[:n]
    (folder / "val2014").mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (64, 48), (40 * i, 90, 120)).save(folder / "val2014" / name)
    return [folder / "val2014" / name for name in names]


def test_an_unreadable_image_is_recorded_and_the_run_goes_on(tmp_path):
    bad = official(tmp_path / "coco", 3)[1]
    bad.write_bytes(bad.read_bytes()[:100])
    results = run(tmp_path / "out", data=f"coco:{tmp_path / 'coco'}", limit=3, splits=("random",), methods=(("vcd",),))
    failed = [r for r in rows(tmp_path / "out") if r["error"]]
    assert len(failed) == 2 * (6 + 1) and all(str(bad) in r["error"] and r["answer"] is None for r in failed)
    for name in ("baseline", "vcd"):
        asked, told = results["runs"][name]["pope"]["random"], results["runs"][name]["chair"]["captions"]
        assert (asked["n"], asked["failed"], asked["unparsed"]) == (18, 6, 6) and asked["fn"] >= 3
        assert asked["tp"] + asked["fp"] + asked["tn"] + asked["fn"] == 15  # the failed negatives are neither
        assert (told["n"], told["failed"]) == (2, 1)
    text = (tmp_path / "out/table.md").read_text()
    assert "answers failed and count as wrong: 6 of baseline, 6 of vcd (see samples.jsonl)" in text
    assert "captions failed and are left out: 1 of baseline, 1 of vcd (see samples.jsonl)" in text


def test_missing_images_and_annotations_are_named_before_anything_runs(tmp_path):
    paths = official(tmp_path / "coco", 3)
    data = f"coco:{tmp_path / 'coco'}"
    paths[2].unlink()
    with pytest.raises(VlmFixError, match=f"1 of POPE's 3 images are missing in .*first {paths[2].name}"):
        tasks.build(Settings(benchmark="pope", data=data, limit=3))
    Image.new("RGB", (8, 8)).save(tmp_path / "coco/999999999999.jpg")
    (tmp_path / "ids").write_text("999999999999\n")
    for benchmark in ("pope", "chair"):
        with pytest.raises(VlmFixError, match=r"instances_val2014\.json is missing"):
            tasks.build(Settings(benchmark=benchmark, data=data, ids=str(tmp_path / "ids"), variant="pattern"))


def test_question_files_of_one_name_are_both_named(tmp_path):
    files = []
    for name in ("qa", "qb"):
        (tmp_path / name).mkdir()
        files.append(str(tmp_path / name / "random.json"))
        (tmp_path / name / "random.json").write_text(
            json.dumps([{"question_id": 1, "image": "a.jpg", "text": f"Is there a {name}?", "label": "yes"}])
        )
    picto.scenes("test", 1, 0)[0].image.save(tmp_path / "a.jpg")
    for twice in (files, ["aokvqa", "aokvqa"], [files[0], files[0]]):
        with pytest.raises(VlmFixError, match="would both be the split") as error:
            tasks.build(Settings("pope", data=f"coco:{tmp_path}", questions=tuple(twice)))
        assert all(str(error.value).count(file) for file in twice)
    other = Path(files[1]).rename(tmp_path / "qb" / "popular.json")
    (task,) = tasks.build(Settings("pope", data=f"coco:{tmp_path}", questions=(files[0], str(other))))
    assert task.sizes == {"random": 1, "popular": 1}


def test_other_images_with_their_own_annotations(tmp_path):
    """A rendered Picto folder read back as coco:DIR holds the same images and objects as Picto itself."""
    from vlm_fix.eval import picto

    folder = picto.render(tmp_path / "picto", scenes=12, split="shift", seed=3)
    (read,) = tasks.build(Settings(benchmark="chair", data=f"coco:{folder}", limit=12, variant="pattern"))
    (made,) = tasks.build(Settings(benchmark="chair", data="picto:shift", limit=12, variant="pattern", seed=3))
    assert read.truth == made.truth
    assert [list(tasks.sample.load_image(s).getdata()) for s in read.samples] == [
        list(s.image.getdata()) for s in made.samples
    ]
    (questions,) = tasks.build(Settings(benchmark="pope", data=f"coco:{folder}"))
    three = sum(len({name for name, _ in s.objects}) > 2 for s in picto.scenes("shift", 12, 3))
    assert questions.sizes == dict.fromkeys(("random", "popular", "adversarial"), 6 * three)


def test_one_bad_sample_does_not_take_its_batch_along(tmp_path, monkeypatch):
    real = generation.generate
    (task,) = tasks.build(Settings(**SMALL, benchmark="pope"))
    poison = task.samples[7].prompt

    def generate(model, processor, images, prompts, seed, **how):
        if poison in prompts:
            raise RuntimeError("no memory left")
        return real(model, processor, images, prompts, seed, **how)

    monkeypatch.setattr(generation, "generate", generate)
    run(tmp_path, benchmark="pope")
    said = rows(tmp_path)
    assert len(said) == len(task.samples)
    assert {r["prompt"] for r in said if r["error"]} == {poison}
    assert all(r["error"] == "RuntimeError: no memory left" for r in said if r["prompt"] == poison)


def test_warnings_are_kept_with_the_results(tmp_path, monkeypatch):
    real = generation.generate

    def generate(*args, **how):
        warnings.warn("edited no row", stacklevel=2)
        return real(*args, **how)

    monkeypatch.setattr(generation, "generate", generate)
    results = run(tmp_path, benchmark="chair")  # 6 captions: a batch of 5 and one of 1
    assert results["warnings"] == {"baseline": {"edited no row": 2}}
    assert "`baseline`: warned in 2 batches: edited no row" in (tmp_path / "table.md").read_text()


def test_an_idle_method_is_told_after_the_warm_up(tmp_path):
    results = run(tmp_path, benchmark="chair", methods=(("hiprune:keep=192",),))  # the model has 64 image tokens
    (message,) = results["warnings"]["hiprune:keep=192"]
    assert message.startswith("hiprune changed nothing in this call") and not results["warnings"]["baseline"]
    assert results["warnings"]["hiprune:keep=192"][message] == 2  # a batch of 5 and one of 1


def test_a_method_that_changes_nothing_is_named(tmp_path):
    results = run(tmp_path, benchmark="chair", methods=(("pai:alpha=0",), ("pai:alpha=2",)))
    assert results["changed"]["pai:alpha=0"] == {"answers": 6, "changed": 0}
    assert results["changed"]["pai:alpha=2"]["changed"] > 0
    text = (tmp_path / "table.md").read_text()
    assert text.count("answers is the baseline's") == 1 and "`pai:alpha=0`: every one of its 6 answers" in text


def test_a_run_without_any_answer_gives_up_in_one_sentence(tmp_path, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(generation, "generate", broken)
    with pytest.raises(VlmFixError, match=r"baseline: no answer in 3 batches .*no memory left"):
        run(tmp_path, benchmark="pope")
    assert len(rows(tmp_path)) == 15  # what was tried is on disk


def test_a_failed_sample_is_wrong_and_stays():
    (task,) = tasks.build(Settings(benchmark="pope", splits=("random",), limit=4))
    say = {q.image + "|" + q.text: q.label for q in task.questions["random"]}
    lost = next(key for key, label in say.items() if label == "yes")
    wrong = next(key for key, label in say.items() if label == "no")
    answers = {"baseline": {**say, wrong: "yes"}, "method": {**say, lost: None}}

    def rows_of(name, benchmark):
        return [{"id": k, "answer": text, "error": None if text else "lost"} for k, text in answers[name].items()]

    out = summary.summarise(("baseline", "method"), [task], rows_of)
    base, method = (out[name]["pope"]["random"] for name in ("baseline", "method"))
    assert (base["n"], base["failed"], base["fp"]) == (24, 0, 1)
    assert (method["n"], method["failed"], method["unparsed"], method["fn"], method["tp"]) == (24, 1, 1, 1, 11)
    assert method["accuracy"] == pytest.approx(23 / 24) and method["delta"]["accuracy"]["delta"] == 0
    assert method["outcomes"] == {"mended": 1, "broken": 1, "p": 1.0}
    assert method["transitions"] == {"fn_to_tp": 0, "tp_to_fn": 1, "fp_to_tn": 1, "tn_to_fp": 0}


def test_seeds_are_summed_and_their_spread_is_told():
    (task,) = tasks.build(Settings(benchmark="pope", splits=("random",), limit=4))
    say = {q.image + "|" + q.text: q.label for q in task.questions["random"]}
    wrong = list(say)[:3]

    def rows_of(name, benchmark):
        """The baseline errs on 1, 2 and 3 questions with its three seeds; the method, with one, on none."""
        seeds = {"baseline": (0, 1, 2), "method": (0,)}[name]
        flip = {"yes": "no", "no": "yes"}
        return [
            {"id": k, "seed": s, "error": None, "answer": flip[v] if name == "baseline" and k in wrong[: s + 1] else v}
            for s in seeds
            for k, v in say.items()
        ]

    out = summary.summarise(("baseline", "method"), [task], rows_of)
    base, method = (out[name]["pope"]["random"] for name in ("baseline", "method"))
    assert base["n"] == 72 and base["accuracy"] == pytest.approx(66 / 72)
    assert base["seeds"]["accuracy"]["values"] == pytest.approx([23 / 24, 22 / 24, 21 / 24])
    assert base["seeds"]["accuracy"]["sd"] == pytest.approx(1 / 24)
    assert method["n"] == 24 and "seeds" not in method and method["accuracy"] == 1
    assert method["delta"]["accuracy"]["delta"] == pytest.approx(6 / 72)
    assert method["outcomes"] == {"mended": 6, "broken": 0, "p": 1.0}  # the largest p: one question of the first seed


def test_speed_counts_each_batch_once():
    made = [
        {"seed": 0, "batch": b, "tokens": 10, "batch_seconds": 2.0, "batch_first_token": b + 0.5, "peak_mb": 100.0 + b}
        for b in range(3)
        for _ in range(4)
    ]
    assert runner.speed(made) == {"tokens_per_second": 20.0, "first_token_seconds": 1.5, "peak_mb": 102.0}


def test_tables_fit_100_columns(whole):
    _, results = whole
    results = json.loads(json.dumps(results))
    long = "hiprune:keep=192,alpha=0.1+pai:alpha=0.2,gamma=1.1,layers=2-31+vcd:alpha=1.0,beta=0.1"
    for part in ("runs", "speed"):
        results[part][long] = results[part]["vcd"]
    for delta in results["runs"][long]["pope"]["random"]["delta"].values():
        delta.update(delta=-1.0, low=-1.0, high=-0.5, p_holm=0.01)
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.tables(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert re.sub(r"\s", "", "-100.0 [-100.0, -50.0]*") in re.sub(r"\s", "", text)
    for title in (
        "accuracy",
        "prec.",
        "recall",
        "F1",
        "yes",
        "unp.",
        "C_S",
        "C_I",
        "length",
        "tok/s",
        "first token s",
        "peak MB",
    ):
        assert title in text
    assert f"`{long}`" in report.markdown(results)


def test_seeds_differ_by_batch_and_seed_but_not_by_run():
    samples = [tasks.sample.Sample(str(i), i, "", Path(), "x", {}) for i in range(4)]
    seeds = {generation._seed(s, part) for s in (0, 1) for part in (samples[:2], samples[2:])}
    assert len(seeds) == 4 and all(0 <= s < math.pow(2, 32) for s in seeds)


def test_a_device_map_gives_the_same_answers(loaded, tmp_path):
    identity = loading.load_model(MODEL, device_map="auto")[2]
    assert identity["device"] == loaded[0].device.type
    how = {"benchmark": "chair", "methods": (("vcd",),), "limit": 3}
    plain, spread = run(tmp_path / "a", **how), run(tmp_path / "b", device_map="auto", **how)
    assert [r["answer"] for r in rows(tmp_path / "a")] == [r["answer"] for r in rows(tmp_path / "b")]
    assert plain["runs"] == spread["runs"]


def test_a_calibrations_file_is_told_by_name_and_hash(tmp_path):
    """Results of two machines say the same of the same file, and a run goes on beside another copy of it."""
    told = []
    for folder, content in (("one", b"a"), ("two", b"a"), ("three", b"b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vti.safetensors").write_bytes(content)
        told.append(runner._told({"rank": 4, "file": str(tmp_path / folder / "vti.safetensors")}))
    assert told[0] == told[1] != told[2] and str(tmp_path) not in str(told)
    assert told[0]["rank"] == 4 and told[0]["file"].startswith("vti.safetensors sha256:ca978112ca1bbdca")


def test_a_run_with_a_calibrated_file_says_it_so(tmp_path):
    how = {"benchmark": "pope", "limit": 1, "max_new_tokens": 2, "model": "picto-llava"}
    told = run(tmp_path / "run", methods=(("vti",),), **how)["settings"]["calibration"]["vti"]
    assert told["file"].startswith("vti.file.safetensors sha256:") and "/" not in told["file"]
