"""A method at its neutral strength leaves the model's answers as they are, bit for bit."""

import pytest
import torch

import vlm_fix
from tests.support.cases import NEUTRAL, named
from tests.support.run import greedy


@pytest.mark.parametrize("spec", NEUTRAL, ids=named)
@pytest.mark.filterwarnings("ignore:.* changed nothing in this call. its keep covers every image token")
def test_neutral_spec_changes_no_bit(family, model, plain_answers, spec):
    inputs, plain = plain_answers[family]
    with vlm_fix.wrapped(model, spec):
        answer = greedy(model, inputs)
    for what, ours, theirs in zip(("tokens", "logits", "scores"), answer, plain, strict=True):
        assert torch.equal(ours, theirs), f"{what} with {spec} are not those of the unwrapped model"
