"""`recommend` on picto-llava, from rows of one's own to the files, and again from its steps."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest

import vlm_fix
from vlm_fix import cli
from vlm_fix.calibrated import Calibration
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.recommend import api
from vlm_fix.eval.recommend import data as asked
from vlm_fix.eval.recommend.ledger import Ledger
from vlm_fix.eval.recommend.measure import Measurer
from vlm_fix.eval.recommend.objective import COLUMNS
from vlm_fix.eval.recommend.page import failures
from vlm_fix.eval.recommend.search import BASELINE, Candidate, Dropped
from vlm_fix.eval.run.loading import load_model
from vlm_fix.eval.settings import Settings
from vlm_fix.methods.heads.vhr import VHR
from vlm_fix.presets import Preset
from vlm_fix.registry import parse


@pytest.fixture(scope="module")
def loaded():
    return load_model("picto-llava", device="cpu")


def rows(n=8):
    made = []
    for scene in picto.scenes("shift", n, 0):
        there = [name for name, _ in scene.objects]
        absent = next(name for name in ("giraffe", "kite", "clock") if name not in there)
        for name, label in ((there[0], "yes"), (absent, "no")):
            made.append({"image": scene.image, "question": f"Is there a {name} in the image?", "label": label})
        made.append({"image": scene.image, "objects": there})
    return made


@pytest.fixture(scope="module")
def found(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("recommend") / "fix.yaml"
    model, processor, _ = loaded
    told: list[str] = []
    made = vlm_fix.recommend(
        model,
        processor,
        rows(),
        budget=600,
        only="vhr:alpha=3,vcd",
        max_new_tokens=24,
        out=out,
        watch=lambda search, candidates, what: told.append(what),
    )
    return made, out, told


def test_it_writes_what_it_found_and_leaves_the_model_alone(found, loaded):
    made, out, told = found
    assert vlm_fix.wing.installed(loaded[0]) is None
    assert not made.better and made.verdict.startswith("nothing here beats your model")  # four images prove nothing
    report = json.loads(out.with_suffix(".json").read_text())
    tried = {row["candidate"]: row for row in report["candidates"]}
    assert tried["vhr:alpha=3.0"]["images"] == 4 and tried["vcd"]["slowdown"] > 1.2
    assert tried["random_heads"]["control"]
    assert report["data"]["search"] == report["data"]["proof"] == 4
    assert {"round", "candidate"} <= {*told}
    preset = Preset.read(out)
    assert preset.methods == () and preset.about["verdict"] == made.verdict and preset.model["depth"] == 6
    page = out.with_suffix(".html").read_text()
    assert "Keep" in page or "keep it as it is" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_resuming_a_finished_search_asks_the_model_nothing(found, loaded, monkeypatch):
    made, out, _ = found
    monkeypatch.setattr(Measurer, "_ask", lambda *_: pytest.fail("it asked again"))
    arguments = {"budget": 600, "only": "vhr:alpha=3,vcd", "max_new_tokens": 24, "out": out}
    again = vlm_fix.recommend(*loaded[:2], rows(), **arguments, resume=True)
    for name in ("verdict", "candidates", "proofs", "baseline", "seconds"):
        assert again.report[name] == made.report[name]
    with pytest.raises(VlmFixError, match="add --resume"):
        vlm_fix.recommend(*loaded[:2], rows(), **arguments)


def test_apply_wraps_with_what_was_proven(found, loaded):
    made, _, _ = found
    with pytest.warns(UserWarning, match="keep it as it is"):
        made.apply()
    assert vlm_fix.wing.installed(loaded[0]) is None
    better = type(made)(made.model, Preset((VHR(alpha=3.0),), made.preset.model), made.report)
    assert better.better and better.spec == "vhr:alpha=3.0"
    try:
        assert better.apply() is made.model
        assert vlm_fix.wing.installed(loaded[0]).methods == [VHR(alpha=3.0)]
        with pytest.raises(VlmFixError, match="is wrapped"):
            vlm_fix.recommend(*loaded[:2], rows())
    finally:
        vlm_fix.unwrap(loaded[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--budget soon", "is no time"),
        ("--max-slowdown 0.5", "1 or more"),
        ("--data nowhere", "no file"),
        ("--method pia", "did you mean 'pai'"),
        ("--limit 0", "at least 1"),
        ("--method pai:alpha=much", "alpha='much'"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, capsys, words, said):
    assert cli.main(["recommend", "--out", str(tmp_path / "fix.yaml"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not [*tmp_path.iterdir()], "a search that was refused leaves nothing that --resume would have to continue"


def test_a_limit_that_is_no_number_is_a_sentence(capsys):
    with pytest.raises(SystemExit):
        cli.main(["recommend", "--max-yes", "few"])
    assert "'few' is no finite number: give one, or none to switch the limit off" in capsys.readouterr().err


def test_what_is_far_too_slow_is_stopped_within_its_measurement(loaded, monkeypatch):
    model, processor, _ = loaded
    data = asked.load(rows(), None, 0, 4)
    stacks = {"vcd": parse("vcd")}
    measurer = Measurer(model, processor, data, stacks, Ledger(None, {}), Settings(batch_size=4, max_new_tokens=4), 2.0)
    monkeypatch.setattr(measurer, "_clock", iter(1.0 * n for n in range(10**6)).__next__)
    measurer(Candidate(BASELINE), data.search)  # 4 captions and 8 questions: three batches of a second
    assert measurer.pace == {"chair": (1.0, 4), "pope": (2.0, 8)}
    answers = len(measurer(Candidate("vcd"), data.search)[0])
    assert answers == 4
    monkeypatch.setattr(measurer, "_clock", iter(13.0 * n for n in range(10**6)).__next__)
    with pytest.raises(Dropped, match="too slow: 4 of 12 answers took 4 times as long as all of the model's own"):
        measurer(Candidate("vcd"), data.search)
    measurer(Candidate(BASELINE), data.proof)
    assert len(measurer(Candidate("vcd"), data.proof)[0]) == 4, "the proof ends by the time alone"
    measurer.slowdown = None
    assert len(measurer(Candidate("vcd"), data.search)[0]) == 4


def test_a_caption_that_failed_ends_nothing_and_is_counted():
    data = asked.load(rows(), None, 0, 4)
    measurer = Measurer(None, None, data, {}, Ledger(None, {}), Settings(batch_size=4))
    fails = {BASELINE: "0", "vhr": "1"}
    said = {s.id: "a dog and a giraffe" for s in data.chair.samples} | {s.id: "yes" for s in data.pope.samples}

    def ask(key, images):
        lost = [s.id for s in data.chair.samples if s.file in images][int(fails[key])]
        here = {s.id for task in (data.chair, data.pope) for s in task.samples if s.file in images}
        answers = {id: None if id == lost else text for id, text in said.items() if id in here}
        return {"answers": answers, "tokens": 1, "seconds": 1.0, "warnings": [], "pace": {}, "wall": 1.0}

    measurer._ask = ask
    captions = COLUMNS.index("captions")
    for key, counted in ((BASELINE, 3), ("vhr", 2)):
        table, _ = measurer(Candidate(key), data.search)
        assert table[:, captions].sum() == counted, "what both sides answered"
    for key in (BASELINE, "vhr"):
        measurer(Candidate(key), data.proof)
    assert measurer.failed == {BASELINE: 2, "vhr": 2}
    proof = SimpleNamespace(candidate=Candidate("vhr"), gain=1.0)
    found = measurer.examples(SimpleNamespace(proofs=[proof], winner=proof))
    assert isinstance(found, list)
    (sentence,) = failures({"failed": measurer.failed})
    assert "2 of the model itself, 2 of vhr; where the model itself has no answer" in sentence
    assert failures({"failed": {}}) == []


def test_a_resumed_search_has_the_calibration_that_it_began_with(loaded, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(api, "Ledger", lambda place, settings, resume: kept.append(settings) or 1 / 0)
    vectors = tmp_path / "v.safetensors"
    for value, held in ((0.5, b"a"), (0.6, b"a"), (0.6, b"b")):
        vectors.write_bytes(held)
        made = Calibration("pai", {"alpha": value, "file": str(vectors)}, {})
        monkeypatch.setattr(api, "Candidates", SimpleNamespace(of=lambda *_, made=made: SimpleNamespace(files=[made])))
        with pytest.raises(ZeroDivisionError):
            vlm_fix.recommend(*loaded[:2], rows(), budget=600, out=tmp_path / "x.yaml")
    told = [json.dumps(settings["calibration"]) for settings in kept]
    assert len({*told}) == 3 and all("sha256:" in each and str(tmp_path) not in each for each in told)


def test_a_limit_can_be_switched_off():
    args = cli._parser().parse_args(["recommend", "--max-slowdown", "none", "--min-recall", "-2.5"])
    assert isinstance(args, argparse.Namespace)
    assert args.max_slowdown is None and args.min_recall == -2.5
