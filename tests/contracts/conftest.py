"""What the contracts share: the models in half precision, and the answers of models without a method."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import BUILD, make_inputs
from tests.support.run import greedy

SOME_WITHOUT_IMAGE = [1, 2, 0]


@pytest.fixture(scope="session")
def half_models():
    """{family: bfloat16 model}; tests must leave them unwrapped."""
    return {name: build(torch.bfloat16) for name, build in BUILD.items()}


@pytest.fixture(scope="session")
def plain_answers(models):
    """{family: (prompt, (tokens, logits, scores) without a method)}."""
    prompts = {family: make_inputs(family, SOME_WITHOUT_IMAGE) for family in models}
    return {family: (inputs, greedy(models[family], inputs)) for family, inputs in prompts.items()}
