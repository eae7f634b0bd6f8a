"""The traces of a decode row in one launch: Triton's interpreter runs the very kernel that a GPU gets."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.support.interpreted import errors_of
from vlm_fix.attention.traces import _row_factor, formula

CASES = {"grouped": (2, 6, 2, 70, 24), "one column": (1, 4, 4, 1, 16), "small": (2, 3, 1, 9, 5)}
GAMMA = 0.8


def made(name, dtype):
    batch, heads, kv, width, dim = CASES[name]
    g = torch.Generator().manual_seed(width)
    query = torch.randn(batch, 1, heads, dim, generator=g).to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv, width + 4, dim, generator=g).to(dtype)[:, :, 2:-2]
    return query, key, width - 1, torch.rand(batch, generator=g) * (0 if name == "small" else 300)


def reference(query, key, at, known):
    """float64, entry by entry."""
    totals, factors = [], []
    for b in range(len(query)):
        own = [float((x.double() ** 2).sum()) for x in (query[b], key[b, :, at])]
        traces = own[0] / query.shape[1], float(known[b]) + own[1] / key.shape[1]
        totals.append(traces[1])
        factors.append(math.prod(1 + GAMMA / max(math.log(trace), 1.0) for trace in traces))
    return factors, totals


def errors(run):
    found = {}
    for name in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            given = made(name, dtype)
            out, expected = run(*given, GAMMA), reference(*given)
            assert out[0].shape == (len(given[0]), 1, 1, 1)
            ratios = [
                abs(x / y - 1)
                for a, b in zip(out, expected, strict=True)
                for x, y in zip(a.flatten().tolist(), b, strict=True)
            ]
            found[f"{name}, {dtype}"] = max(ratios)
    return found


@pytest.mark.parametrize("run", [formula, _row_factor])
def test_traces_equal_the_formula(run):
    assert max(errors(run).values()) < 1e-5


def test_kernel_equals_the_formula():
    found = errors_of(__spec__.name)
    assert len(found) == 2 * len(CASES) and max(found.values()) < 1e-5, found


if __name__ == "__main__":
    from vlm_fix.attention.triton_traces import launch

    print(json.dumps(errors(launch)))
