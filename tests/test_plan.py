"""Which runs an evaluation has: controls at the methods' budget, beams for equal compute, seeds only where they matter."""

import os

import pytest

from vlm_fix import registry
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import plan, runner, tasks
from vlm_fix.eval.runner import Settings

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")


@pytest.fixture(scope="module")
def model():
    return runner.load_model(MODEL)[0]


def made(model, **settings):
    asked = Settings(**{"model": MODEL, "benchmark": "pope", "limit": 2, **settings})
    return {run.name: run for run in plan.runs(asked, model, tasks.build(asked))}


def test_a_plain_evaluation_is_the_baseline_and_the_methods(model):
    assert list(made(model, methods=(("vcd",), ("pai", "hiprune")))) == ["baseline", "vcd", "pai+hiprune"]
    sampled = made(model, methods=(("vcd",),), sample=True)
    assert list(sampled) == ["baseline", "greedy", "vcd"]
    assert dict(sampled["greedy"].decoding) == {"sample": False, "num_beams": 1}


def test_controls_share_the_budget_and_the_cut_off_of_the_methods(model):
    names = list(made(model, methods=(("vcd:beta=0.2",), ("hiprune:keep=16",), ("hiprune",)), controls=True))
    assert names[:2] == ["baseline", "sampled"] and names[2:5] == ["vcd:beta=0.2", "hiprune:keep=16", "hiprune"]
    assert {"apc_only:beta=0.2", "gaussian_logits:beta=0.2", "yes_bias", "random_heads"} <= set(names)
    assert {"random_tokens:keep=16", "random_tokens:keep=0.333333", "uniform_grid:keep=16"} <= set(names)
    for name in names[2:]:
        registry.parse_spec(name)
    only_pruning = made(model, methods=(("hiprune:keep=16",),), controls=True)
    assert "apc_only" not in only_pruning and "random_tokens:keep=16" in only_pruning
    captions = made(model, methods=(("vcd",),), controls=True, benchmark="chair", variant="pattern")
    assert "yes_bias" not in captions and "apc_only:beta=0.1" in captions
    once = made(model, methods=(("apc_only:beta=0.1",), ("vcd",)), controls=True)
    assert sum(name.startswith("apc_only") for name in once) == 1


def test_a_third_of_the_tokens_is_the_same_number_for_method_and_control(model):
    names = made(model, methods=(("hiprune",),), controls=True)
    control = names["random_tokens:keep=0.333333"].stack[0]
    assert [control.budget(n) for n in (64, 576, 2880)] == [21, 192, 960]


def test_equal_compute_counts_forward_passes(model):
    assert "beams=2" in made(model, methods=(("vcd",), ("pai",)), equal_compute=True)
    both = made(model, methods=(("vcd",), ("causalmm",), ("causalmm:vision=none",)), equal_compute=True)
    assert [name for name in both if name.startswith("beams")] == ["beams=2", "beams=3"]
    assert list(made(model, methods=(("vcd",),), equal_compute=True, sample=True))[:3] == [
        "baseline",
        "greedy",
        "beams=2",
    ]
    with pytest.raises(VlmFixError, match="no method of this run takes a second forward pass"):
        made(model, methods=(("pai",), ("vcd:alpha=0",)), equal_compute=True)


def test_seeds_repeat_only_what_draws_at_random(model):
    methods = (("vcd",), ("pai",), ("random_tokens:keep=8",), ("random_tokens:keep=8,seed=5",))
    greedy = made(model, methods=methods, seeds=(3, 4))
    assert {name: run.seeds for name, run in greedy.items()} == {
        "baseline": (3,),
        "vcd": (3, 4),
        "pai": (3,),
        "random_tokens:keep=8": (3, 4),
        "random_tokens:keep=8,seed=5": (3,),
    }
    sampled = made(model, methods=methods, seeds=(3, 4), sample=True)
    assert {name for name, run in sampled.items() if run.seeds == (3,)} == {"greedy"}
    assert all(run.seeds == (0,) for run in made(model, methods=methods).values())
    with pytest.raises(VlmFixError, match="names a seed twice"):
        Settings(seeds=(1, 1))


def test_a_run_seeds_its_methods_unless_the_user_did(model):
    run = made(model, methods=(("random_tokens:keep=8",),), seeds=(3, 4))["random_tokens:keep=8"]
    fixed = made(model, methods=(("random_tokens:keep=8,seed=5",),))["random_tokens:keep=8,seed=5"]
    for each, seed, expected in ((run, 4, 4), (run, None, 0), (fixed, 4, 5)):
        with each.applied(model, seed=seed):
            assert model._vlm_fix_engine.pruner.seed == expected
    assert not hasattr(model, "_vlm_fix_engine")
    with made(model)["baseline"].applied(model, seed=1):
        assert not hasattr(model, "_vlm_fix_engine")
