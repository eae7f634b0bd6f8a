"""Options of `vlm-fix eval` from files, for loading and generating, trackers, and the forms of `vlm-fix report`."""

import csv
import dataclasses
import doctest
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import RESULTS
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import options
from vlm_fix.eval.report import export, tracking
from vlm_fix.eval.run import loading, runner, size
from vlm_fix.eval.run.store import Team, load_results
from vlm_fix.eval.settings import Settings

STORED = sorted(RESULTS.glob("*/results.json"))[0]
EVERY = Settings(
    benchmark="all",
    model="some/model",
    methods=(("pai:alpha=0.2,gamma=1.1",), ("hiprune:keep=32", "vcd")),
    data="coco:/data/coco",
    limit=7,
    batch_size="auto",
    seed=3,
    splits=("popular", "random"),
    scorer="ours",
    variant="pattern",
    prompt="Say, in one line: what is there? # everything",
    ids="ids.txt",
    max_new_tokens=64,
    sample=True,
    temperature=0.7,
    top_p=0.9,
    calibration=("a.json", "b.json"),
    seeds=(1, 2),
    controls=True,
    drop_incomplete=True,
    revision="v1.0",
    trust_remote_code=True,
    model_args={"attn_implementation": "sdpa", "quantization_config": {"bits": 4}},
    gen_kwargs={"repetition_penalty": 1.05, "renormalize_logits": True},
)


@pytest.fixture
def asked(monkeypatch: Any) -> list[tuple[Settings, str]]:
    """What `vlm-fix eval` hands to the runner, which does not start."""
    found: list[tuple[Settings, str]] = []

    def evaluate(settings: Settings, output: str, resume: bool = False) -> dict[str, Any]:
        found.append((settings, output))
        raise VlmFixError("not started")

    monkeypatch.setattr(runner, "evaluate", evaluate)
    return found


def test_worked_examples() -> None:
    assert doctest.testmod(options).failed == 0 and doctest.testmod(export).failed == 0


@pytest.mark.parametrize(
    "settings", [EVERY, Settings("pope"), Settings("pope", questions=("a.json", "gqa"), num_beams=3)]
)
def test_the_file_of_a_run_repeats_it(settings: Settings, tmp_path: Path, asked: list, capsys: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(options.to_text(settings))
    assert cli.main(["eval", "--config", str(file), "--output", str(tmp_path / "out")]) == 2
    assert "not started" in capsys.readouterr().err
    assert asked == [(settings, str(tmp_path / "out"))]


def test_every_setting_has_an_option_and_the_file_takes_every_option(tmp_path: Path, asked: list) -> None:
    written = options.read_file(_file(tmp_path, options.to_text(EVERY))).keys()
    unsaid = {field.name for field in dataclasses.fields(Settings) if getattr(EVERY, field.name) == field.default}
    names = {
        options.NAMES.get(f.name, f.name).replace("_", "-")
        for f in dataclasses.fields(Settings)
        if f.name not in {*options.UNSAID} & unsaid
    }
    unset = {field.name for field in dataclasses.fields(Settings) if getattr(EVERY, field.name) is None}
    assert {*written} == names - {name.replace("_", "-") for name in unset} and unset == {"device_map", "server"}
    file = _file(tmp_path, "benchmark: pope\noutput: here\ncompare_published: true\njson: true\n")
    cli.main(["eval", "--config", file])
    assert asked[0][1] == "here"


def test_what_is_typed_comes_first(tmp_path: Path, asked: list) -> None:
    file = _file(tmp_path, "benchmark: pope\nmethod: pai,vcd\nlimit: 5\nseed: 4\ncontrols: true\n")
    cli.main(["eval", "chair", "--config", file, "--limit", "9", "--method", "var", "--output", "out"])
    settings = asked[0][0]
    assert (settings.benchmark, settings.limit, settings.seed, settings.controls) == ("chair", 9, 4, True)
    assert settings.methods == (("var",),)


def _file(folder: Path, text: str) -> str:
    path = folder / "given.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmark: pope\nmetod: pai\n", "there is no option 'metod'; did you mean method?"),
        ("benchmark: pope\nzzz: 1\n", "there is no option 'zzz'; it knows batch-size"),
        ("benchmark: pope\nsample: 1\n", "sample is 1: write true or false"),
        ("benchmark: [pope\n", "is not YAML, line 2"),
        ("- pope\n", "holds no options"),
        ("model: picto-llava\n", "needs a benchmark"),
        ("benchmark: pope\ngen-kwargs: {top_p: 0.5}\n", "--gen-kwargs top_p: give --top-p instead"),
        ("benchmark: pope\nmodel-args: {torch_dtype: float16}\n", "--model-args torch_dtype: give --dtype instead"),
        ("benchmark: pope\ngen-kwargs: penalty\n", "'penalty' is not NAME=VALUE"),
    ],
)
def test_faults_of_a_file_are_one_sentence(text: str, message: str, tmp_path: Path, asked: list, capsys: Any) -> None:
    assert cli.main(["eval", "--config", _file(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not asked


def test_a_value_that_the_parser_refuses_is_an_error(tmp_path: Path, asked: list, capsys: Any) -> None:
    for text, message in (
        ("benchmark: pope\nlimit: many\n", "given.yaml: --limit is 'many': give a whole number"),
        ("benchmark: pope\ntemperature: hot\n", "given.yaml: --temperature is 'hot': give a number"),
        ("benchmark: pope\nbatch-size: big\n", "'big' is no size: give a whole number, or auto"),
        ("benchmark: popo\n", "given.yaml: argument benchmark: there is no 'popo'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["eval", "--config", _file(tmp_path, text)])
        error = capsys.readouterr().err
        assert message in error and "given.yaml" in error and not asked


def test_a_revision_of_a_folder_or_a_bundled_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    for model, what in (("picto-llava", "is bundled"), (str(tmp_path), "is a folder")):
        words = [
            "eval",
            "pope",
            "--limit",
            "1",
            "--model",
            model,
            "--revision",
            "main",
            "--output",
            str(tmp_path / "out"),
        ]
        assert cli.main(words) == 2
        assert f"--revision main has no effect on {model}, which {what}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arguments_of_generate_and_of_loading(monkeypatch: Any) -> None:
    how = Settings("pope", gen_kwargs={"repetition_penalty": 1.1}).generate_kwargs(16)
    assert how["repetition_penalty"] == 1.1 and how["max_new_tokens"] == 16
    seen: dict[str, dict[str, Any]] = {}

    def refuse(kind: str) -> Any:
        def from_pretrained(path: str, **given: Any) -> Any:
            seen[kind] = given
            if kind == "model":
                raise ValueError("the class needs you to execute code: pass `trust_remote_code=True`")

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr(loading, "AutoProcessor", refuse("processor"))
    monkeypatch.setattr(loading, "AutoModelForImageTextToText", refuse("model"))
    with pytest.raises(VlmFixError, match="it comes with code of its own.*--trust-remote-code"):
        loading.load_model("some/model", device="cpu")
    assert "trust_remote_code" not in seen["model"] and "revision" not in seen["model"]
    arguments = {"attn_implementation": "sdpa"}
    with pytest.raises(
        VlmFixError, match="own.*: read that code, then add --trust-remote-code"
    ):  # whatever is given beside
        loading.load_model("some/model", device="cpu", model_args=arguments)
    with pytest.raises(VlmFixError, match="check --model-args attn_implementation"):
        loading.load_model("some/model", device="cpu", revision="v1", trust_remote_code=True, model_args=arguments)
    assert seen["processor"] == {"revision": "v1", "trust_remote_code": True}
    assert seen["model"].items() >= {**seen["processor"], **arguments}.items()


def test_the_largest_batch_that_fits(tmp_path: Path) -> None:
    for most, expected in ((1, 1), (7, 4), (32, 32), (1000, 64)):
        tried: list[int] = []
        assert size.largest(lambda n, most=most, tried=tried: tried.append(n) or n <= most) == expected
        assert tried == [2 ** (k + 1) for k in range(len(tried))]  # never one that is larger than need be
    cpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cpu"))
    assert size.choose(cpu, None, Settings("pope"), [], [], []) == size.ON_CPU
    assert runner._auto_size(Team(), tmp_path, True, lambda: 16) == 16
    (tmp_path / "config.json").write_text('{"batch_size": 4}')
    assert runner._auto_size(Team(), tmp_path, True, lambda: 16) == 4  # a resumed run keeps its batches


class Tracker(types.ModuleType):
    """Stands in for trackio and wandb, which have the same three functions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[dict[str, Any]] = []

    def init(self, **given: Any) -> None:
        self.runs.append(given)

    def log(self, figures: dict[str, float]) -> None:
        self.runs[-1]["figures"] = figures

    def finish(self) -> None:
        self.runs[-1]["finished"] = True


def test_results_go_to_a_tracker(monkeypatch: Any, capsys: Any, asked: list) -> None:
    results, tracker = load_results(STORED.parent), Tracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    tracking.log(tracking.load("wandb"), results, "first")
    assert [run["name"] for run in tracker.runs] == [f"first/{run}" for run in results["runs"]]
    task, parts = next(iter(results["runs"]["baseline"].items()))
    part, scores = next(iter(parts.items()))
    metric = next(name for name, value in scores.items() if isinstance(value, float))
    first = tracker.runs[0]
    assert first["finished"] and first["figures"][f"{task}/{part}/{metric}"] == scores[metric]
    assert any(name.endswith("/delta") for name in tracker.runs[1]["figures"])
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    assert cli.main(["eval", "pope", "--log", "trackio", "--output", "out"]) == 2
    assert "pip install trackio" in capsys.readouterr().err and not asked


def test_report_as_csv_and_latex(tmp_path: Path, capsys: Any) -> None:
    table, text = tmp_path / "figures.csv", tmp_path / "tables.tex"
    assert cli.main(["report", str(STORED.parent), "--csv", str(table), "--latex", str(text)]) == 0
    assert capsys.readouterr().out.split() == [str(table), str(text)]
    rows, results = list(csv.DictReader(table.open())), load_results(STORED.parent)
    for run, tasks in results["runs"].items():
        for task, parts in tasks.items():
            for part, scores in parts.items():
                for name, change in scores["delta"].items():
                    (row,) = (
                        r for r in rows if (r["run"], r["task"], r["part"], r["metric"]) == (run, task, part, name)
                    )
                    assert (float(row["value"]), float(row["delta"])) == (scores[name], change["delta"])
                    assert json.loads(row["excludes_zero"].lower()) is change["excludes_zero"]
    made = text.read_text()
    assert made.count(r"\begin{tabular}") == made.count(r"\bottomrule") == made.count(r"\end{table}") > 1
    for body in made.split(r"\begin{tabular}{")[1:]:
        columns = body.index("}")
        lines = [line for line in body.splitlines()[2:] if line.endswith(r"\\") and "multicolumn" not in line]
        assert lines and all(line.count(" & ") == columns - 1 for line in lines)
        assert not any(mark in line.replace(rf"\{mark}", "") for line in lines for mark in "%_#")


def test_what_generate_refuses_ends_the_run_and_is_no_table_of_zeros(tmp_path: Path, capsys: Any) -> None:
    arguments = ["eval", "pope", "--limit", "1", "--split", "random", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--gen-kwargs", "nonsense=3"]) == 2
    told = capsys.readouterr().err
    assert "generate refuses these settings" in told and "nonsense" in told and "--gen-kwargs" in told
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_setting_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, message in (
        ("limit: 1\nmodel: a\nlimit: 2\n", "line 3: limit comes twice"),
        ("batch_size: 1\nbatch-size: 2\n", "line 2: batch-size comes twice"),
        ("gen-kwargs: {a: 1, a: 2}\n", "line 1: a comes twice"),
    ):
        path.write_text(text)
        with pytest.raises(VlmFixError, match=message):
            options.read_file(path)
    path.write_text("limit: 1\nmethod: [pai, vcd]\ngen-kwargs: {a: 1}\n")
    assert options.read_file(path) == {"limit": 1, "method": ["pai", "vcd"], "gen-kwargs": {"a": 1}}
    for text in ("a=1,a=2", '{"a": 1, "a": 2}'):
        with pytest.raises(VlmFixError, match="--gen-kwargs names a twice"):
            options.key_values(text, "--gen-kwargs")


def test_options_of_a_checkpoint_have_no_effect_on_answers_for_a_judge(tmp_path: Path, capsys: Any) -> None:
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"id": "v1_0", "text": "A dog."}\n')
    given = ["export", "mm-vet", str(answers), "--out", str(tmp_path / "o.json")]
    assert cli.main(given) == 0
    for extra in (["--model", "foo"], ["--device", "cuda"], ["--dtype", "float16"], ["--calibration", "x"]):
        assert cli.main([*given, *extra]) == 2
        assert f"{extra[0]} has no effect on export mm-vet" in capsys.readouterr().err
    assert cli.main([*given, "--template", "x"]) == 2
    for extra in (["--out", "x"], ["--template", "x"], ["--id-key", "x"], ["--answer-key", "x"]):
        assert cli.main(["export", "nullu", str(tmp_path / "new"), *extra]) == 2
        assert f"{extra[0]} has no effect on export nullu" in capsys.readouterr().err
