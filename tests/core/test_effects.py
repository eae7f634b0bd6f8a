"""What is said of methods that change nothing: a method that changed something once is not named, whatever follows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_fix.effects import Effects

STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["another", "equal", "same"])), max_size=30)


def note(effects, method, what):
    old = torch.zeros(2, 3)
    effects.note(method, old if what == "same" else old.clone() if what == "equal" else old + 1, old)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_idle_are_those_that_never_changed_anything(steps):
    effects = Effects()
    for i, (method, what) in enumerate(steps):
        assert effects.asks(method) == ((method, "another") not in steps[:i])
        note(effects, method, what)
    assert {*effects.idle()} == {m for m, _ in steps} - {m for m, what in steps if what == "another"}


@given(STEPS)
@settings(max_examples=20, deadline=None)
def test_nothing_is_looked_at_if_nobody_asks(steps):
    effects = Effects()
    effects.asked = False
    for method, what in steps:
        note(effects, method, what)
        assert not effects.asks(method)
    assert not effects.moved
