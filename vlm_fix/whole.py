"""Files that appear when all of them is written: a reader sees the old one or the new, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write to, of this thread alone; at the end it becomes `path`, or is gone after an error.

    Its folder is made where it is missing. What was written is on the disk before it gets the name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # an ordinary file's: some writers (safetensors) make it the owner's alone
        yield part
        part.chmod(mode)
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
