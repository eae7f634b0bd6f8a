"""Nothing is sent: with sockets closed the main jobs run, and a model that is not on the machine is one sentence."""

import os
import subprocess
import sys

import pytest

CLOSED = """
import socket, sys
def refuse(self, address, *args):
    sys.stderr.write(f"tried to reach {address}\\n")
    raise OSError(101, "Network is unreachable")
real = socket.getaddrinfo
socket.socket.connect = socket.socket.connect_ex = refuse
def lookup(host, *args, **kwargs):
    if host not in (None, "", "localhost", "127.0.0.1", "::1"):
        refuse(None, host)
    return real(host, *args, **kwargs)
socket.getaddrinfo = lookup
from vlm_fix.cli import main
sys.exit(main(sys.argv[1:]))
"""
JOBS = {
    "eval": "eval pope --model picto-llava --data picto:shift --limit 1 --method pai --output {}/run",
    "score": "score chair {}/captions.jsonl --ground-truth {}/truth.json --variant pattern",
    "methods": "methods pai",
    "doctor": "doctor --json",
}


def command(arguments, **environment):
    """What starts an own process, in which the hub is not declared offline."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))} | environment
    return {"args": [sys.executable, "-c", CLOSED, *arguments.split()], "env": env, "text": True}


def run(arguments, **environment):
    return subprocess.run(**command(arguments, **environment), capture_output=True, timeout=280)


@pytest.mark.parametrize("job", JOBS)
def test_the_main_jobs_need_no_network(job, tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"image_id": 1, "caption": "a dog on a bench"}\n')
    (tmp_path / "truth.json").write_text('{"1": ["dog"]}')
    done = run(JOBS[job].replace("{}", str(tmp_path)))
    assert done.returncode == 0 and "tried to reach" not in done.stderr, done.stderr


def test_a_model_of_the_hub_is_asked_for_only_where_that_is_not_forbidden(tmp_path):
    asked = f"eval pope --model nobody/no-such-model --data picto:shift --limit 1 --output {tmp_path}/run"
    with subprocess.Popen(**command(asked, HF_HOME=str(tmp_path)), stderr=subprocess.PIPE) as online:
        assert any("tried to reach" in line for line in online.stderr)
        online.kill()  # it would try again, file by file, for minutes
    offline = run(asked, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "tried to reach" not in offline.stderr
    assert len(offline.stderr.strip().splitlines()) <= 4 and "Traceback" not in offline.stderr
