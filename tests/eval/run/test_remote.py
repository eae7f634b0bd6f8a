"""`--server`: what a client makes of servers that answer, refuse, break off or are not there."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.run import loading, remote
from vlm_fix.eval.run.runner import evaluate
from vlm_fix.eval.settings import Settings
from vlm_fix.families import arch_of
from vlm_fix.registry import parse
from vlm_fix.serving import options
from vlm_fix.serving.settings import skeleton

USAGE = {"usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}, "choices": []}


def said(*words, end="stop"):
    """The parts of a streamed answer."""
    parts = [{"choices": [{"delta": {"content": word}}]} for word in words]
    return [*parts, {"choices": [{"delta": {}, "finish_reason": end}]}]


class Fake:
    """A server whose answers are `reply(body)`: parts of a stream, or (status, message)."""

    def __init__(self, methods=None, reply=lambda body: [*said(" yes", "."), USAGE]):
        self.asked, self.reply, fake = [], reply, self
        self.card = {"id": "picto-llava", "owned_by": "vllm"} | ({"vlm_fix": methods} if methods is not None else {})

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, status, body):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def do_GET(self):
                self.answer(200, json.dumps({"data": [fake.card]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(body)
                made = fake.reply(body)
                if isinstance(made, tuple):
                    self.answer(made[0], json.dumps({"error": {"message": made[1], "code": made[0]}}))
                else:
                    self.answer(200, "".join(f"data: {json.dumps(part)}\n\n" for part in made) + "data: [DONE]\n\n")

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))
    made = []

    def start(*args, **kwargs):
        made.append(Fake(*args, **kwargs))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def model():
    from vlm_fix.eval.picto import model_path

    return skeleton(str(model_path()), None, False)


def served(model, *specs):
    return json.loads(json.dumps(options.described(parse(list(specs)), arch_of(model))))


def settings(url, **more):
    return Settings("pope", limit=1, splits=("random",), server=url, **more)


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_answers_are_kept_and_methods_asked_for_by_request(fake, model, tmp_path):
    one = fake(served(model, "pai:alpha=1", "vcd"))
    results = evaluate(settings(one.url, methods=(("pai:alpha=1", "vcd"), ("pai:alpha=0.2",))), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert {(r["answer"], r["tokens"], r["finished"], r["error"]) for r in found} == {("yes.", 3, True, None)}
    count = len(found) // 3
    asked = [body.get("vlm_fix") for body in one.asked if body["max_tokens"] > 2]  # without the warm-up
    off = [{"pai": {"alpha": 0.2}, "vcd": "off"}]
    assert asked == ["off"] * count + [None] * count + off * count
    assert one.asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert one.asked[0]["temperature"] == 0 and one.asked[0]["add_special_tokens"] is True
    assert results["settings"]["model"]["engine"] == "server" and "1 server" in results["hardware"]
    assert results["speed"]["baseline"]["pope"]["peak_mb"] is None


@pytest.mark.parametrize(
    "reply, words",
    [
        ((400, "the image is too large"), "answers 400: the image is too large"),
        ((503, "loading"), None),
        ([*said(" yes", end="abort"), USAGE], "for the reason 'abort'"),
        (said(" yes"), "does not say how many tokens"),
        ([{"choices": [{"delta": {"content": "y"}}]}], "broke an answer off"),
        ([{"error": {"message": "out of memory"}}], "broke an answer off: out of memory"),
    ],
)
def test_one_request_that_fails_is_a_failed_sample_and_no_empty_answer(fake, tmp_path, reply, words):
    """503 passes when it is asked again."""
    seen = []

    def answers(body):
        seen.append(body)
        return reply if len(seen) == 8 else [*said(" no"), USAGE]

    evaluate(settings(fake(reply=answers).url, batch_size=3), tmp_path / "out")
    errors = [r for r in rows(tmp_path / "out") if r["error"] is not None]
    if words is None or ("off" in words and "memory" not in words):  # what passes is asked again
        assert not errors and len(seen) == 3 + len(rows(tmp_path / "out")) + 1
        return
    assert len(errors) == 1 and words in errors[0]["error"] and errors[0]["answer"] is None


def test_a_run_goes_on_where_the_server_went_away(fake, tmp_path):
    one = fake()
    count = len(one.asked)

    def answers(body):
        nonlocal count
        count += 1
        return (503, "going down") if count > 7 else [*said(" no"), USAGE]

    one.reply = answers
    with pytest.raises(VlmFixError, match="503: going down"):
        evaluate(settings(one.url, batch_size=2), tmp_path / "out")
    kept = rows(tmp_path / "out")
    assert kept and all(r["error"] is None for r in kept)
    other = fake()  # on another port
    evaluate(settings(other.url, batch_size=2), tmp_path / "out", resume=True)
    assert len(rows(tmp_path / "out")) == len(kept) + len([b for b in other.asked if b["max_tokens"] > 2])


def test_each_run_goes_to_the_first_server_that_can_answer_it(fake, model, tmp_path):
    plain, pruned = fake(), fake(served(model, "hiprune:keep=16"))
    both = f"{plain.url},{pruned.url}"
    evaluate(settings(both, methods=(("hiprune:keep=16",),)), tmp_path / "out")
    assert len(plain.asked) == len(pruned.asked) > 0


@pytest.mark.parametrize(
    "methods, specs, words",
    [
        (None, "pai", "serves no method, not pai"),
        (("vcd",), "pai", "serves vcd, not pai"),
        (("pai:layers=3-5",), "pai", "layers=.*which no request can change"),
        (("hiprune:keep=16",), "hiprune:keep=32", "hiprune as it is on every image"),
        (("hiprune:keep=16",), "pai", "as the baseline: .*on every image"),
        (("pai", "vaf"), "vaf+pai", "in this order"),
    ],
)
def test_what_no_server_can_answer_is_said_before_anything_is_asked(fake, model, tmp_path, methods, specs, words):
    one = fake(None if methods is None else served(model, *methods))
    with pytest.raises(VlmFixError, match=words):
        evaluate(settings(one.url, methods=(tuple(specs.split("+")),)), tmp_path / "out")
    assert not one.asked and not (tmp_path / "out").exists()


def test_servers_that_cannot_be_used(fake, tmp_path):
    gone = fake()
    gone.close()
    other = fake()
    other.card = {"id": "a"}
    for i, (url, words) in enumerate(
        (
            ("localhost:8000", "give http://"),
            (gone.url, "does not answer"),
            (fake(reply=lambda body: (404, "no such route")).url, "404: no such route"),
            (fake(reply=lambda body: (400, "no images here")).url, "no request is answered: .*no images here"),
        )
    ):
        with pytest.raises(VlmFixError, match=words):
            evaluate(settings(url), tmp_path / str(i))
    with pytest.raises(VlmFixError, match="serves a, not picto-llava"):
        remote.Server(other.url, "picto-llava")
    other.card = {"id": "a", "root": "/models/picto-llava/"}
    assert remote.Server(other.url, "./picto-llava").model == "a"


def test_options_that_a_server_leaves_without_effect(tmp_path):
    for more in ({"gen_kwargs": {"top_k": 3}}, {"batch_size": "auto"}, {"engine": "vllm"}):
        with pytest.raises(VlmFixError, match="--server"):
            settings("http://localhost:1", **more)


def test_beams_are_refused(fake, tmp_path):
    with pytest.raises(VlmFixError, match="drop --num-beams"):  # of a model that was loaded elsewhere
        loaded = loading.load_remote("picto-llava", fake().url)
        evaluate(Settings("pope", num_beams=2, limit=2), tmp_path / "out", loaded=loaded)
    for how in ({"num_beams": 2}, {"equal_compute": True, "methods": (("vcd",),)}):
        with pytest.raises(VlmFixError, match="needs beam search, and --server answers greedily or by sampling"):
            settings(fake().url, **how)


def test_tensors_are_compared_by_what_they_hold():
    import torch

    from vlm_fix.tensors import Tensors

    a, b = Tensors({"x": torch.ones(2)}), Tensors({"x": torch.zeros(2)})
    assert options._json(a) == options._json(Tensors({"x": torch.ones(2)})) != options._json(b)
