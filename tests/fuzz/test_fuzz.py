"""A little of `python -m tests.fuzz` in every run of the tests, and all that it has found."""

from pathlib import Path

import hypothesis
import pytest

from .targets import TARGETS, fault

FOUND = sorted(path for path in (Path(__file__).parent / "found").glob("*") if path.name != ".gitkeep")
READERS = {name.replace(" ", "-"): name for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_readers_return_or_say_what_is_wrong(name, tmp_path):
    @hypothesis.settings(
        max_examples=3 if TARGETS[name].slow else 25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(TARGETS[name].strategy)
    def feed(data):
        error = fault(name, data, tmp_path)
        if error is not None:
            raise error

    feed()


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_stays_mended(path, tmp_path):
    error = fault(READERS[path.name.rpartition("-")[0]], path.read_bytes(), tmp_path)
    if error is not None:
        raise error
