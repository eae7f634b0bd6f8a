"""PAINT beside pruners."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.models import single
from tests.support.run import greedy


def test_paint_follows_the_kept_tokens(model, family):
    """With every token kept but re-packed by a pruner, PAINT's strengths stay on their tokens."""
    inputs = single(family, [1, 2], 1)
    seen = {}
    from vlm_fix.methods.attention.paint import PAINT as Method
    from vlm_fix.methods.attention.paint import PAINTMemory

    def spy(self, session, kwargs, original=Method.prepare):
        kwargs = original(self, session, kwargs)
        if session.start == 0:
            seen[session.kept is not None] = (session.memory(self, PAINTMemory).strength[0], session.kept)
        return kwargs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "prepare", spy)
        for stack in (["paint"], ["paint", "random_tokens:keep=5"]):
            with vlm_fix.wrapped(model, stack):
                greedy(model, inputs, steps=1)
    (whole, _), (pruned, kept) = seen[False], seen[True]
    assert torch.equal(pruned, whole[kept.index[0]]) and pruned.any() and len(pruned) < len(whole)
