"""Two processes over gloo: DDP, FSDP2, tensor parallelism, and what `accelerate launch --cpu` starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings

import pytest

from tests.support.paths import ROOT
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run.store import Team
from vlm_fix.eval.settings import LAUNCHERS, Place, launched


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


def alone(patch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU", *(name for names in LAUNCHERS for name in names)):
        patch.delenv(name, raising=False)


def test_a_launcher_that_starts_one_process_is_named(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets an address for two, and starts one."""
    alone(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Team().size == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.warns(UserWarning, match="accelerate launch started one process, .* `torchrun"):
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


@pytest.mark.parametrize("names", LAUNCHERS, ids=lambda names: names[0])
def test_every_launcher_says_which_process_this_is(names, monkeypatch):
    alone(monkeypatch)
    assert launched() == Place(0, 1, 0)
    for name, value in zip(names, (3, 4, 1), strict=True):
        monkeypatch.setenv(name, str(value))
    assert launched() == Place(3, 4, 1)
    with pytest.raises(VlmFixError, match="4 processes were started without MASTER_ADDR, where they meet"):
        Team()


def test_processes_of_mpirun_share_the_work(monkeypatch, tmp_path):
    """The variables of Open MPI and those that `accelerate launch --mpirun_hostfile` adds; two real processes over gloo."""
    alone(monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "True",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                os.environ["OMPI_COMM_WORLD_RANK"] = str(rank)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    team = Team()
                (tmp_path / str(rank)).write_text(json.dumps([team.first, team.share(rank), team.gather(rank)]))
                status = 0
            finally:
                os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [
        [True, 0, [0, 1]],
        [False, 0, [0, 1]],
    ]


def test_a_configuration_file_for_several_processes_on_a_cpu_starts_one(tmp_path):
    """As `accelerate config` writes it; the variables are those that the warning is for."""
    (tmp_path / "shown.py").write_text(
        "import os\nprint([os.environ.get(n) for n in ('WORLD_SIZE', 'MASTER_ADDR', 'ACCELERATE_USE_CPU')])\n"
    )
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n"
        "use_cpu: true\nmixed_precision: 'no'\nmain_training_function: main\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml")]
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
    done = subprocess.run(
        [*command, str(tmp_path / "shown.py")], capture_output=True, text=True, env=env, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[None, '127.0.0.1', 'True']" in done.stdout
