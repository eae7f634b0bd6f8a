"""Gradients through a wrapped model are the same with gradient checkpointing as without."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vlm_fix
from tests.support.cases import SPECS
from tests.support.models import make_inputs
from vlm_fix.pruning.kinds import CachePruner

TRAINED = [  # pruners of caches need one, and control_mllm refuses to be trained through
    s for s in SPECS if not isinstance(vlm_fix.parse_spec(s), CachePruner) and not s.startswith("control_mllm")
]
HANDS_ON = (
    "gift",
    "iri",
    "memvr",
    "pade",
    "rudder",
    "random_reminder",
)  # what they read before a layer or in one is used inside others, with its gradient
FUNCTION = "_gradient_checkpointing_func"


def gradients(model, inputs, reentrant=None):
    """Name -> gradient of a loss on the last rows; reentrant: the kind of checkpointing, None without any."""
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    model.train()
    try:
        model.zero_grad()
        model(**inputs).logits[:, -3:].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        hook.remove()
        model.eval()
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=2e-5), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", TRAINED, ids=lambda s: s[:60])
def test_gradients_equal_those_without(family, model, spec):
    inputs = make_inputs(family, [1, 2])
    plain = gradients(model, inputs)
    with vlm_fix.wrapped(model, spec):
        expected = gradients(model, inputs)
        same(gradients(model, inputs, reentrant=False), expected)
        if spec.startswith(HANDS_ON):
            with pytest.raises(vlm_fix.VlmFixError, match="use_reentrant"):
                gradients(model, inputs, reentrant=True)
        else:
            same(gradients(model, inputs, reentrant=True), expected)
    assert expected.keys() == plain.keys(), "an edit must not cut the graph"
    same(gradients(model, inputs), plain)


@pytest.mark.filterwarnings("ignore")
def test_several_forwards_before_one_backward(family, model):
    """Each layer is computed again with the session of its own forward."""
    spec, batches = "fastv:keep=5", [make_inputs(family, [1, 2]), make_inputs(family, [2], seed=5)]

    def total(**kwargs):
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.train()
        model.zero_grad()
        sum(model(**inputs).logits[:, -3:].square().mean() for inputs in batches).backward()
        model.eval()
        model.gradient_checkpointing_disable()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with vlm_fix.wrapped(model, spec):
        same(total(use_reentrant=False), total())
    model.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore")
def test_unwrap_and_copies_leave_transformers_own_function(family, model):
    inputs = make_inputs(family, [1, 2])
    model.gradient_checkpointing_enable()
    try:
        before = [vars(layer).get(FUNCTION) for layer in model.model.language_model.layers]
        vlm_fix.wrap(model, "pai:alpha=0.5")
        model.train()
        model(**inputs)
        twin = vlm_fix.unwrap(copy.deepcopy(model))
        assert not any("vlm_fix" in str(type(vars(layer).get(FUNCTION))) for layer in twin.model.language_model.layers)
        vlm_fix.unwrap(model)
        assert [vars(layer).get(FUNCTION) for layer in model.model.language_model.layers] == before
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def test_checkpointing_of_another_kind_is_an_error(family, model):
    """A layer that the caller checkpoints itself would be computed again without its edit."""
    attn, inputs = model.model.language_model.layers[2].self_attn, make_inputs(family, [1, 2])
    attn.forward = functools.partial(checkpoint, type(attn).forward.__get__(attn), use_reentrant=False)
    try:
        with vlm_fix.wrapped(model, "pai:alpha=0.5"), pytest.raises(vlm_fix.VlmFixError, match="of this kind"):
            gradients(model, inputs)
    finally:
        del attn.forward
