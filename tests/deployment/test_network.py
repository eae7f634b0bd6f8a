"""Nothing is sent: with sockets closed the main jobs run, and a model that is not on the machine is one sentence."""

import os
import socket
import subprocess
import sys
import time
import types
import urllib.request

import pytest
import torch
import transformers

import vlm_fix
from vlm_fix import words
from vlm_fix.observation import answer

CLOSED = """
import socket, sys
HERE = (None, "", "localhost", "127.0.0.1", "::1")
def refuse(address):
    sys.stderr.write(f"tried to reach {address}\\n")
    raise OSError(101, "Network is unreachable")
def only_here(real):
    def connect(self, address):
        if not isinstance(address, tuple) or address[0] not in HERE:
            refuse(address)
        return real(self, address)
    return connect
socket.socket.connect = only_here(socket.socket.connect)
socket.socket.connect_ex = only_here(socket.socket.connect_ex)
real = socket.getaddrinfo
def lookup(host, *args, **kwargs):
    if host not in HERE:
        refuse(host)
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


def test_the_demo_serves_its_page_without_network(tmp_path):
    pytest.importorskip("gradio", reason="the demo needs gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as said, subprocess.Popen(**command(f"demo --port {port}"), stdout=said, stderr=said) as demo:
        try:
            page = _page(f"http://127.0.0.1:{port}/", demo)
        finally:
            demo.terminate()
    assert "vlm-fix" in page and "tried to reach" not in log.read_text(), log.read_text()


def _page(url, process, seconds=120):
    """The page as soon as it is served."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            time.sleep(0.5)
    return ""


def test_a_model_of_the_hub_is_asked_for_only_where_that_is_not_forbidden(tmp_path):
    asked = f"eval pope --model nobody/no-such-model --data picto:shift --limit 1 --output {tmp_path}/run"
    with subprocess.Popen(**command(asked, HF_HOME=str(tmp_path)), stderr=subprocess.PIPE) as online:
        assert any("tried to reach" in line for line in online.stderr)
        online.kill()  # it would try again, file by file, for minutes
    offline = run(asked, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "tried to reach" not in offline.stderr
    assert len(offline.stderr.strip().splitlines()) <= 4 and "Traceback" not in offline.stderr


def test_a_tokenizer_is_looked_for_on_the_machine_alone(monkeypatch):
    """In the middle of generate nothing is fetched."""
    asked = []

    def load(name, **options):
        asked.append(options)
        raise OSError

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    for find in (
        lambda: words.tokenizer_of("nobody/no-such-model"),
        lambda: answer.answer_of("a dog", torch.ones(1, 3), types.SimpleNamespace(name_or_path="nobody/x"), None, None),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match="tokenizer"):
            find()
    assert asked == [{"local_files_only": True}] * 2
