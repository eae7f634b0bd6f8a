"""The heads that look most, in one launch: Triton's interpreter runs the very kernel that a GPU gets."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.support.interpreted import errors_of
from vlm_fix.attention.halves import _raised, formula

CASES = {"even": (2, 8, 130), "odd": (1, 5, 64), "one head": (2, 1, 20)}


def made(name):
    batch, heads, width = CASES[name]
    g = torch.Generator().manual_seed(width)
    z = 3 * torch.randn(batch, heads, 1, width, generator=g)
    kinds = torch.randint(3, (batch, width + 11), generator=g)
    strength = torch.rand(batch, width + 11, generator=g) * 4
    return z, torch.stack([kinds == 1, kinds == 2, strength * (kinds == 1)], dim=1).float()


def reference(z, columns):
    """float64, sample by sample and head by head."""
    out = torch.zeros(*z.shape[:2], 2, dtype=torch.float64)
    for b in range(len(z)):
        a = z[b, :, 0].double().softmax(dim=-1)
        one, two, g = columns[b, :, : z.shape[-1]].double()
        half = max(1, z.shape[1] // 2)
        seeing, reading = (
            sorted(range(len(a)), key=lambda h, x=x: -float((a[h] * x).sum()))[:half] for x in (one, two)
        )
        before = sum(float((a[h] * one).sum()) for h in seeing)
        after = sum(float((a[h] * one * g.exp()).sum()) for h in seeing)
        for h in seeing:
            out[b, h, 0] = 1
        for h in reading:
            out[b, h, 1] = math.log(after / before)
    return out


def errors(run):
    return {name: float((run(*made(name)).double() - reference(*made(name))).abs().max()) for name in CASES}


@pytest.mark.parametrize("run", [formula, _raised])
def test_shares_equal_the_formula(run):
    assert max(errors(run).values()) < 1e-5


def test_kernel_equals_the_formula():
    found = errors_of(__spec__.name)
    assert found.keys() == CASES.keys() and max(found.values()) < 1e-5, found


if __name__ == "__main__":
    from vlm_fix.attention.triton_halves import launch

    print(json.dumps(errors(launch)))
