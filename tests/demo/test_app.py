"""The page and its server."""

import contextlib
import json
import socket
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio", reason="the demo needs gradio")

from vlm_fix import cli  # noqa: E402
from vlm_fix.demo import app, compare  # noqa: E402
from vlm_fix.demo.page import stop_with  # noqa: E402


def test_the_page_is_built(catalogue):
    page = app.build(catalogue)
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Image", "Prompt", "Preset", "Panes", "Methods 1", "Methods 3", "As Python", "Number of scenes"} <= labels
    folders = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == "folder"]
    assert [block.visible for block in folders] == [False]  # others may reach this page


def test_each_visitor_stops_their_own_run():
    stops = {"me": compare.Stop(), "you": compare.Stop()}
    mine, yours = stops.values()
    with gr.Blocks() as page:
        stop_with(page, gr.Button(), stops)
    press, leave = (event.fn for event in page.fns.values())
    press(types.SimpleNamespace(session_hash="nobody"))
    press(types.SimpleNamespace(session_hash="me"))
    assert mine.is_set() and not yours.is_set() and len(stops) == 2
    leave(types.SimpleNamespace(session_hash="you"))
    assert yours.is_set() and list(stops) == ["me"]


def test_without_gradio_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vlm_fix.demo.app")
    assert cli.main(["demo"]) == 2
    assert "pip install 'vlm-fix[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("where", [["--port", "99999"], ["--host", "203.0.113.9"]])
def test_an_address_that_cannot_be_served(where, capsys):
    assert cli.main(["demo", *where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The page cannot be served on") and error.count("\n") == 1


@pytest.mark.slow
def test_files_stay_where_they_are(site):
    """Nothing outside of the page's own folder can be read, and an upload's name leads nowhere."""
    secret = Path(__file__).resolve()
    for place in (
        f"gradio_api/file={secret}",
        f"gradio_api/file=../../../../..{secret}",
        f"static/../../../..{secret}",
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{site}/{place}")
        assert error.value.code in (403, 404)
    name = "../../../../../../../../tmp/vlm-fix-left.png"
    body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nhere\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{site}/gradio_api/upload", body.encode(), kind)
    (stored,) = json.load(urllib.request.urlopen(request))
    assert "/vlm-fix-demo-" in stored and ".." not in stored and Path(stored).read_text() == "here"
    assert not Path("/tmp/vlm-fix-left.png").exists()


@pytest.mark.slow
def test_a_name_that_leads_here_is_no_way_in(site):
    """As a hostile web page has it, whose name was made to mean 127.0.0.1 after it was loaded."""
    port = site.rsplit(":", 1)[1]
    for host, code in (
        (f"evil.example:{port}", 403),
        (f"localhost:{port}", 200),
        ("[::1]:1", 200),
        ("[", 403),
        ("", 403),
    ):
        for place in ("/", "/config", "/gradio_api/info"):
            try:
                got = urllib.request.urlopen(urllib.request.Request(site + place, headers={"Host": host})).status
            except urllib.error.HTTPError as error:
                got = error.code
                assert b"localhost alone" in error.read()
            assert got == code, (host, place)


@pytest.mark.slow
def test_only_this_machine_and_small_files(site):
    port = int(site.rsplit(":", 1)[1])
    with socket.socket() as other, contextlib.suppress(OSError):
        other.connect((socket.gethostbyname(socket.gethostname()), port))
        assert other.getpeername()[0].startswith("127.")
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(21 << 20)
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{site}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 413
