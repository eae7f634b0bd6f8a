"""A run that is killed, or that finds the disk full, at each of its writes: nothing is lost, and nothing half-written is read."""

import errno
import functools
import io
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.run import runner
from vlm_fix.eval.run.store import Store, held, read_config
from vlm_fix.eval.settings import Settings

SETTINGS = Settings("pope", data="picto:shift", limit=1, splits=("random",), batch_size=2)
VOCABULARY = ["yes", "no"]
TASKS = tasks.build(SETTINGS)


class Tokenizer:
    convert_ids_to_tokens = staticmethod(lambda ids: [VOCABULARY[i] for i in ids])
    __len__ = staticmethod(lambda: len(VOCABULARY))


MODEL = SimpleNamespace(device=torch.device("cpu"), name_or_path="stub")
LOADED = (MODEL, SimpleNamespace(tokenizer=Tokenizer()), {"name": "stub", "dtype": "float32", "weights": "0"})


def said(model, processor, samples, seed, **how):
    """Answers without a model: what the runner keeps of a batch."""
    row = {"tokens": 2, "finished": True, "error": None, "p_yes": 0.75, "p_no": 0.25}
    batch = {"batch_seconds": 0.1, "batch_first_token": 0.05, "batch_warnings": [], "batch_term": None}
    return [{"answer": "yes" if len(s.prompt) % 2 else "Nein, caf\u00e9", **row, **batch} for s in samples]


def stubbed(patch: pytest.MonkeyPatch) -> None:
    """No model is run, and the data are made once."""
    patch.setattr(runner, "answer", said)
    patch.setattr(runner, "warm_up", lambda *args: None)
    patch.setattr(runner, "peak_mb", lambda device: 1.0)
    patch.setattr(runner, "build", lambda settings: TASKS)


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    stubbed(monkeypatch)


def evaluate(folder: Path, resume: bool = True) -> None:
    runner.evaluate(SETTINGS, folder, resume, Console(quiet=True), LOADED)


def kept(folder: Path) -> tuple:
    """What a run leaves but for the date."""
    results = json.loads((folder / "results.json").read_text())
    results.pop("date")
    return results, (folder / "samples.jsonl").read_text(), (folder / "config.json").read_text()


class Point(Exception):
    """The points at which a run changes its folder, one after the other; at the given one, `fault` happens."""

    def __init__(self, at: int, fault) -> None:
        self.at, self.fault, self.seen = at, fault, 0

    def reached(self, half=lambda: None) -> None:
        self.seen += 1
        if self.seen == self.at:
            half()
            self.fault()

    def put(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        opened = io.open

        def open_(file, mode="r", *args, **how):
            real = opened(file, mode, *args, **how)
            inside = isinstance(file, str | Path) and folder in Path(file).parents
            return Torn(real, self) if inside and not mode.startswith("r") else real

        patch.setattr(io, "open", open_)
        for name in ("replace", "unlink", "mkdir", "fsync"):
            patch.setattr(os, name, functools.partial(self._call, getattr(os, name)))

    def _call(self, function, *args, **how):
        self.reached()
        return function(*args, **how)


class Torn:
    """An open file of which the half of a text may be written when the fault happens."""

    def __init__(self, real, point: Point) -> None:
        self.real, self.point = real, point

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.real.close()

    def __getattr__(self, name):
        return getattr(self.real, name)

    def write(self, text: str) -> int:
        self.point.reached(lambda: (self.real.write(text[: len(text) // 2]), self.real.flush()))
        return self.real.write(text)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs, and at how many points it could have been."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stubbed(patch)
        count = Point(0, None)
        count.put(patch, folder)
        evaluate(folder, resume=False)
    return kept(folder), count.seen


def whole_files(folder: Path) -> None:
    """Files that are read as a whole are there as a whole, or not at all."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def test_killed_at_every_write_and_again(whole, tmp_path):
    expected, points = whole
    assert points > 15
    for at in range(1, points + 1):
        folder, deaths = tmp_path / str(at), 0
        for _ in range(1 + at % 2):  # the run, and every second time the one that continues it
            child = os.fork()
            if child == 0:
                with pytest.MonkeyPatch.context() as patch:
                    Point(at, lambda: os.kill(os.getpid(), signal.SIGKILL)).put(patch, folder)
                    evaluate(folder)
                os._exit(0)
            deaths += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            if folder.exists():
                whole_files(folder)
        assert deaths
        evaluate(folder)
        assert kept(folder) == expected, at


def test_a_full_disk_at_every_write(whole, tmp_path, monkeypatch):
    expected, points = whole
    for at in range(1, points + 1):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Point(at, full).put(patch, folder)
            try:
                evaluate(folder)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                pass  # syncing a folder, which some file systems cannot do
        if folder.exists():
            whole_files(folder)
            assert not list(folder.glob("*.part"))
        evaluate(folder)
        assert kept(folder) == expected, at


def test_a_full_disk_is_one_sentence_of_the_command(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    monkeypatch.setattr("vlm_fix.eval.run.runner.load_model", lambda *args: LOADED)
    monkeypatch.setattr("vlm_fix.eval.run.runner.outline", lambda *args: None)
    monkeypatch.setattr("vlm_fix.eval.run.runner.check_stacks", lambda *args: None)
    with monkeypatch.context() as patch:
        Point(9, full).put(patch, folder)
        command = f"eval pope --limit 1 --split random --batch-size 2 --output {folder}"
        assert cli.main(command.split()) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        told.startswith("error: ") and "No space left on device" in told and told.endswith("continued with --resume.")
    )


def test_two_runs_do_not_share_a_folder(whole, tmp_path):
    folder = tmp_path / "out"
    with held(folder), pytest.raises(VlmFixError, match="is in use by another run"):
        evaluate(folder)
    evaluate(folder)  # and it is free again
    assert kept(folder) == whole[0]
    answers = (folder / "samples.jsonl").read_text()
    with pytest.raises(VlmFixError, match="already holds a run"):  # one that began while this one loaded its model
        Store(folder, {"seed": 0}, resume=False)
    (folder / "config.json").unlink()
    for resume in (True, False):
        with pytest.raises(VlmFixError, match=r"holds answers \(samples.jsonl\) without the config.json"):
            Store(folder, {"seed": 0}, resume=resume)
    assert (folder / "samples.jsonl").read_text() == answers


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_someone_broke_is_named(text, tmp_path):
    evaluate(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(VlmFixError, match=r"config.json .*: mend it, or choose another --output"):
        read_config(tmp_path)


def test_a_clock_that_goes_back_changes_nothing(whole, tmp_path, monkeypatch):
    start = iter(range(10**6, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(start)))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        Point(10, full).put(patch, tmp_path / "out")
        evaluate(tmp_path / "out")
    evaluate(tmp_path / "out")
    assert kept(tmp_path / "out") == whole[0]
