"""The decode row in one launch equals the row kernel: Triton's interpreter runs the very kernel that a GPU gets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT
from vlm_fix.attention.forms import ScoreForm
from vlm_fix.attention.fused import _row
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.scores import Scores

CASES = {  # B, H, Hkv, K, D of keys, D of values, what is given, how many columns one program takes
    "one block": (1, 4, 4, 64, 64, 64, "up", 2048),
    "ragged": (2, 6, 2, 77, 40, 40, "up down bias bool", 2048),
    "heads": (1, 8, 2, 130, 128, 128, "up down heads", 2048),
    "one column": (2, 4, 1, 1, 16, 16, "bias", 2048),
    "latent": (1, 4, 4, 33, 24, 16, "bias float", 2048),
    "capped": (1, 4, 2, 90, 32, 32, "up bias cap", 2048),
    "split": (2, 4, 2, 333, 32, 32, "up down bias bool", 64),
    "split, capped": (1, 4, 2, 129, 48, 48, "up float cap", 128),
    "blind": (2, 2, 2, 70, 16, 16, "bool blind", 64),
    "plain": (1, 2, 1, 99, 16, 16, "", 2048),
}


def made(name, dtype):
    """-> the arguments of a decode row: views into larger tensors, as caches are."""
    batch, heads, kv, width, dim, size, given, part = CASES[name]
    g = torch.Generator().manual_seed(sum(map(ord, name)))

    def rand(*shape):
        return torch.randn(shape, generator=g)

    query = rand(batch, 1, heads, dim).to(dtype).transpose(1, 2)
    key, value = (rand(batch, kv, width + 9, n).to(dtype)[:, :, 3 : width + 3] for n in (dim, size))
    form = {"up": None, "down": None, "bias": None}
    for what in form:
        if what in given:
            form[what] = 1 + 0.5 * rand(batch, heads if "heads" in given else 1, 1, width + 20)
    allowed = None
    if "bool" in given:
        allowed = rand(batch, 1, 1, width) > -0.5
        allowed[..., -1] = True
    if "blind" in given:
        allowed[0] = False
    if "float" in given:
        allowed = torch.where(rand(1, 1, 1, width) > -0.5, 0.0, -torch.inf)
        allowed[..., 0] = 0
    cap = 1.5 if "cap" in given else None
    return QueryRows(query, key, value, allowed, Scores(dim**-0.5, cap)), ScoreForm(**form), part


def reference(rows, form):
    """[B, 1, H, D] float64, entry by entry of the formula."""
    query, key, value = (x.double() for x in rows[:3])
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    z = (query @ key.mT) * rows.scores.scaling
    z = z if rows.scores.softcap is None else rows.scores.softcap * torch.tanh(z / rows.scores.softcap)
    up, down, bias = (None if x is None else x[..., : key.shape[2]].double() for x in form)
    if up is not None:
        z = torch.where(z >= 0, z * up, z * (up if down is None else down))
    z = z if bias is None else z + bias
    if rows.allowed is not None:
        z = z.masked_fill(~rows.allowed, -torch.inf) if rows.allowed.dtype == torch.bool else z + rows.allowed
    return (z.softmax(dim=-1).nan_to_num(0.0) @ value).transpose(1, 2)


def errors():
    """What a process with TRITON_INTERPRET=1 prints: {case: error of the kernel}."""
    from vlm_fix.attention.triton_row import launch

    found = {}
    for name in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            rows, form, part = made(name, dtype)
            out = launch(*rows[:4], *form, *rows.scores, part=part)
            assert out.dtype == dtype and out.shape == reference(rows, form).shape
            found[f"{name}, {dtype}"] = float((out.double() - reference(rows, form)).abs().max())
    return found


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_the_formula(name):
    rows, form, _ = made(name, torch.float32)
    if form.up is None and form.down is not None:
        pytest.skip("no such form")
    torch.testing.assert_close(
        _row(*rows[:4], *form, *rows.scores).double(), reference(rows, form), atol=2e-6, rtol=1e-5
    )


def test_kernel_equals_the_formula():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.test_fused"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(CASES)
    for case, error in found.items():
        assert error < (2e-6 if "float32" in case else 0.02), (case, error)


def test_slopes_of_a_stack():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 1, 50, generator=g)
    forms = [
        ScoreForm(torch.randn(2, 1, 1, 50, generator=g), torch.randn(2, 1, 1, 50, generator=g)),
        ScoreForm(torch.randn(1, 3, 1, 50, generator=g)),
        ScoreForm(torch.randn(2, 1, 1, 1, generator=g), torch.randn(2, 1, 1, 1, generator=g)),
        ScoreForm(bias=torch.randn(2, 1, 1, 50, generator=g)),
    ]
    expected, whole = z, ScoreForm()
    for form in forms:
        expected, whole = form.of(expected), whole.then(form)
    torch.testing.assert_close(whole.of(z), expected)
    wide = whole.widened(60)
    torch.testing.assert_close(wide.up[..., :50].expand_as(whole.up), whole.up)
    assert (wide.up[..., 50:] == 1).all() and (wide.bias[..., 50:] == 0).all()


if __name__ == "__main__":
    print(json.dumps(errors()))
