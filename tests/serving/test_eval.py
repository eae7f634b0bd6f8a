"""`vlm-fix eval --engine vllm` gives the answers of `generate`, through the same tasks, store and scorers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def rows(folder, *options: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "vlm_fix.cli",
        "eval",
        "pope",
        "--limit",
        "4",
        "--split",
        "random",
        "--method",
        "pai:alpha=1",
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [*command, "--output", str(folder), *options], capture_output=True, text=True, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return {(row["run"], row["id"]): (row["answer"], row["tokens"], row["finished"], row["error"]) for row in lines}


def test_answers_are_those_of_generate(tmp_path):
    assert rows(tmp_path / "vllm", "--engine", "vllm") == rows(tmp_path / "hf")
    results = json.loads((tmp_path / "vllm" / "results.json").read_text())
    assert results["settings"]["model"]["engine"] == "vllm"
    assert all(run["pope"]["tokens_per_second"] > 0 for run in results["speed"].values())


@pytest.mark.parametrize(
    "options, words",
    [(["--method", "opera"], "opera cannot be served"), (["--num-beams", "2"], "--num-beams needs beam search")],
)
def test_what_vllm_cannot_do_is_said_in_a_sentence(tmp_path, options, words):
    command = [
        sys.executable,
        "-m",
        "vlm_fix.cli",
        "eval",
        "pope",
        "--limit",
        "2",
        "--split",
        "random",
        "--engine",
        "vllm",
    ]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), *options], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 2 and words in done.stderr
