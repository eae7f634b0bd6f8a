"""The command line: every user error is one sentence on stderr, --json is JSON and nothing else, tables fit."""

import json
import os
import subprocess
import sys

import pytest

from vlm_fix import cli, list_methods
from vlm_fix.eval import yesno

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
    return {
        "dir": str(tmp_path),
        "questions": write(tmp_path / "q.jsonl", asked),
        "answers": write(tmp_path / "a.jsonl", [{"question_id": i, "text": "Yes" if i else "No"} for i in range(4)]),
        "short": write(tmp_path / "s.jsonl", [{"question_id": i, "text": "Yes"} for i in range(3)]),
        "captions": write(tmp_path / "c.jsonl", [{"image_id": 9, "caption": "A bowl of broccoli and a zebra."}]),
        "strange": write(
            tmp_path / "x.jsonl", [{"image_id": -9, "caption": "A dog."}, {"image_id": 1, "caption": "A"}]
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
    "not lined up": ("score pope {questions} {short}", "do not line up: 4 questions, 3 answers"),
    "empty answers": ("score pope {questions} {dir}/empty", "is empty"),
    "empty captions": ("score chair {dir}/empty --variant pattern", "is empty"),
    "image without ground truth": ("score chair {strange} --variant pattern", "ground truth"),
    "no ground truth file": ("score chair {captions} --variant pattern --ground-truth {dir}/none", "none"),
    "scenes": ("picto render {dir}/out --scenes 0", "--scenes is 0"),
    "render split": ("picto render {dir}/out --split dev", "dev"),
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
    for command in ("methods", "models"):
        assert cli.main([command]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert cli.main(["methods", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(listed) == {method.name for method in list_methods()} >= {"var", "vhr", "pai", "vcd", "hiprune"}
    assert {p["name"] for p in listed["vcd"]["parameters"]} >= {"alpha", "beta", "noise_step"}
    assert all(row["about"] and row["kind"] for row in listed.values())
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


def test_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from vlm_fix.eval import runner

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


def test_all_scorers_are_offered():
    assert set(cli.SCORERS) == set(yesno.Scorer.__args__)
