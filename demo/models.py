"""The models of the page: loaded when they are asked for, and used by one answer at a time, first come, first served."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import html
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.run import generation, loading
from vlm_fix.wrapping import plan

from .examples import scenes

KEPT = 2  # models in memory


class Turn:
    """A lock that serves in the order in which it was asked for: a long job that lets go in between delays nobody."""

    def __init__(self) -> None:
        self.door, self.line = threading.Lock(), collections.deque[threading.Event]()

    def __enter__(self) -> None:
        mine = threading.Event()
        with self.door:
            self.line.append(mine)
            self.line[0].set()
        mine.wait()

    def __exit__(self, *error: Any) -> None:
        with self.door:
            self.line.popleft()
            if self.line:
                self.line[0].set()

    def pass_on(self) -> None:
        """Let everybody who waits now go first."""
        self.__exit__()
        self.__enter__()


class Loaded:
    """A model with its processor, what it is, and whose turn it is."""

    def __init__(self, name: str, device: str = "auto") -> None:
        self.name, self.turn = name, Turn()
        self.model, self.processor, self.identity = loading.load_model(name, device=device)
        with contextlib.suppress(Exception):  # the first call is slow; what fails here will say so in its pane
            generation.generate(self.model, self.processor, [scenes()[0].image], ["hello"], 0, max_new_tokens=2)

    def twin(self) -> Any:
        """The same model with the same weights in memory, to wrap without touching this one."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    def refusal(self, stack: Sequence[str]) -> str:
        """Why this stack of methods cannot run on this model; empty where it can."""
        try:
            if stack:
                plan(self.model, list(stack))
        except VlmFixError as error:
            return str(error)
        return ""

    def about(self) -> str:
        """Name, size, precision and device, as HTML."""
        millions = self.identity["parameters"] / 1e6
        size = f"{millions / 1e3:.1f} billion" if millions >= 1e3 else f"{millions:.0f} million"
        return (
            f"<b>{html.escape(self.name)}</b>, {size} parameters, {self.identity['dtype']} on {self.identity['device']}"
        )


@dataclasses.dataclass
class Loading:
    """A model that is being loaded, for `waiting` people."""

    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    waiting: int = 0
    made: Loaded | None = None
    error: Exception | None = None


class Models:
    """Models by name. Only the listed names are loaded, unless `any_name`: a page that others reach must not let them
    fill the disk or look into folders."""

    def __init__(self, names: Sequence[str], any_name: bool = False) -> None:
        self.names, self.any_name = list(dict.fromkeys(names)), any_name
        self.loaded: collections.OrderedDict[str, Loaded] = collections.OrderedDict()
        self.loading: dict[str, Loading] = {}
        self.lock = threading.Lock()  # of the two above; never held for long
        self.one = threading.Lock()  # transformers changes the default dtype while it loads: one after the other

    def get(self, name: str, stop: threading.Event | None = None) -> Loaded:
        """The model, loaded if need be; VlmFixError if it cannot be had, or once `stop` is set.

        Nobody waits for a model that another has asked for. The last two asked for stay in memory; what nobody waits for any
        more is let go when it is loaded.
        """
        name = (name or "").strip()
        if not name or (name not in self.names and not self.any_name):
            raise VlmFixError(f"This page offers {', '.join(self.names)}: choose one of them.")
        with self.lock:
            if name in self.loaded:
                self.loaded.move_to_end(name)
                return self.loaded[name]
            job = self.loading.get(name)
            if job is None:
                job = self.loading[name] = Loading()
                threading.Thread(target=self._load, args=(name, job), daemon=True).start()
            job.waiting += 1
        try:
            while not job.done.wait(0.1):
                if stop and stop.is_set():
                    raise VlmFixError(f"{name} was not loaded: it was cancelled. Choose it again to load it.")
        finally:
            with self.lock:
                job.waiting -= 1
        if job.error:
            raise job.error
        assert job.made
        return job.made

    def _load(self, name: str, job: Loading) -> None:
        try:
            with self.one:
                with self.lock:
                    if not job.waiting:
                        del self.loading[name]
                        return
                job.made = Loaded(name)
        except Exception as error:
            job.error = error
        with self.lock:
            del self.loading[name]
            if job.made and job.waiting:
                while len(self.loaded) >= KEPT:
                    self.loaded.popitem(last=False)
                self.loaded[name] = job.made
            job.done.set()


def bundled() -> list[str]:
    """The models that come with the package."""
    return sorted(path.parent.name for path in Path(picto.__file__).parent.glob("picto-*/config.json"))
