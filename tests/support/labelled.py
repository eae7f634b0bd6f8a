"""Labelled samples for calibration."""

from __future__ import annotations

from tests.support.models import single
from vlm_fix.sample import Sample


def labelled(family, images=(1, 2, 1), seed=0, **kw):
    """One Sample a row of make_inputs."""
    return [Sample(single(family, list(images), row, seed, **kw), 5 + row, 9 + row) for row in range(len(images))]
