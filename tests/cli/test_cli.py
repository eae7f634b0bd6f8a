"""The command line: every user error is one sentence on stderr, --json is JSON and nothing else, tables fit."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from vlm_fix import cli, list_methods
from vlm_fix.cli import bench
from vlm_fix.cli.common import SCORERS
from vlm_fix.eval.scorers import yesno

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Small inputs, good and bad, by name."""
    asked = [
        {"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog in the image?", "label": "yes"}
        for i in range(4)
    ]
    (tmp_path / "empty").write_text("")
    (tmp_path / "no-images").mkdir()
    (tmp_path / "readme").write_text("Answers of our model")
    return {
        "dir": str(tmp_path),
        "readme": str(tmp_path / "readme"),
        "questions": write(tmp_path / "q.jsonl", asked),
        "answers": write(tmp_path / "a.jsonl", [{"question_id": i, "text": "Yes" if i else "No"} for i in range(4)]),
        "short": write(tmp_path / "s.jsonl", [{"question_id": i, "text": "Yes"} for i in range(3)]),
        "captions": write(tmp_path / "c.jsonl", [{"image_id": 9, "caption": "A bowl of broccoli and a zebra."}]),
        "strange": write(
            tmp_path / "x.jsonl", [{"image_id": 999999, "caption": "A dog."}, {"image_id": 1, "caption": "A"}]
        ),
    }


BAD = {
    "unknown method, nearest name": ("eval pope --method vdc", "did you mean 'vcd'"),
    "unknown setting": ("eval pope --method vcd:alpah=1", "did you mean 'alpha'"),
    "wrong value": ("eval pope --method hiprune:alpha=7", "alpha=7"),
    "not a number": ("eval pope --method vcd:alpha=much", "much"),
    "stack without meaning": ("eval pope --model {model} --limit 3 --method vcd+vcd --output {dir}/o", "both contrast"),
    "unknown data": ("eval pope --data coco", "give picto, picto:SPLIT or coco:DIR"),
    "unknown Picto split": ("eval pope --data picto:dev", "dev"),
    "no such folder": ("eval chair --data coco:{dir}/none --variant pattern", "none is not a folder"),
    "no images": ("eval chair --data coco:{dir}/no-images --variant pattern", "holds no images"),
    "unknown POPE split": ("eval pope --split random,hard", "'hard' is unknown"),
    "limit": ("eval pope --limit 0", "--limit is 0: give a whole number of at least 1"),
    "temperature": ("eval pope --sample --temperature 0", "--temperature must be above 0"),
    "beams and sampling": ("eval pope --sample --num-beams 2", "exclude each other"),
    "prompt without question": ("eval pope --prompt Well?", "must hold {{question}}"),
    "resume without folder": ("eval pope --resume", "--resume needs --output"),
    "unknown model": ("eval pope --limit 2 --model {dir}/none --output {dir}/o", "could not be loaded"),
    "unknown bundled model": ("eval pope --limit 2 --model picto-bloom --output {dir}/o", "picto-bloom"),
    "output is a file": ("eval pope --limit 2 --output {dir}/empty", "is a file: give a folder"),
    "no question file": ("score pope {dir}/none {answers}", "none"),
    "amber answers of another kind": ("score amber {readme}", 'such as {{"id": 1, "response": "A tree in a park."}}.'),
    "hallusion answers of another kind": ("score hallusion {readme}", '"model_prediction": "No."}}.'),
    "answers of another kind": ("score pope {questions} {readme}", 'such as {{"question_id": 1, "text": "No."}}.'),
    "captions of another kind": ("score chair {readme} --variant pattern", 'such as {{"image_id": 310196, "caption": '),
    "not lined up": ("score pope {questions} {short}", "do not line up: 4 questions, 3 answers"),
    "empty answers": ("score pope {questions} {dir}/empty", "is empty"),
    "empty captions": ("score chair {dir}/empty --variant pattern", "is empty"),
    "image without ground truth": ("score chair {strange} --variant pattern", "ground truth"),
    "no ground truth file": ("score chair {captions} --variant pattern --ground-truth {dir}/none", "none"),
    "scenes": ("picto render {dir}/out --scenes 0", "--scenes is 0"),
    "render split": ("picto render {dir}/out --split dev", "dev"),
    "no tokens": ("eval pope --method hiprune:keep=0", "keep=0.0 must be a number above 0"),
    "unknown device": ("eval pope --limit 2 --device mps --output {dir}/o", "--device mps is unknown"),
    "no such checkpoint": ("calibrate iri --model /none/here", "there is no such folder"),
    "bench of what is unknown": ("bench attention --method pia", "did you mean 'pai'"),
    "bench device": ("bench attention --device tpu", "--device tpu is unknown"),
    "page in a file": ("report {dir}/no-images --out {captions}/page.html", "cannot be written"),
    "page over a folder": ("report {dir}/no-images --out {dir}", "is a folder: give a file in it"),
    "calibration in a file": ("calibrate iri --out {captions}/iri.json", "cannot be written"),
    "figures in a file": ("bench attention --output {captions}/bench.json", "cannot be written"),
    "results in a file": ("eval pope --output {captions}/out", "cannot be written"),
    "scenes in a file": ("picto render {captions}/out", "cannot be written"),
    "tell of an unknown method": ("methods vdc", "did you mean 'vcd'"),
    "describe what is not there": ("describe {dir}/none.jpg", "there is no image"),
    "describe what is no image": ("describe {readme}", "cannot be read as an image"),
    "objects that are none": ("describe --objects dog,blob", "'blob' is none of COCO's 80 objects"),
    "a file without that method": ("describe --method {readme}.py:Boost", "there is no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_user_errors_are_one_sentence(case, files, capsys, monkeypatch):
    command, expected = (text.format(**files, model=MODEL) for text in BAD[case])
    monkeypatch.chdir(files["dir"])
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and "Traceback" not in err and not out
    assert expected in lines[0]


def test_score_json(files, capsys):
    assert cli.main(["score", "pope", files["questions"], files["answers"], "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["scorer"], scored["tp"], scored["fn"], scored["accuracy"]) == ("official", 3, 1, 0.75)
    assert cli.main(["score", "chair", files["captions"], "--variant", "pattern", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["n"] == 1 and scored["chair_s"] == 1.0  # COCO image 9 is a lunch box: no zebra


def test_score_prints_every_figure_once(files, capsys):
    assert cli.main(["score", "pope", files["questions"], files["answers"], "--scorer", "vcd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "POPE  accuracy             0.75000" in lines
    assert len({line.split()[1] for line in lines}) == len(lines) and not any("rows" in line for line in lines)


def test_methods_and_models(capsys):
    for command in ("models", "methods"):
        assert cli.main([command]) == 0
        short = capsys.readouterr().out
        assert max(map(len, short.splitlines())) <= 100
    assert cli.main(["methods", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(listed) == {method.name for method in list_methods()} >= {"var", "vhr", "pai", "vcd", "hiprune"}
    assert {p["name"] for p in listed["vcd"]["parameters"]} >= {"alpha", "beta", "noise_step"}
    assert all(row["about"] and row["kind"] for row in listed.values())
    ranges = {p["name"]: p["range"] for p in listed["hiprune"]["parameters"]}
    assert ranges["keep"] == "above 0" and ranges["alpha"] == "0 to 1" and ranges["positions"] == "compact, original"
    assert cli.main(["methods", "pai", "hiprune"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 100 and "gamma=1 " in told and "arxiv.org/abs/2508.00553" in told
    kept = listed["hiprune"]["measured"]
    assert kept and all(f"{row['model']}, points above the baseline" in told for row in kept)
    assert all(f" {part}" in told for row in kept for part in row["spec"].replace(":", " :").split())
    assert "arxiv.org" not in short and all(name in short for name in listed)
    assert cli.main(["models", "--json"]) == 0
    assert {"llava", "qwen2_5_vl"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


def test_eval_json_is_all_that_is_printed(tmp_path, capsys):
    command = ["eval", "pope", "--model", MODEL, "--method", "vcd:alpha=0.5,beta=0.2", "--limit", "3", "--json"]
    assert cli.main([*command, "--split", "adversarial,random", "--output", str(tmp_path / "out")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results["runs"]) == ["baseline", "vcd:alpha=0.5,beta=0.2"]
    assert list(results["runs"]["baseline"]["pope"]) == ["adversarial", "random"]
    assert results["settings"]["data"]["pope"]["images"] == 3
    shown = cli.main(["eval", "pope", "--model", MODEL, "--limit", "3", "--output", str(tmp_path / "out")])
    assert shown == 2 and "already holds a run" in capsys.readouterr().err


def test_eval_prints_tables_within_100_columns_and_where_things_lie(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", "all", "--model", MODEL, "--limit", "2", "--variant", "pattern", "--max-new-tokens", "12"]
    assert cli.main([*command, "--output", str(out)]) == 0
    text = capsys.readouterr().out
    table, _, places = text.partition("Results: ")
    assert max(map(len, table.splitlines())) <= 100 and "adversarial" in table and "C_I" in table
    assert "figure.png" in places and (out / "figure.png").stat().st_size > 5000
    assert (out / "table.md").read_text().count(
        "\n| `baseline` |"
    ) == 2  # CHAIR and speed; POPE rows begin with the split


def test_a_disk_that_refuses_is_a_sentence(tmp_path, capsys, monkeypatch):
    from vlm_fix.eval.run import store

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Store, "add", full)
    assert cli.main(["eval", "pope", "--model", MODEL, "--limit", "2", "--output", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and "--resume" in last
    assert cli.main(["picto", "render", "/proc/none/here", "--scenes", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: /proc/none")


def test_a_warning_is_a_sentence(files, tmp_path, capsys):
    twice = write(tmp_path / "t.jsonl", [{"image_id": 9, "caption": "A dog."}] * 2)
    assert cli.main(["score", "chair", twice, "--variant", "pattern"]) == 0
    read, line = capsys.readouterr().err.splitlines()
    assert read.startswith("read 2 answers") and line.startswith("warning: ") and "several captions" in line


def test_bench_prints_what_its_brackets_are():
    from rich.console import Console

    from vlm_fix.eval import bench

    row = {"spec": "baseline", "seconds": 0.0, "speed": 0.0, "peak_mb": 1.0, "note": ""}
    what = dict.fromkeys(("shape", "dtype", "prompt_tokens", "visual_tokens", "new_tokens", "rounds", "hardware"), "x")
    console = Console(width=100, record=True, quiet=True)
    with console.capture() as caught:
        console.quiet = False
        console.print(bench.table({"bench": "decode", **what, "rows": [row]}))
    assert "median [lowest, highest]" in caught.get() and "not timed" in caught.get()


def test_bench_tells_how_far_it_is_where_there_is_no_terminal(capsys):
    with bench.ticking("bench attention", every=0) as tick:
        tick(2)
        tick(2)
    assert capsys.readouterr().err == "bench attention: 1 of 2\nbench attention: 2 of 2\n"


def test_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from vlm_fix.eval.run import runner

    def interrupt(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", interrupt)
    assert cli.main(["eval", "pope", "--output", str(tmp_path / "out")]) == 130
    assert f"--resume --output {tmp_path / 'out'}" in capsys.readouterr().err


def test_render_writes_a_coco_folder(tmp_path, capsys):
    assert cli.main(["picto", "render", str(tmp_path / "p"), "--scenes", "3", "--split", "shift", "--seed", "5"]) == 0
    assert str(tmp_path / "p") in capsys.readouterr().out
    assert len(list((tmp_path / "p/images").iterdir())) == 3
    assert len(json.loads((tmp_path / "p/instances_shift.json").read_text())["images"]) == 3


def test_help_version_and_module_entry(capsys):
    for command in (["--help"], ["eval", "--help"], ["score", "chair", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 0 and capsys.readouterr().out.strip()
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "pope", "--nonsense"])
    assert end.value.code == 2 and "--nonsense" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "vlm_fix.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("vlm-fix ")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("metods", "there is no command 'metods'; did you mean 'methods'?"),
        (
            "serve picto-llava --method vcd --method pai",
            "--method is given twice; give it once: A,B tries them one by one",
        ),
        ("eval pope --limit 3 --split random --limit=4", "--limit is given twice; give it once"),
        ("serve picto-llava --method= --port 8000", "--method is empty: name a method, or leave it out"),
        ("frobnicate", "there is no command 'frobnicate'; choose from describe, "),
        ("eval poep", "there is no 'poep'; did you mean 'pope'?"),
        ("eval pope --metod pai", "there is no option --metod; did you mean --method?"),
        ("compare a b --bencmark pope", "there is no option --bencmark; did you mean --benchmark?"),
        ("methods --jsn", "there is no option --jsn; did you mean --json?"),
        ("--bogus", "there is no option --bogus"),
        ("picto rendr x", "there is no 'rendr'; did you mean 'render'?"),
        ("eval pope extra", "vlm-fix eval takes no further argument, so extra has no meaning"),
        ("score", "the following arguments are required: BENCHMARK"),
    ],
)
def test_what_is_mistyped_is_named(typed, says, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(typed.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and says in line


def test_serving_tells_of_a_template_that_does_not_begin_a_prompt(tmp_path):
    """vLLM adds no first token to a chat; generate's processor does, unless the template writes it."""
    from vlm_fix.cli.serve import _unbegun
    from vlm_fix.eval import picto

    folder = picto.model_path("picto-llava")
    assert "add_special_tokens" in _unbegun(str(folder), None, False)
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    assert _unbegun(str(tmp_path), None, False) == ""
    (tmp_path / "chat_template.jinja").write_text("<s>" + template)
    assert _unbegun(str(tmp_path), None, False) == "" == _unbegun(str(tmp_path / "none"), None, False)


def test_vlm_fix_alone_prints_its_help(capsys):
    assert cli.main([]) == 0
    told = capsys.readouterr()
    assert "COMMAND" in told.out and "vlm-fix describe" in told.out and not told.err


def test_describe_marks_what_is_not_there(capsys, tmp_path):
    command = ["describe", "scene:0", "--model", MODEL, "--method", "pai:alpha=2", "--max-new-tokens", "40"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plain, edited = found["answers"]
    assert (plain["method"], edited["method"]) == ("baseline", "pai:alpha=2.0") and plain["text"] != edited["text"]
    assert "dog" in found["truth"] and all(
        right == (name in found["truth"]) for name, right in plain["objects"].items()
    )
    assert cli.main([*command, "--objects", "kite"]) == 0
    told = capsys.readouterr().out
    assert "not in the image: " in told and "dog" in told.partition("not in the image: ")[2] and "Green is in" in told
    from vlm_fix.eval.picto import scene

    scene("test", 0, 0).image.save(tmp_path / "mine.png")
    assert cli.main(["describe", str(tmp_path / "mine.png"), *command[2:]]) == 0
    assert "--objects says it" in capsys.readouterr().out
    scene("test", 0, 0).image.save(tmp_path / "COCO_val2014_000000000042.png")
    assert cli.main(["describe", str(tmp_path / "COCO_val2014_000000000042.png"), "--model", MODEL]) == 0
    assert "not in the image: " in capsys.readouterr().out


def test_all_scorers_are_offered():
    assert set(SCORERS) == set(yesno.Scorer.__args__)


def test_places_that_nobody_named_are_checked_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    (tmp_path / "iri.json").mkdir()
    (tmp_path / "report.html").mkdir()
    for command in ("eval pope --limit 2", "calibrate iri:noise=2 --limit 2", "report none"):
        assert cli.main(command.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and ("cannot be written" in line or "is a folder" in line)


def test_the_command_line_starts_without_heavy_imports():
    heavy = ("torch", "transformers", "numpy", "nltk", "PIL")
    code = "import sys; from vlm_fix.cli import main; main(['--help'] if len(sys.argv) < 2 else sys.argv[1:])"
    loaded = f"import sys, atexit; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules])); {code}"
    for command in ([], ["score", "--help"], ["eval", "--help"], ["score", "mme", "nowhere"], ["methods"]):
        out = subprocess.run([sys.executable, "-c", loaded, *command], capture_output=True, text=True).stdout
        assert out.rstrip().endswith("[]"), (command, out[-200:])
