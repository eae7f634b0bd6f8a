"""What steering methods share beside `vlm_fix.hidden.push`."""

from __future__ import annotations


def scaled(part: float, depth: int) -> int:
    """A layer of a 32-layer model in a model of `depth` layers."""
    return min(depth - 1, round(part / 32 * depth))
