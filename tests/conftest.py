"""Fixtures: the shared tiny models."""

from __future__ import annotations

import os

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: tests load nothing from a hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from tests.support.models import BUILD

# a busy machine is no fault: the clock fails no example
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def models():
    """{family: float32 model}; tests must leave them unwrapped."""
    return {name: build() for name, build in BUILD.items()}


@pytest.fixture(params=list(BUILD))
def family(request):
    return request.param


@pytest.fixture
def model(models, family):
    yield models[family]
    import vlm_fix

    vlm_fix.unwrap(models[family])


def pytest_terminal_summary(terminalreporter):
    """Gates of the matrix that fell the other way in bf16."""
    cells = [
        (report.nodeid, value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "gate_flips" and value[1]
    ]
    if cells:
        flips, gates = (sum(value[i] for _, value in cells) for i in (0, 1))
        name, worst = max(cells, key=lambda cell: cell[1][2])
        terminalreporter.write_line(
            f"gate flips: {flips} of {gates} gates in {len(cells)} cells; the farthest lay {worst[2]:.1e} from its "
            f"threshold, in {name.partition('[')[2].rstrip(']')}"
        )
