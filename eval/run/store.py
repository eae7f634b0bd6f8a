"""Keep answers on disk, from one process or several, so that an interruption at any moment loses at most a batch.

DIR/config.json has the settings. DIR/samples.jsonl has one line per answer, appended batch by batch; under a launcher,
process k > 0 appends to DIR/samples.k.jsonl instead, and the first process merges the files at the start and at the end.
A batch is identified by (run, seed, benchmark, number); an incomplete batch is dropped and asked again.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic
from vlm_fix.eval.settings import launched

Key = tuple[str, int, str, int]
"""(run, seed, benchmark, number of the batch)"""


class Team:
    """The processes of `accelerate launch` or `torchrun`, or just this one. They synchronise over gloo."""

    def __init__(self) -> None:
        self.rank, self.size, _ = launched()
        if self.size == 1 and {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys():
            warnings.warn(  # it sets the address for --num_processes, and then starts the program once
                "accelerate launch started one process, whatever its --num_processes: on a CPU it needs --mpirun_hostfile for "
                "more. To share the work run `torchrun --nproc_per_node N -m vlm_fix.cli eval ...`.",
                stacklevel=2,
            )
        if self.size > 1 and not torch.distributed.is_initialized():
            if lost := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
                raise VlmFixError(
                    f"{self.size} processes were started without {lost[0]}, where they meet: set MASTER_ADDR (the first machine, "
                    "such as 127.0.0.1) and MASTER_PORT (a free one, such as 29500), or start them with torchrun."
                )
            # days, because a process waits for the others to answer their share
            days = timedelta(days=30)
            torch.distributed.init_process_group("gloo", timeout=days, rank=self.rank, world_size=self.size)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            torch.distributed.barrier()

    def share(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order, in every process."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            torch.distributed.all_gather_object(values, value)
        return values


class Store:
    """A folder with `config.json` and the answers so far. Raises VlmFixError if its run has other settings."""

    def __init__(self, folder: Path, config: dict[str, Any], resume: bool, team: Team | None = None) -> None:
        self.team = team or Team()
        self.folder, self.file = folder, folder / "samples.jsonl"
        self.mine = self.file if self.team.first else folder / f"samples.{self.team.rank}.jsonl"
        self.rows: dict[Key, list[dict[str, Any]]] = {}
        if self.team.first:
            known = folder / "config.json"
            folder.mkdir(parents=True, exist_ok=True)
            if known.exists() and not resume:  # another run began while this one loaded its model
                raise VlmFixError(
                    f"{folder} already holds a run: add --resume to continue it or choose another --output."
                )
            if not known.exists() and self._files():
                raise VlmFixError(
                    f"{folder} holds answers ({self._files()[0].name}) without the config.json that they were made with: choose "
                    "another --output."
                )
            if known.exists():
                for key, old, new in _differences({**read_config(folder), "server": config.get("server")}, config):
                    raise VlmFixError(
                        f"{folder} was made with {key} = {json.dumps(old)}, not {json.dumps(new)}: resume with the "
                        "same settings or choose another --output."
                    )
            else:
                write_atomic(known, json.dumps(config, indent=2) + "\n")
            for left in folder.glob(
                "*.*-*.part"
            ):  # a run killed while it wrote a file left what `whole_file` had begun
                left.unlink(missing_ok=True)
            self.merge()
        self.team.wait()
        if not self.team.first:
            self._read()

    def _files(self) -> list[Path]:
        return [path for path in (self.file, *sorted(self.folder.glob("samples.*.jsonl"))) if path.exists()]

    def _read(self) -> None:
        """Read the complete batches; a truncated line or incomplete batch is dropped, to be asked again."""
        self.rows = {}
        for path in self._files():
            found: dict[Key, list[dict[str, Any]]] = {}
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                    found.setdefault((row["run"], row["seed"], row["benchmark"], row["batch"]), []).append(row)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
            for key, rows in found.items():
                if len(rows) == rows[0].get("batch_size"):
                    self.rows.setdefault(key, rows)  # an interrupted `merge` leaves a batch in two files

    def merge(self, order: Sequence[Key] | None = None) -> None:
        """Merge every process's answers into samples.jsonl, in `order` if given. Only for the first process."""
        self._read()
        keys = [key for key in order if key in self.rows] if order else list(self.rows)
        self.rows = {key: self.rows[key] for key in keys}
        write_atomic(self.file, "".join(json.dumps(row) + "\n" for rows in self.rows.values() for row in rows))
        for path in self._files():
            if path != self.file:
                path.unlink()

    def add(self, key: Key, rows: list[dict[str, Any]]) -> None:
        """Append a batch, and return once it is on disk."""
        with self.mine.open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
            handle.flush()
            os.fsync(handle.fileno())
        self.rows[key] = rows

    def of(self, run: str, benchmark: str) -> list[dict[str, Any]]:
        """Return all rows of a run and benchmark, by seed and batch."""
        keys = sorted(key for key in self.rows if (key[0], key[2]) == (run, benchmark))
        return [row for key in keys for row in self.rows[key]]


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, also against other processes. Raises VlmFixError if another run holds it; a killed one does no more."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VlmFixError(
                f"{folder} is in use by another run: wait for its end, or choose another --output."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a run. Raises VlmFixError if it is not as a run wrote it."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise VlmFixError(f"{path} cannot be read ({error}): mend it, or choose another --output.") from None
    if not isinstance(found, dict):
        raise VlmFixError(f"{path} holds no settings: mend it, or choose another --output.")
    return found


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) of the settings that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def load_results(folder: str | Path) -> dict[str, Any]:
    """Read results.json of a finished run."""
    return json.loads((Path(folder) / "results.json").read_text())
