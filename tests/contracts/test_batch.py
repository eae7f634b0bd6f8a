"""Rows of a left-padded batch are answered as each row alone."""

import pytest
import torch

import vlm_fix
from tests.support.cases import SPECS, named
from tests.support.models import make_inputs, single
from tests.support.run import greedy

IMAGES = [1, 2, 1]
LIMIT = 2e-4  # nats; padding moves rounding


def close(ours, theirs):
    """Cut tokens are the same, all others differ by rounding."""
    finite = ~torch.isinf(theirs)
    return torch.equal(finite, ~torch.isinf(ours)) and float((ours - theirs)[finite].abs().max()) < LIMIT


@pytest.mark.parametrize("spec", [spec for spec, case in SPECS.items() if case.scores], ids=named)
def test_rows_of_a_batch_equal_single_prompts(family, model, spec):
    with vlm_fix.wrapped(model, spec):
        tokens, logits, scores = greedy(model, make_inputs(family, IMAGES), 5)
        for row in range(len(IMAGES)):
            t, raw, s = greedy(model, single(family, IMAGES, row), 5)
            assert torch.equal(t[0], tokens[row]), f"row {row} has other tokens than alone"
            assert close(raw[0], logits[row]), f"row {row} has other logits than alone"
            assert close(s[0], scores[row]), f"row {row} has other scores than alone"


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_beams_of_a_batch_equal_single_prompts_or_are_refused(family, model, spec):
    options, refused = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}, SPECS[spec].refuses.get("num_beams")
    with vlm_fix.wrapped(model, spec):
        if refused:
            with pytest.raises(vlm_fix.VlmFixError, match=refused):
                model.generate(**make_inputs(family, IMAGES), **options)
            return
        beams = model.generate(**make_inputs(family, IMAGES), **options)[:, -4:]
        for row in range(len(IMAGES)):
            alone = model.generate(**single(family, IMAGES, row), **options)[0, -4:]
            assert torch.equal(alone, beams[row]), f"row {row} has other beams than alone"


@pytest.mark.parametrize("spec", [spec for spec, case in SPECS.items() if not case.scores], ids=named)
def test_loops_of_a_batch_equal_single_prompts(family, model, spec):
    options = {"max_new_tokens": 5, "do_sample": False}
    with vlm_fix.wrapped(model, spec):
        together = model.generate(**make_inputs(family, IMAGES), **options)[:, -5:]
        for row in range(len(IMAGES)):
            alone = model.generate(**single(family, IMAGES, row), **options)[0, -5:]
            assert torch.equal(alone, together[row]), f"row {row} has other tokens than alone"
