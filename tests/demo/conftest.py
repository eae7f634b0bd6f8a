"""Fixtures of the demo's tests: a loaded model, a scene, the served page, a browser."""

import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def finished_runs():
    """Wait for the runs that a test started: in a thread, they change the warnings that later tests catch."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name.endswith(("(_answer)", "(work)")):
            thread.join(timeout=30)


@pytest.fixture(scope="package")
def loaded():
    from vlm_fix.demo import models

    return models.Loaded("picto-llava")


@pytest.fixture
def scene(tmp_path):
    """The first example scene as a file."""
    from vlm_fix.demo import examples

    examples.scenes()[0].image.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture(scope="package")
def views(loaded):
    """Baseline, pai, vcd and hiprune looked into, by name."""
    from tests.demo.shared import PROMPT, last
    from vlm_fix.demo import compare, examples, inside

    image = examples.scenes()[0].image
    stacks = [["pai:alpha=0.5"], ["vcd"], ["hiprune:keep=24"]]
    panes = last(compare.compare(loaded, image, PROMPT, stacks))
    return {pane.stack[0].partition(":")[0]: inside.look(loaded, image, PROMPT, pane) for pane in panes}


@pytest.fixture(scope="package")
def measured(loaded, tmp_path_factory):
    """A benchmark that was stopped after some batches and continued, with comparisons in between."""
    from tests.demo.shared import PROMPT, SMALL, last
    from vlm_fix.demo import benchmark, compare, examples

    folder, settings = tmp_path_factory.mktemp("bench") / "run", benchmark.settings_of(*SMALL)
    stop, seen, said = compare.Stop(), [], []
    for state in benchmark.run(loaded, settings, folder, stop):
        seen.append(state)
        if state.done and not said:
            said.append(last(compare.compare(loaded, examples.scenes()[0].image, PROMPT, [["vhr"]])))
            stop.set()
    assert seen[-1].results is None and 0 < seen[-1].done < seen[-1].total
    seen = list(benchmark.run(loaded, settings, folder, compare.Stop()))
    return settings, folder, seen, said[0]


@pytest.fixture(scope="package")
def catalogue(loaded):
    """A page's models, one of them loaded."""
    from vlm_fix.demo import models

    made = models.Models(["picto-llava"])
    made.loaded["picto-llava"] = loaded
    return made


@pytest.fixture(scope="package")
def site(tmp_path_factory):
    """The address of `vlm-fix demo`, run as a person would; at its end no image may be left."""
    folder = tmp_path_factory.mktemp("uploads")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = subprocess.Popen(
        [sys.executable, "-m", "vlm_fix.cli", "demo", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)},
    )
    try:
        assert any("Running on" in line for line in run.stdout), "the demo ended before it served a page"
        assert list(folder.glob("vlm-fix-demo-*/**/*.png")), "the examples are served from here"
        yield f"http://127.0.0.1:{port}"
    finally:
        run.terminate()
        run.wait(20)
    assert not list(folder.glob("vlm-fix-demo-*"))


@pytest.fixture(scope="package")
def artifacts():
    """Where pictures of the tabs are kept to be looked at."""
    folder = ROOT / "build/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="package")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("the browser test needs chromium")
    flags = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in flags.split()])
        yield started
        started.close()


@pytest.fixture
def page(browser, site):
    made = browser.new_page(viewport={"width": 390, "height": 844})
    outside = []
    made.on("request", lambda r: outside.append(r.url) if not r.url.startswith((site, "data:", "blob:")) else None)
    made.goto(site)
    made.set_default_timeout(120_000)
    made.wait_for_selector("#pane3 .card.done")
    yield made
    made.close()
    assert not outside, "the page asked another machine for something"
