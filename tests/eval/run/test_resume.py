"""Kills at any moment and several processes: the answers and scores are those of one run that was left alone."""

import json
import os
import random
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run.runner import Settings
from vlm_fix.eval.run.store import Store, Team

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")
SETTINGS = {
    "model": MODEL,
    "methods": [["vcd"]],
    "controls": True,
    "limit": 2,
    "batch_size": 3,
    "max_new_tokens": 12,
    "variant": "pattern",
    "sample": True,
    "seeds": [0, 1],
    "splits": ["random"],
}
TIMED = ("batch_seconds", "batch_first_token", "peak_mb")

# Runs the evaluation once, in forks of one warm process that are killed after the given seconds, then to the end.
KILLED = """
import json, os, pathlib, signal, sys, time
import torch
torch.set_num_threads(1)
from rich.console import Console
from vlm_fix.eval.report import tables
from vlm_fix.eval.run.runner import Settings, evaluate
settings, output, waits = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
settings = Settings(**{k: tuple(map(tuple, v)) if k == "methods" else tuple(v) if isinstance(v, list) else v
                       for k, v in settings.items()})
killed, ends = 0, []
for wait in [*waits, None]:
    child = os.fork()
    if child == 0:
        tables.write(evaluate(settings, output, resume=True, console=Console(quiet=True)), pathlib.Path(output))
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed += os.WIFSIGNALED(status)
    file = os.path.join(output, "samples.jsonl")
    ends.append(os.path.getsize(file) if os.path.exists(file) else 0)
print(json.dumps({"killed": killed, "sizes": ends, "status": status}))
"""


def started(command: list[str], **env: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def killed(output: Path, waits: list[float]) -> dict:
    return json.loads(
        started([sys.executable, "-c", KILLED, json.dumps(SETTINGS), str(output), json.dumps(waits)]).stdout
    )


def content(folder: Path) -> tuple[dict, list[dict]]:
    """results.json without what a clock or a memory meter said, and the answers likewise, both in the file's order."""
    results = json.loads((folder / "results.json").read_text())
    assert not list(folder.glob("samples.*.jsonl")) and not list(folder.glob("*.part"))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return (
        {key: value for key, value in results.items() if key not in ("date", "speed", "processes")},
        [{key: value for key, value in row.items() if key not in TIMED} for row in rows],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert killed(folder, [])["killed"] == 0
    return folder


def test_ten_kills_at_random_moments_change_nothing(whole, tmp_path):
    rng = random.Random(0)
    told = killed(tmp_path / "out", [rng.uniform(0.05, 2.5) for _ in range(10)])
    assert told["killed"] >= 5 and told["status"] == 0  # later ones may come when all is done
    assert len(set(told["sizes"])) > 3  # it got on between the kills
    assert content(tmp_path / "out") == content(whole)
    for name in ("table.md", "figure.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_two_processes_equal_one(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [
        "--main_process_port",
        str(port),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    asked = shlex.split(
        "eval all --method vcd --controls --limit 2 --batch-size 3 --max-new-tokens 12 --sample --seeds 0,1"
        f" --variant pattern --split random --device cpu --json --model {MODEL}"
    )
    done = started([*launch, *command, "-m", "vlm_fix.cli", *asked, "--output", str(tmp_path / "out")])
    results, rows = content(tmp_path / "out")
    expected, single = content(whole)
    for each in (results, expected):  # --device cpu is asked for above
        each["settings"].pop("device"), each.pop("config_hash")
    assert rows == single and results == expected
    assert results["specs"]["gaussian_logits as vcd"].keys() == {"pope", "chair"}  # of the terms that both had measured
    printed = json.loads(done.stdout)  # by the first process alone
    assert printed["processes"] == 2 and printed["runs"] == expected["runs"]


def store_of(folder: Path, **env: int) -> Store:
    team = Team()
    team.wait = lambda: None  # type: ignore[method-assign]
    team.rank, team.size = env.get("rank", 0), env.get("size", 1)
    return Store(folder, {"seed": 0}, resume=True, team=team)


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json", "figure.png"])
def test_what_a_killed_run_had_begun_to_write_is_gone(tmp_path, name):
    store_of(tmp_path)
    code = "import os, sys; from vlm_fix.whole import whole_file\nwith whole_file(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False).returncode == -9
    kept = tmp_path / "notes.part"  # not ours
    kept.touch()
    assert len(list(tmp_path.glob(f"{name}.*.part"))) == 1
    store_of(tmp_path)
    assert list(tmp_path.glob("*.part")) == [kept]


def test_files_of_several_processes_merge_once_and_in_order(tmp_path):
    def batch(i, n=2):
        return [
            {"run": "a", "seed": 0, "benchmark": "pope", "batch": i, "batch_size": 2, "answer": f"{i}{j}"}
            for j in range(n)
        ]

    first = store_of(tmp_path)
    for rank, numbers in ((0, (4, 0)), (1, (3, 1))):
        store = store_of(tmp_path, rank=rank, size=2) if rank else first
        for i in numbers:
            store.add(("a", 0, "pope", i), batch(i))
    copy = (tmp_path / "samples.1.jsonl").read_text()
    with (tmp_path / "samples.1.jsonl").open("a") as handle:  # half a batch, torn in its first line
        handle.write(json.dumps(batch(2, 1)[0]) + "\n" + json.dumps(batch(2)[1])[:30])
    order = [("a", 0, "pope", i) for i in range(5)]
    first.merge(order)
    assert [key[3] for key in first.rows] == [0, 1, 3, 4] and not (tmp_path / "samples.1.jsonl").exists()
    assert [row["answer"] for row in first.of("a", "pope")] == ["00", "01", "10", "11", "30", "31", "40", "41"]
    (tmp_path / "samples.1.jsonl").write_text(copy)  # killed after the merge, before the process's file went
    again = store_of(tmp_path)
    assert again.of("a", "pope") == first.of("a", "pope")
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 8


def test_a_launcher_and_a_device_map_exclude_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VlmFixError, match="--device-map spreads one model over all devices"):
        Settings(device_map="auto")
