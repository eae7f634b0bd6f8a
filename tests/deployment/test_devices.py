"""A model over two devices, as `device_map` lays it, gives the CPU's tokens under every kind of method."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.deployment.devices import SPECS
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def outcome():
    """What one process printed: a device in Python stays registered in the process that asks for it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.deployment.devices"], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("spec", ["None", *SPECS])
def test_two_devices_give_the_tokens_of_one(outcome, spec):
    if "skip" in outcome:
        pytest.skip(outcome["skip"])
    assert not outcome[spec], outcome[spec]
