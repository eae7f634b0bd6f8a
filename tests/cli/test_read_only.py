"""Folders that may not be written to: every command that writes says so before it loads a model, and touches nothing."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from tests.support.paths import RESULTS
from vlm_fix import cli
from vlm_fix.eval.run import loading

COMMANDS = [
    "eval pope --limit 1 --output {place}",
    "calibrate iri --limit 1 --out {place}/iri.json",
    "recommend --budget 1m --out {place}/vlm-fix.yaml",
    "inspect {image} what --out {place}/page.html",
    "bench attention --output {place}/bench.json",
    "export nullu {place}",
    "picto render {place} --scenes 1",
    "lmms-tasks --limit 1 --out {place}",
    "report {results} --out {place}/page.html",
    "report {results} --board {place}/board.html",
    "report {results} --markdown {place}/page.md",
    "report {results} --csv {place}/all.csv",
    "report {results} --latex {place}/all.tex",
    "bench scaling --figure {place}/cost.svg",
]


class TooFar(BaseException):
    pass


def unprivileged(work) -> int:
    """The status of a process that does `work` as a user whom a folder's mode binds; root's it does not."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def place():
    """A folder that may be read but not written to, whoever asks; pytest's own may be entered by nobody else."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    (top / "results").mkdir()
    (top / "locked").mkdir()
    (top / "locked").chmod(0o555)
    yield top / "locked"
    (top / "locked").chmod(0o755)
    shutil.rmtree(top)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("inside", ["", "/new/folder"])
def test_a_place_that_cannot_be_written(command, inside, place, monkeypatch):
    def too_far(*args, **kwargs):
        raise TooFar("a model is loaded before the mistake is told")

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", too_far)
    said = place.parent / "said"
    said.touch()
    said.chmod(0o666)
    image = next(iter((RESULTS.parent / "demo" / "photographs").glob("*.jpg")))
    results = next(iter(sorted(RESULTS.glob("*/results.json")))).parent
    words = command.format(place=f"{place}{inside}", image=image, results=results).split()

    def work():
        sys.stderr = sys.stdout = said.open("w")
        return cli.main(words)

    code = unprivileged(work)
    lines = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, (code, said.read_text()[-2000:])
    assert "written" in lines[0], lines
    assert not list(place.iterdir())
