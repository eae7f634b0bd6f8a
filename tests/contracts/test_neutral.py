"""A method at its neutral strength leaves the model's answers as they are, bit for bit."""

import warnings

import pytest
import torch

import vlm_fix
from tests.support.cases import NEUTRAL, named
from tests.support.run import greedy
from vlm_fix.wing import installed


@pytest.mark.parametrize("spec", NEUTRAL, ids=named)
def test_neutral_spec_changes_no_bit(family, model, plain_answers, spec):
    inputs, plain = plain_answers[family]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with vlm_fix.wrapped(model, spec):
            answer, rests = greedy(model, inputs), not installed(model).active
    assert len(told) <= 1
    assert spec == "baseline" or not rests or "these settings are neutral" in str(told[0].message)
    for what, ours, theirs in zip(("tokens", "logits", "scores"), answer, plain, strict=True):
        assert torch.equal(ours, theirs), f"{what} with {spec} are not those of the unwrapped model"
