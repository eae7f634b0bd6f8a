"""Two processes over gloo: DDP, FSDP2, tensor parallelism, and what `accelerate launch --cpu` starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest

from tests.support.paths import ROOT
from vlm_fix.eval.run.store import Team


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folder = str(tmp_path_factory.mktemp("tiny"))
    done = subprocess.run(
        [*command, "-m", "tests.deployment.processes", folder], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("how", ["data parallel", "fully sharded", "tensor parallel"])
def test_two_processes_say_what_one_says(outcome, how):
    assert not outcome[how], outcome[how]


def test_a_launcher_that_starts_one_process_is_named(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets an address for two, and starts one."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Team().size == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.warns(UserWarning, match="accelerate launch --cpu started one process, .* `torchrun"):
        assert Team().size == 1


def test_the_launcher_does_what_the_warning_is_for(tmp_path):
    """accelerate itself: if it starts two one day, the warning can go."""
    (tmp_path / "shown.py").write_text(
        "import os\nprint({n: os.environ.get(n) for n in ('WORLD_SIZE', 'MASTER_ADDR', 'ACCELERATE_USE_CPU')})\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
    done = subprocess.run(
        [*command, str(tmp_path / "shown.py")], capture_output=True, text=True, env=env, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines == ["{'WORLD_SIZE': None, 'MASTER_ADDR': '127.0.0.1', 'ACCELERATE_USE_CPU': 'True'}"]
