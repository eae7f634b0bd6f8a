"""`vlm-fix serve`: the OpenAI server in processes of its own, with clients that stream, ask for other strengths, or die."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.serving.support import CAPTION, PATH, Case, HuggingFace
from tests.serving.wrong import SAID, WRONG
from tests.support.pictures import png_header
from vlm_fix.eval.run.runner import evaluate
from vlm_fix.eval.settings import Settings

SERVE = [sys.executable, "-m", "vlm_fix.cli", "serve", "picto-llava"]
SMALL = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=384",
    "--max-num-seqs=8",
    "--block-size=32",
    "--host=127.0.0.1",
]
ENVIRONMENT = {
    **os.environ,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "PYTHONUNBUFFERED": "1",
}
CLIENT = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.stdin.buffer.read(), {"Content-Type": "application/json"})
for line in urllib.request.urlopen(request):
    print(line.decode().strip(), flush=True)
"""


class Server:
    """A server on a port of its own; what it says goes to a file."""

    def __init__(self, log, *options: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.file = open(log, "w+")  # noqa: SIM115 (it is open as long as the server runs)
        command = [*SERVE, *options, *SMALL, "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=self.file, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
        )

    def log(self) -> str:
        self.file.seek(0)
        return self.file.read()

    def wait(self, seconds: int = 900) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()[-3000:]
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).status == 200:
                    return
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log()[-3000:])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def ask(self, body: dict) -> dict:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=300))

    def stream(self, body: dict) -> str:
        data = json.dumps({**body, "stream": True}).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        words = []
        for line in urllib.request.urlopen(request, timeout=300):
            text = line.decode().strip().removeprefix("data: ")
            if text.startswith("{"):
                words.append(json.loads(text)["choices"][0]["delta"].get("content") or "")
        return "".join(words)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("serve") / "log", "--method", "pai:alpha=1")
    try:
        made.wait()
        yield made
    finally:
        made.close()


def body(case: Case, **more) -> dict:
    """A chat request; the start token of text prompts is asked for, which chats leave out."""
    content: list[dict] = [{"type": "text", "text": case.question}]
    for image in case.images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": data}})
    words = {"max_tokens": 24, "temperature": 0, "add_special_tokens": True}
    return {"model": "picto-llava", "messages": [{"role": "user", "content": content}], **words, **more}


def test_two_clients_stream_at_once(server, hf: HuggingFace):
    asked = [Case((0,), CAPTION), Case((1,), CAPTION)]
    theirs = hf.answers(["pai:alpha=1"], asked)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(server.stream, map(body, asked)))
    for text, answer in zip(texts, theirs, strict=True):
        assert text.strip() == hf.processor.decode(answer.tokens, skip_special_tokens=True).strip()


def test_a_request_switches_the_method_off_or_changes_it(server, hf: HuggingFace):
    case = Case((2,), CAPTION)
    for more, spec in (
        ({"vlm_fix": "off"}, []),
        ({"vlm_fix": {"alpha": 0.3}}, ["pai:alpha=0.3"]),
        ({"vllm_xargs": {"vlm_fix": "alpha=0.3"}}, ["pai:alpha=0.3"]),
        ({}, ["pai:alpha=1"]),
    ):
        text = server.ask(body(case, **more))["choices"][0]["message"]["content"]
        want = hf.processor.decode(hf.answers(spec, [case])[0].tokens, skip_special_tokens=True)
        assert text.strip() == want.strip()


def test_an_evaluation_through_the_server_has_the_answers_of_generate(server, tmp_path):
    """The same tasks and batches; the baseline and another strength are asked for request by request."""
    asked = dict(benchmark="all", limit=2, splits=("random",), max_new_tokens=24, batch_size=4)
    asked["methods"] = (("pai:alpha=1",), ("pai:alpha=0.3",))
    url = server.url.removesuffix("/chat/completions")
    found = {}
    for name, more in (("server", {"server": url}), ("hf", {})):
        results = evaluate(Settings(**asked, **more), tmp_path / name)
        lines = map(json.loads, (tmp_path / name / "samples.jsonl").read_text().splitlines())
        found[name] = {(r["run"], r["id"]): (r["answer"], r["tokens"], r["finished"], r["error"]) for r in lines}
    assert found["server"] == found["hf"] and len(found["hf"]) > 30
    assert results["runs"] == json.loads((tmp_path / "server" / "results.json").read_text())["runs"]


@pytest.mark.parametrize("what", WRONG)
def test_anything_else_is_a_400_with_a_sentence(server, what):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.ask(body(Case((), CAPTION), vlm_fix=WRONG[what]))
    said = json.load(caught.value)["error"]["message"]
    assert caught.value.code == 400 and "\n" not in said
    assert said.startswith(("vlm_fix", "pai: ")) and SAID.get(what, "") in said


@pytest.mark.parametrize(
    "url", [f"file://{__file__}", "data:image/png;base64," + base64.b64encode(png_header(60000, 60000)).decode()]
)
def test_files_of_the_machine_and_bombs_are_refused(server, hf: HuggingFace, url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": CAPTION}]
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.ask({"model": "picto-llava", "messages": [{"role": "user", "content": content}], "max_tokens": 4})
    assert caught.value.code in (400, 500)  # vLLM's own refusal: 500 in 0.32
    case = Case((0,), CAPTION)
    want = hf.processor.decode(hf.answers(["pai:alpha=1"], [case])[0].tokens, skip_special_tokens=True)
    assert server.ask(body(case))["choices"][0]["message"]["content"].strip() == want.strip(), "it serves on"


def test_a_client_that_is_killed_takes_nothing_with_it(server, hf: HuggingFace):
    """Its request ends, and others get what they would have got."""
    long = json.dumps(body(Case((3,), CAPTION), stream=True, max_tokens=250, ignore_eos=True)).encode()
    client = subprocess.Popen([sys.executable, "-c", CLIENT, server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin and client.stdout
    client.stdin.write(long)
    client.stdin.close()
    for _ in range(10):
        client.stdout.readline()
    client.send_signal(signal.SIGKILL)
    client.wait()
    case = Case((0,), CAPTION)
    text = server.ask(body(case))["choices"][0]["message"]["content"]
    want = hf.processor.decode(hf.answers(["pai:alpha=1"], [case])[0].tokens, skip_special_tokens=True)
    assert text.strip() == want.strip()
    for _ in range(60):
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read().decode()
        running = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.M)
        assert running
        if float(running[1]) == 0:
            return
        time.sleep(1)
    raise AssertionError("the request of the killed client still runs")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--method", "pia"], "did you mean 'pai'"),
        (["--method", "pai:alhpa=1"], "did you mean 'alpha'"),
        (["--method", "fastv"], "fastv cannot be served by vLLM"),
        (["--method", "pai,vcd"], "write 'pai+vcd'"),
        (["--additional-config", '{"vlm-fix": "pai"}'], "nobody reads"),
        (["--calibration", "x.json"], "give --method"),
    ],
)
def test_a_wrong_spec_ends_the_start_in_one_sentence(options, words):
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert words in done.stderr


def test_plain_vllm_serve_refuses_a_wrong_spec_too():
    """Without `vlm-fix serve` in front, from the plugin alone."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", PATH, *SMALL]
    done = subprocess.run(
        [*command, "--additional-config", '{"vlm_fix": "opera"}'],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=900,
    )
    assert done.returncode != 0
    assert "opera cannot be served by vLLM: it runs generate in a loop of its own" in done.stderr + done.stdout
