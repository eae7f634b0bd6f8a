"""The decode row in one launch equals the row kernel: Triton's interpreter runs the very kernel that a GPU gets."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from tests.support.interpreted import errors_of
from vlm_fix.attention.forms import Condition, ScoreForm, TransferForm
from vlm_fix.attention.fused import _row, _scores
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
    "known scores": (2, 4, 2, 99, 16, 16, "up bias bool known", 2048),
    "known, capped, split": (1, 4, 1, 150, 24, 16, "down up cap known", 64),
    "transfer": (2, 4, 2, 99, 32, 32, "transfer", 2048),
    "transfer by head, split": (2, 6, 2, 200, 32, 24, "up bias bool heads transfer", 64),
    "transfer that nothing meets": (1, 4, 4, 70, 16, 16, "transfer never", 2048),
    "transfer from known scores": (1, 4, 2, 333, 16, 16, "float transfer known", 128),
}
TRANSFERS = {  # keep, move, conditions
    "": TransferForm(
        None, 0.3, 0.7, (Condition(1, 0, 0, 1e-38), Condition(1, 1, 0, 0.2), Condition(0.5, -1, 0.2, -0.3))
    ),
    "never": TransferForm(None, 0.0, 1.0, (Condition(0, 1, 1, 2.0),)),
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
    transfer = None
    if "transfer" in given:
        groups = torch.randint(4, (batch, heads if "heads" in given else 1, 1, width + 20), generator=g).to(torch.uint8)
        transfer = TRANSFERS["never" if "never" in given else ""]._replace(groups=groups)
    rows = QueryRows(query, key, value, allowed, Scores(dim**-0.5, cap))
    return rows, ScoreForm(**form), transfer, part


def arguments(name, dtype, scores):
    """-> those of `_row` and `launch`, the flag that a transfer raises, and columns of a program."""
    rows, form, transfer, part = made(name, dtype)
    z = scores(rows.query, rows.key, *rows.scores) if "known" in CASES[name][6] else None
    moved = None if transfer is None else torch.tensor(False)
    groups, numbers = (None, []) if transfer is None else (transfer.groups, transfer.numbers)
    return (*rows[:4], *form, groups, numbers, moved, z, *rows.scores), moved, part


def reference(rows, form, transfer):
    """[B, 1, H, D] float64, entry by entry of the formula; and whether a transfer changed anything."""
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
    a, changed = z.softmax(dim=-1).nan_to_num(0.0), False
    for b, h in itertools.product(*map(range, a.shape[:2])) if transfer else ():
        group = transfer.groups.expand(*a.shape[:2], 1, -1)[b, h, 0, : a.shape[-1]]
        m = [float(a[b, h, 0, group == i].sum()) for i in range(4)]
        if all(c.first * m[1] + c.second * m[2] + c.third * m[3] >= c.least for c in transfer.conditions):
            a[b, h, 0, group == 1] *= 1 + transfer.move * (m[2] + m[3]) / m[1]
            a[b, h, 0, group >= 2] *= transfer.keep
            changed = True
    return (a @ value).transpose(1, 2), changed


def errors():
    """What a process with TRITON_INTERPRET=1 prints: {case: error of the kernel}; -1: it did not raise the flag right."""
    from vlm_fix.attention.triton_row import launch, launch_scores

    found = {}
    for name in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            rows, form, transfer, _ = made(name, dtype)
            given, moved, part = arguments(name, dtype, launch_scores)
            out, (expected, changed) = launch(*given, part=part), reference(rows, form, transfer)
            assert out.dtype == dtype and out.shape == expected.shape
            wrong = moved is not None and bool(moved) != changed
            found[f"{name}, {dtype}"] = -1.0 if wrong else float((out.double() - expected).abs().max())
    return found


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_the_formula(name):
    rows, form, transfer, _ = made(name, torch.float32)
    given, moved, _ = arguments(name, torch.float32, _scores)
    expected, changed = reference(rows, form, transfer)
    torch.testing.assert_close(_row(*given).double(), expected, atol=2e-6, rtol=1e-5)
    assert moved is None or bool(moved) == changed == ("never" not in name and "nothing" not in name)


def test_kernel_equals_the_formula():
    found = errors_of(__spec__.name)
    assert len(found) == 2 * len(CASES)
    for case, error in found.items():
        assert 0 <= error < (2e-6 if "float32" in case else 0.02), (case, error)


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
