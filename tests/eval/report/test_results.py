"""results/: every file is what its command in reproduce.sh makes, and README and docs show these files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vlm_fix import cli
from vlm_fix.cli import effect
from vlm_fix.cli.bench import OPTIONS
from vlm_fix.cli.eval import _settings
from vlm_fix.eval.report import page, tables
from vlm_fix.registry import parse, split_methods

FOLDERS = sorted(path.parent.name for path in ROOT.glob("results/*/results.json"))


def arguments(folder, tmp_path):
    """What reproduce.sh gives to vlm-fix, one list per call."""
    seen = tmp_path / "seen"
    stub = tmp_path / "vlm-fix"
    stub.write_text(f'#!/usr/bin/env bash\nprintf "%s\\x1f" "$@" >> {seen}; echo >> {seen}\n')
    stub.chmod(0o755)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    work = tmp_path / "clone" / "results"
    work.mkdir(parents=True)
    (work / "search").symlink_to(ROOT / "results" / "search")
    script = (ROOT / "results" / "reproduce.sh").read_text()
    (work / "reproduce.sh").write_text(script.replace("\n  cp ", "\n  : "))
    subprocess.run(
        ["bash", work / "reproduce.sh", folder],
        check=True,
        env={"VLM_FIX": str(stub), "PATH": "/usr/bin:/bin", "LIMIT": os.environ.get("LIMIT", "")},
    )
    return [line.split("\x1f")[:-1] for line in seen.read_text().splitlines()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_results_are_of_the_command_that_is_given(folder, tmp_path):
    [command] = arguments(folder, tmp_path)
    given = cli._parser().parse_args(command)
    effect.check(given)
    asked = _settings(given)
    made = json.loads((ROOT / "results" / folder / "results.json").read_text())["settings"]
    for name in ("benchmark", "limit", "batch_size", "seed", "variant", "sample", "scorer", "num_beams"):
        assert made[name] == getattr(asked, name), name
    assert made.get("controls", False) == asked.controls
    assert made["methods"] == split_methods(given.method)
    assert made.get("seeds", []) == [*asked.seeds]


@pytest.mark.parametrize("model", ["picto-llava", "picto-smol"])
def test_every_table_of_both_models_can_be_asked_for(model, tmp_path):
    for table in ("shift", "attention", "heads", "hidden", "decoding", "contrast", "sampling", "pruning"):
        here = tmp_path / table
        here.mkdir()
        [command] = arguments(f"{model}-{table}", here)
        asked = vars(cli._parser().parse_args(command))
        assert asked["model"] == model and asked["output"] == f"runs/{model}-{table}" and asked["resume"]
        stacks = split_methods(asked["method"])
        assert stacks and all(parse(list(stack)) for stack in stacks)
        assert asked["controls"] or table in ("shift", "pruning"), "the controls of pruning are methods of its list"


def test_a_trial_leaves_results_alone_and_a_wrong_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMIT", "4")
    [command] = arguments("picto-llava-heads", tmp_path)
    asked = vars(cli._parser().parse_args(command))
    assert asked["limit"] == 4 and asked["output"] == "runs/picto-llava-heads-4"
    assert not (tmp_path / "clone" / "results" / "picto-llava-heads").exists()
    told = subprocess.run(["bash", ROOT / "results" / "reproduce.sh", "hedas"], capture_output=True, text=True)
    assert told.returncode == 2 and "no folder is called hedas" in told.stderr


def test_bench_files_are_of_the_commands_that_are_given(tmp_path):
    commands = arguments("bench", tmp_path)
    files = {path.name for path in (ROOT / "results" / "bench").glob("*.json")}
    assert {Path(command[-1]).name for command in commands} == files
    for command in commands:
        asked = vars(cli._parser().parse_args(command))
        made = json.loads((ROOT / asked["output"]).read_text())
        for name in {"bench", "shape", "new_tokens", "rounds", "seed"} & (made.keys() | {"bench", "rounds"}):
            wanted = asked["kind" if name == "bench" else name]
            assert made[name] == (OPTIONS[name][1] if wanted is None else wanted), name


def test_pages_show_the_results():
    folders = [ROOT / "results" / folder for folder in FOLDERS]
    assert (ROOT / "docs" / "leaderboard.md").read_text() == page.leaderboard(folders), "run `make leaderboard`"
    readme = (ROOT / "README.md").read_text()
    assert page.leaderboard([ROOT / "results" / "picto-smol-shift"]) in readme, "run `make leaderboard`"


@pytest.mark.parametrize("folder", FOLDERS)
def test_tables_are_of_their_results_and_say_what_the_verdict_goes_by(folder):
    results = json.loads((ROOT / "results" / folder / "results.json").read_text())
    table = (ROOT / "results" / folder / "table.md").read_text()
    assert "The verdict goes by the intervals, uncorrected." in table.splitlines()[-1]
    assert table == tables.markdown(results)
