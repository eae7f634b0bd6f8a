"""Hidden states pushed in one launch equal the formula: Triton's interpreter runs the very kernel that a GPU gets."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.support.interpreted import errors_of
from vlm_fix import launches
from vlm_fix.hidden.push import NONE, Gate, pushed

BETA = Gate("beta", 5.0, 1.0, 0.6)
CASES = {  # B, R, C, shape of the direction, what is given
    "turned": (2, 3, 64, (64,), {"strength": 0.4}),
    "ragged": (1, 1, 37, (1, 1, 37), {"strength": 2.0, "keep_norm": False}),
    "of each sample": (2, 5, 100, (2, 1, 100), {"strength": 0.3, "gate": Gate("away")}),
    "of each column": (2, 3, 50, (3, 50), {"strength": 0.5}),
    "of each row": (2, 3, 50, (2, 3, 50), {"strength": 4.0, "relative": False}),
    "gated": (2, 2, 70, (2, 1, 70), {"strength": 0.8, "gate": BETA, "keep_norm": False, "apart": True}),
    "gated by itself": (1, 4, 33, (1, 1, 33), {"strength": 0.8, "gate": BETA, "relative": False}),
}


def made(name):
    batch, rows, channels, shape, how = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    x, other = (torch.randn(batch, rows + 2, channels, generator=g)[:, 1:-1] for _ in range(2))  # views
    how = dict(how)
    if how.pop("apart", False):
        how |= {"length_of": other, "cosine_of": other}
    return x, torch.randn(shape, generator=g), how


def dot(a, b) -> float:
    return float((a * b).sum())


def reference(x, direction, strength, relative=True, keep_norm=True, gate=NONE, length_of=None, cosine_of=None):
    """float64, row by row."""
    out = x.double().clone()
    direction = direction.double().expand(x.shape)
    for b in range(len(x)):
        for r in range(x.shape[1]):
            row, d = x[b, r].double(), direction[b, r]
            looked, long = (row if y is None else y[b, r].double() for y in (cosine_of, length_of))
            s = dot(looked, d) / math.sqrt(dot(looked, looked) * dot(d, d))
            share = strength * (math.sqrt(dot(long, long)) if relative else 1.0)
            if gate.kind == "away":
                share *= 1 + max(0.0, -s)
            if gate.kind == "beta":
                one, two = (math.log1p(math.exp(gate.c + sign * gate.k * s)) for sign in (1, -1))
                share *= max(gate.low, one / (one + two))
            y = row + share * d
            out[b, r] = y * math.sqrt(dot(row, row) / dot(y, y)) if keep_norm else y
    return out


def errors():
    """What a process with TRITON_INTERPRET=1 prints: {case: error of the kernel}."""
    from vlm_fix.hidden.triton_push import launch

    found = {}
    for name in CASES:
        x, d, how = made(name)
        own = {"relative": True, "keep_norm": True, "gate": NONE, "length_of": x, "cosine_of": x} | how
        out = launch(
            x,
            d if d.dim() == 3 else d.expand(1, *x.shape[1:]),
            own["length_of"],
            own["cosine_of"],
            own["strength"],
            own["relative"],
            own["keep_norm"],
            *own["gate"],
        )
        found[name] = float((out.double() - reference(x, d, **how)).abs().max())
    return found


@pytest.mark.parametrize("one_launch", [False, True], ids=["plain operations", "one operator"])
@pytest.mark.parametrize("name", CASES)
def test_a_push_equals_the_formula(name, one_launch):
    x, d, how = made(name)
    before = launches.use(one_launch)
    try:
        with torch.no_grad():
            out = pushed(x, d, **how)
    finally:
        launches.use(before)
    torch.testing.assert_close(out.double(), reference(x, d, **how), atol=2e-6, rtol=1e-5)


def test_kernel_equals_the_formula():
    found = errors_of(__spec__.name)
    assert found.keys() == CASES.keys() and max(found.values()) < 1e-5, found


if __name__ == "__main__":
    print(json.dumps(errors()))
