"""Files that are kept appear whole: from writers that are killed, that find the disk full, and that write at the same time."""

import errno
import json
import os
import resource
import signal
import threading

import pytest
import torch
import yaml

from vlm_fix.calibrated import Calibration
from vlm_fix.eval.files import write_atomic
from vlm_fix.presets import Preset
from vlm_fix.registry import parse
from vlm_fix.tensors import Tensors
from vlm_fix.whole import whole_file

MODEL = {"name": "m", "type": "llava", "depth": 4, "hidden": 64, "heads": 4, "weights": "sha256:00"}


def calibration(path, value):
    found = {"alpha": value, "file": Tensors({"direction.0": torch.full((2000,), value)})}
    Calibration("vti", found, MODEL).write(path)


def preset(path, value):
    Preset(tuple(parse(f"pai:alpha={value}")), MODEL, {"text": "é" * 3000}).write(path)


def text(path, value):
    write_atomic(path, json.dumps([value] * 3000))


WRITERS = {"calibration": calibration, "preset": preset, "text": text}
READERS = {
    "calibration": lambda path: Calibration.read(path).found["alpha"],
    "preset": lambda path: Preset.read(path).methods[0].alpha,
    "text": lambda path: json.loads(path.read_text())[-1],
}


def in_a_child(work) -> int:
    """The status of a process that does `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("kind", WRITERS)
def test_killed_at_every_call_that_changes_the_folder(kind, tmp_path):
    path, deaths = tmp_path / "kept", 0
    WRITERS[kind](path, 0.25)
    for at in range(1, 20):

        def work(at=at):
            left = at

            def counted(function):
                def call(*args, **how):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **how)

                return call

            for name in ("replace", "fsync", "open", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            WRITERS[kind](path, 0.75)

        died = os.WIFSIGNALED(in_a_child(work))
        deaths += died
        assert READERS[kind](path) in (0.25, 0.75)
        if not died:
            break
    assert deaths >= 3 and not died and READERS[kind](path) == 0.75


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_takes_only_a_part(kind, tmp_path):
    """The limit on the size of files is the system's own, met in the middle of a write."""
    path = tmp_path / "kept"
    WRITERS[kind](path, 0.25)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        with pytest.raises(Exception) as error:  # safetensors raises one of its own
            WRITERS[kind](path, 0.75)
        assert getattr(error.value, "errno", None) == errno.EFBIG or "File too large" in str(error.value)

    assert in_a_child(work) == 0
    assert READERS[kind](path) == 0.25 and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", WRITERS)
def test_several_write_one_file_while_it_is_read(kind, tmp_path):
    path, going = tmp_path / "kept", threading.Event()
    values = (0.25, 0.5, 0.75)
    WRITERS[kind](path, values[0])

    def write(value):
        while not going.is_set():
            WRITERS[kind](path, value)

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    try:
        seen = [READERS[kind](path) for _ in range(60)]
    finally:
        going.set()
        for thread in threads:
            thread.join()
    assert {*seen} <= {*values} and not list(tmp_path.glob("*.part"))


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "folder" / "kept"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert not list(path.parent.iterdir())
    with whole_file(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and [p.name for p in path.parent.iterdir()] == ["kept"]


def test_it_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """Else a machine that loses its power could keep the name without the content."""
    seen, fsync = [], os.fsync

    def spy(handle):
        fsync(handle)
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), (tmp_path / "kept").exists()))

    monkeypatch.setattr(os, "fsync", spy)
    with whole_file(tmp_path / "kept") as part:
        part.write_text("whole")
    assert seen == [(part.name, False), (tmp_path.name, True)]


@pytest.mark.parametrize("kind", WRITERS)
def test_who_may_read_it_is_as_for_any_new_file(kind, tmp_path):
    """safetensors makes its files the owner's alone, whatever the umask."""
    usual = tmp_path / "usual"
    usual.touch()
    folder = tmp_path / "folder"
    WRITERS[kind](folder / "kept", 0.5)
    assert {p.stat().st_mode for p in folder.iterdir()} == {usual.stat().st_mode}, "the tensors beside it among them"


def test_a_preset_is_read_in_any_locale(tmp_path, monkeypatch):
    preset(tmp_path / "kept", 0.5)
    assert yaml.safe_load((tmp_path / "kept").read_text(encoding="utf-8"))["text"] == "é" * 3000
