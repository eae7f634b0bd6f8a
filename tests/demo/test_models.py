"""The models of a page."""

import shutil
import threading
import time

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

import vlm_fix
from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError
from vlm_fix.demo import compare, models
from vlm_fix.eval import picto


def test_a_twin_shares_weights_and_nothing_else(loaded, scene):
    before, twin = last(compare.compare(loaded, scene, PROMPT, []))[0].text, loaded.twin()
    ours, theirs = dict(loaded.model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[key] is theirs[key] for key in ours)
    with vlm_fix.wrapped(twin, "vhr:alpha=3"):
        assert last(compare.compare(loaded, scene, PROMPT, []))[0].text == before
        assert not hasattr(loaded.model, "_vlm_fix_engine")


def test_models_by_name(tmp_path):
    closed = models.Models(["picto-llava"])
    assert closed.get("picto-llava") is closed.get(" picto-llava ")
    for name in ("", str(tmp_path), "someone/else"):
        with pytest.raises(VlmFixError, match="This page offers picto-llava"):
            closed.get(name)
    shutil.copytree(picto.model_path("picto-llava"), tmp_path / "copy")
    opened = models.Models(["picto-llava"], any_name=True)
    assert opened.get(str(tmp_path / "copy")).identity["weights"] == closed.get("picto-llava").identity["weights"]
    with pytest.raises(VlmFixError, match="could not be loaded"):
        opened.get(str(tmp_path / "nothing"))
    assert "picto-llava" in models.bundled()


class Slow:
    """Stands for a model that takes as long as the test wants."""

    doors: dict[str, threading.Event] = {}
    made: list[str] = []

    def __init__(self, name):
        self.name = name
        assert self.doors[name].wait(10)
        if name == "broken":
            raise VlmFixError("broken could not be loaded.")
        self.made.append(name)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(models, "Loaded", Slow)
    Slow.doors, Slow.made = {name: threading.Event() for name in ("one", "two", "broken")}, []
    return models.Models(["one", "two", "broken"])


def waits(get, *given):
    """A thread in which `get` waits, and where what it returns or raises will be."""
    found = []

    def work():
        try:
            found.append(get(*given))
        except VlmFixError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_loading_blocks_nobody(slow):
    slow.loaded["two"] = "in memory"
    threads = [waits(slow.get, "one") for _ in range(2)]
    until(lambda: slow.loading and slow.loading["one"].waiting == 2)
    assert slow.get("two") == "in memory"  # while the other one is still loaded
    Slow.doors["one"].set()
    [thread.join(10) for thread, _ in threads]
    assert Slow.made == ["one"] and threads[0][1][0] is threads[1][1][0] is slow.get("one") and not slow.loading


def test_a_load_can_be_cancelled(slow):
    stop = threading.Event()
    thread, found = waits(slow.get, "one", stop)
    until(lambda: slow.loading)
    second, never = waits(slow.get, "two", stop)  # has to wait for the first, and is cancelled before it began
    until(lambda: len(slow.loading) == 2)
    stop.set()
    thread.join(10), second.join(10)
    assert "it was cancelled" in str(found[0]) and "it was cancelled" in str(never[0])
    for door in Slow.doors.values():
        door.set()
    until(lambda: not slow.loading)
    assert not slow.loaded and Slow.made == ["one"]  # let go when it was loaded; the other was not begun
    assert slow.get("one").name == "one" and list(slow.loaded) == ["one"]


def test_a_failed_load_tells_all_who_wait_and_is_tried_again(slow):
    threads = [waits(slow.get, "broken") for _ in range(2)]
    until(lambda: slow.loading and slow.loading["broken"].waiting == 2)
    Slow.doors["broken"].set()
    [thread.join(10) for thread, _ in threads]
    assert all(str(found[0]) == "broken could not be loaded." for _, found in threads)
    with pytest.raises(VlmFixError, match="broken could not"):
        slow.get("broken")
    assert not slow.loading and not slow.loaded
