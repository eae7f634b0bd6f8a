"""The answers on disk, safe against a kill at any moment, written by one process or by many.

DIR/config.json says what was asked. DIR/samples.jsonl holds one line per answer, appended batch by batch; under a
launcher, process k > 0 appends to DIR/samples.k.jsonl instead, and the first process merges the files when it starts and
when all are done. A batch is known by (run, seed, benchmark, number); half a batch is forgotten and asked again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vlm_fix.errors import VlmFixError

Key = tuple[str, int, str, int]
"""(run, seed, benchmark, number of the batch)"""


class Team:
    """The processes of `accelerate launch` or `torchrun`, or this one alone. They meet at `wait`, over gloo."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and not torch.distributed.is_initialized():
            # days: a process may wait for another one that still answers its share
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process, in the order of the processes."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            torch.distributed.all_gather_object(values, value)
        return values


class Store:
    """DIR with `config.json` and the answers so far. Raises VlmFixError if DIR holds a run of other settings."""

    def __init__(self, folder: Path, config: dict[str, Any], resume: bool, team: Team | None = None) -> None:
        self.team = team or Team()
        self.folder, self.file = folder, folder / "samples.jsonl"
        self.mine = self.file if self.team.first else folder / f"samples.{self.team.rank}.jsonl"
        self.rows: dict[Key, list[dict[str, Any]]] = {}
        if self.team.first:
            known = folder / "config.json"
            if resume and known.exists():
                for key, old, new in _differences(json.loads(known.read_text()), config):
                    raise VlmFixError(
                        f"{folder} was made with {key} = {json.dumps(old)}, not {json.dumps(new)}: resume with the "
                        "same settings or choose another --output."
                    )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                for path in self._files():
                    path.unlink()
                write_atomic(known, json.dumps(config, indent=2) + "\n")
            self.merge()
        self.team.wait()
        if not self.team.first:
            self._read()

    def _files(self) -> list[Path]:
        return [path for path in (self.file, *sorted(self.folder.glob("samples.*.jsonl"))) if path.exists()]

    def _read(self) -> None:
        """Keep the complete batches; a torn last line or half a batch is dropped and will be asked again."""
        self.rows = {}
        for path in self._files():
            found: dict[Key, list[dict[str, Any]]] = {}
            for line in path.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    found.setdefault((row["run"], row["seed"], row["benchmark"], row["batch"]), []).append(row)
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
            for key, rows in found.items():
                if len(rows) == rows[0]["batch_size"]:
                    self.rows.setdefault(key, rows)  # a kill during `merge` leaves a batch in two files

    def merge(self, order: Sequence[Key] | None = None) -> None:
        """Bring every process's answers into samples.jsonl, in `order` if given. For the first process alone."""
        self._read()
        keys = [key for key in order if key in self.rows] if order else list(self.rows)
        self.rows = {key: self.rows[key] for key in keys}
        write_atomic(self.file, "".join(json.dumps(row) + "\n" for rows in self.rows.values() for row in rows))
        for path in self._files():
            if path != self.file:
                path.unlink()

    def add(self, key: Key, rows: list[dict[str, Any]]) -> None:
        """Append a batch and have it on disk before returning."""
        with self.mine.open("a") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
            handle.flush()
            os.fsync(handle.fileno())
        self.rows[key] = rows

    def of(self, run: str, benchmark: str) -> list[dict[str, Any]]:
        """All rows of a run and benchmark, by seed and batch."""
        keys = sorted(key for key in self.rows if (key[0], key[2]) == (run, benchmark))
        return [row for key in keys for row in self.rows[key]]


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of the settings that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, sees the old text or the new, never half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)
    with contextlib.suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
