"""Methods on a pretended accelerator: the CPU's tokens, and no more operations, syncs and copies than the budget allows.

A run of the suite counts a quarter of the methods (`product.chosen_part`; VLM_FIX_PRODUCT=all: every one).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from tests.deployment.counted import BUDGET, FAMILIES, PARTS, extras, specs_of
from tests.support.cases import named
from tests.support.paths import ROOT
from tests.support.product import chosen_part
from vlm_fix.registry import get_method

OTHERS = FAMILIES[1:]
PART = chosen_part()
OTHER = OTHERS[(PART or 0) % len(OTHERS)]
WHERE = [(family, spec) for family in (FAMILIES[0], OTHER) for spec in specs_of(family, PART)]


BOUNDS = {  # of the budget's "layer"
    "attention": 1.10,
    "heads": 1.05,
    "hidden": 1.05,
    "contrast": 1.10,
    "logits": 1.05,
    "pruning": 1.0,
    "control": 1.10,
    "procedure": 1.05,
}
OVER = {  # methods that cost more, or wait, in decode steps, and why
    "a_vl": "it moves columns between two stores",
    "ascd": "a branch that ranks the image columns of each head",
    "attention_buckets": "three branches instead of two",
    "causalmm": "its second branch's layers have weights of their own",
    "crops": "a branch for each crop",
    "dagcd": "a loop over the words that are weighed",
    "decore": "an edited branch, and the preparation of its forward in the same layer",
    "draft": "several rows at once, in a loop",
    "farsight": "registers beside each row's columns, in every layer",
    "gaussian_logits": "its noise is drawn on the host",
    "hulluedit": "a decomposition of each step's states",
    "layercake": "a branch that hides columns by a mask of its own",
    "memvr": "a language head in each layer",
    "opera": "a loop over beams, which reads weights",
    "owl": "its branches change weights that are read first",
    "pade": "a memory of the layers before, and a median in each head",
    "pine": "keys are put in another order for each row",
    "random_reminder": "what rudder does, and once more for its length",
    "rudder": "its one layer also prepares the forward: four operations a token",
    "sgrs": "a loop over candidates",
    "sid": "a branch with other columns in later layers",
    "spin": "two launches, as it asks for all heads' scores first",
}


@functools.cache
def outcome(family):
    """What one process printed: a device in Python stays registered in the process that asks for it."""
    part = [] if PART is None else [str(PART)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.deployment.counted", family, *part],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if "skip" in found:
        pytest.skip(found["skip"])
    return found


@pytest.mark.parametrize("family, spec", WHERE, ids=[f"{family}-{named(spec)}" for family, spec in WHERE])
def test_a_device_gives_the_tokens_of_the_cpu(family, spec):
    assert not outcome(family)[spec]["error"], outcome(family)[spec]["error"]


def test_every_method_is_within_its_budget():
    """A method that costs more than its budget is slower on an accelerator than it was; what costs less: write it anew."""
    budget = json.loads(BUDGET.read_text())
    found = extras(outcome(FAMILIES[0]))
    assert found.keys() <= budget.keys(), "python -m tests.deployment.counted budget METHOD"
    over = {
        f"{method}: {what}": (cost, budget[method][what])
        for method, costs in found.items()
        for what, cost in costs.items()
        if cost > budget[method][what] * (1 + 1e-6) + 0.005
    }
    assert not over, f"more than the budget allows (found, allowed): {over}"


def test_budgets_keep_the_bounds_of_their_kind():
    """Operations of an edited layer beside the plain model's, a launch of our own kernels counted as the one it is."""
    over = {}
    for method, cost in json.loads(BUDGET.read_text()).items():
        kind = get_method(method).kind
        if cost["layer"] > BOUNDS[kind] or cost["syncs"] > 0 or cost["copies"] > 0:
            over[method] = cost
    assert over.keys() == OVER.keys(), over


def test_parts_count_every_method_once():
    whole = specs_of(FAMILIES[0])
    parts = [spec for part in range(PARTS) for spec in specs_of(FAMILIES[0], part)]
    assert sorted(whole) == sorted({*parts}) and len(parts) == len(whole) + PARTS - 1
