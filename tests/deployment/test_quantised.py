"""Quantised models: a method does on them what it does on a model with the same weights, unpacked.

`make test-quantised` installs the libraries in an environment of its own; without one its tests are skipped.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import vlm_fix
from tests.deployment.kinds import KINDS
from tests.support.models import make_inputs, tiny_llava
from tests.support.run import greedy

SPECS = {**KINDS, "pruning by the projector": "zoo_prune:directions=2,seed=4,keep=4"}
STEPS = 3


def torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def quanto(model):
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, exclude="*patch_embedding")  # a convolution, which it would take, too
    freeze(model)


def bitsandbytes(model):
    """Four bits in all linear layers but the head, as `load_in_4bit` has it."""
    from bitsandbytes.nn import Linear4bit

    for part in model.modules():
        for name, linear in list(part.named_children()):
            if type(linear) is nn.Linear and linear is not model.lm_head:
                made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
                made.load_state_dict(linear.state_dict())
                setattr(part, name, made.to("cpu"))


LIBRARIES = {torchao: "torchao", quanto: "optimum.quanto", bitsandbytes: "bitsandbytes"}


@pytest.fixture(scope="module", params=LIBRARIES, ids=lambda f: f.__name__)
def quantise(request):
    try:
        importlib.import_module(LIBRARIES[request.param])
    except Exception as error:
        pytest.skip(f"{LIBRARIES[request.param]} does not import here ({error}): make test-quantised")
    return request.param


@pytest.fixture(scope="module")
def quantised(quantise):
    model = tiny_llava()
    quantise(model)
    return model


@pytest.fixture(scope="module")
def unpacked(quantised):
    """Plain linear layers that compute what the quantised ones do, found by asking these for every unit vector."""
    twin = tiny_llava()
    for name, linear in list(twin.named_modules()):
        if type(linear) is nn.Linear:
            packed = quantised.get_submodule(name)
            with torch.no_grad():
                bias = packed(torch.zeros(1, linear.in_features))[0]
                linear.weight.copy_((packed(torch.eye(linear.in_features)) - bias).T)
    return twin


def says(model, spec):
    inputs = make_inputs("llava", [1, 2])
    if spec == KINDS["procedure"]:  # a decoding loop of its own, which shows no scores
        tokens = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        return tokens, torch.zeros(1)
    tokens, _, scores = greedy(model, inputs, STEPS)
    return tokens, scores.masked_fill(scores.isinf(), 0)


def test_the_weights_are_quantised(quantised, unpacked):
    """What is compared below is another model than the one that was quantised."""
    plain, twin = says(tiny_llava(), None)[1], says(unpacked, None)[1]
    found = says(quantised, None)[1]
    assert float((found[:, 0] - plain[:, 0]).abs().max()) > 1e-3 > float((found[:, 0] - twin[:, 0]).abs().max())


@pytest.mark.parametrize("kind", SPECS)
def test_a_method_does_what_it_does_on_the_unpacked_weights(quantised, unpacked, kind):
    plain = says(quantised, None)
    with vlm_fix.wrapped(quantised, SPECS[kind]):
        tokens, scores = says(quantised, SPECS[kind])
    with vlm_fix.wrapped(unpacked, SPECS[kind]):
        expected = says(unpacked, SPECS[kind])
    assert torch.equal(tokens, expected[0]) and float((scores - expected[1]).abs().max()) < 2e-3
    after = says(quantised, None)
    assert torch.equal(after[0], plain[0]) and torch.equal(after[1], plain[1]), "unwrap must restore the model"


@pytest.mark.parametrize("kind", SPECS)
def test_wrapped_and_then_quantised_is_the_same(quantise, quantised, kind):
    with vlm_fix.wrapped(quantised, SPECS[kind]):
        expected = says(quantised, SPECS[kind])
    model = tiny_llava()
    with vlm_fix.wrapped(model, SPECS[kind]):
        quantise(model)
        found = says(model, SPECS[kind])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
