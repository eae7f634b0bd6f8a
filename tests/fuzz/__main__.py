"""`python -m tests.fuzz --minutes 60`: feed every reader for that much processor time, and keep what made one fail.

A failing input, as small as hypothesis can make it, is written to tests/fuzz/found/, from where the tests replay it; a second
one with the same error in the same line is not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
import traceback
from pathlib import Path

import hypothesis

from .targets import TARGETS, fault

FOUND = Path(__file__).parent / "found"
ROUND = 200


class Found(Exception):
    """An input that made a reader fail, and what it raised."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        self.data, self.error = data, error


def place(error: BaseException) -> str:
    """The error's kind and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else str(error)[:60]


def once(name: str, seed: int, known: set[str], folder: Path) -> Found | None:
    """Feed a reader ROUND inputs."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(TARGETS[name].strategy)
    def feed(data: bytes) -> None:
        error = fault(name, data, folder)
        if error is not None and f"{name}: {place(error)}" not in known:
            raise Found(data, error) from error

    try:
        feed()
    except Found as found:
        return found
    return None


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of processor time, as a machine may be shared (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="one reader; may be repeated (all)")
    args = parser.parse_args()
    names, known, fed, seed = args.target or list(TARGETS), set[str](), dict.fromkeys(TARGETS, 0), args.seed
    end = time.process_time() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        while time.process_time() < end:
            for name in names:
                found = once(name, seed, known, Path(folder))
                fed[name] += ROUND
                if found:
                    where = f"{name}: {place(found.error)}"
                    known.add(where)
                    kept = FOUND / f"{name.replace(' ', '-')}-{hashlib.sha256(found.data).hexdigest()[:10]}"
                    FOUND.mkdir(exist_ok=True)
                    kept.write_bytes(found.data)
                    print(f"{where}\n  {found.error!r:.200}\n  {found.data[:120]!r}\n  kept in {kept.name}", flush=True)
                if time.process_time() > end:
                    break
            seed += 1
    print(f"{sum(fed.values())} inputs to {len(names)} readers, {len(known)} faults", flush=True)
    return int(bool(known))


if __name__ == "__main__":
    raise SystemExit(main())
