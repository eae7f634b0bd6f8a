"""Calls do not see each other, and `unwrap` leaves nothing behind."""

import pytest
import torch

import vlm_fix
from tests.support.cases import SPECS, named
from tests.support.models import make_inputs
from tests.support.run import greedy

PRUNERS = {m.name for m in vlm_fix.list_methods() if m.kind == "pruning"}
CELLS = [(spec, torch.float32) for spec in SPECS] + [
    (spec, torch.bfloat16) for spec, case in SPECS.items() if case.method in PRUNERS
]


def answers(model, inputs, case):
    """Tokens, and where the method returns them logits and scores, of three steps."""
    if case.scores:
        return greedy(model, inputs, 3)
    return (model.generate(**inputs, max_new_tokens=3, do_sample=False),)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def everything(model):
    """What a method might leave on a model."""
    kept = {}
    for name, module in model.named_modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
        kept[name] = (sorted(vars(module)), [list(h) for h in hooks], module.forward.__func__, module.training)
    configs = (model.config, model.config.get_text_config(), model.config.vision_config)
    kept["configs"] = [(c._attn_implementation, c.to_dict()) for c in configs], model.generation_config.to_dict()
    kept["generate"] = model.generate.__func__
    return kept


@pytest.mark.parametrize(
    ("spec", "dtype"), CELLS, ids=[f"{named(s)}-{'bf16' if '16' in str(d) else 'fp32'}" for s, d in CELLS]
)
def test_calls_do_not_see_each_other_and_unwrap_restores_every_bit(family, models, half_models, spec, dtype):
    case, model = SPECS[spec], (models if dtype == torch.float32 else half_models)[family]
    a, b = make_inputs(family, [1, 2], seed=1, dtype=dtype), make_inputs(family, [2], seed=2, dtype=dtype)
    before, found = answers(model, a, case), everything(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        vlm_fix.wrap(model, spec)
        first, other, again = (answers(model, inputs, case) for inputs in (a, b, a))
        assert same(first, again), "the second run of a prompt differs: state survived a call"
        assert same(first, before) != case.effect, "the spec must change the answer, else restoring shows nothing"
        vlm_fix.unwrap(model)
        vlm_fix.wrap(model, spec)
        assert same(answers(model, b, case), other), "the order of prompts matters: state leaked between calls"
    finally:
        vlm_fix.unwrap(model)
    assert everything(model) == found, "attributes, hooks or configuration stayed on the model"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "weights changed"
    assert same(answers(model, a, case), before), "the unwrapped model answers otherwise than before"


@pytest.mark.parametrize("spec", ["baseline", "vcd:beta=0.01", "hiprune:keep=4"])
def test_generate_that_the_user_put_on_the_instance_is_called_and_comes_back(models, spec):
    model, calls = models["llava"], []

    def generate(*args, **kwargs):
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    inputs = make_inputs("llava", [1])
    vars(model)["generate"] = generate
    try:
        with vlm_fix.wrapped(model, spec):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert len(calls) == 1, "the wrapped model goes past the instance's own generate"
        assert vars(model)["generate"] is generate, "unwrap took the instance's own generate away"
    finally:
        vars(model).pop("generate")
