"""Rows of a left-padded batch are answered as each row alone."""

import pytest
import torch

import vlm_fix
from tests.support.cases import SPECS, named
from tests.support.models import make_inputs, single
from tests.support.run import greedy
from vlm_fix import Contrast

IMAGES = [1, 2, 1]
LIMIT = 2e-4  # nats; padding moves rounding

CONTRASTS = [s for s in SPECS if isinstance(m := vlm_fix.parse_spec(s), Contrast) and m.contrasts and m.needs_image]


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


@pytest.mark.parametrize("spec", CONTRASTS, ids=named)
def test_a_contrast_leaves_a_prompt_without_image_to_the_model(family, model, spec):
    """Its scores are the model's own logits, to the bit and on their level: nothing is cut off, raised to a power or scaled."""
    batch, alone, options = (
        make_inputs(family, [1, 0]),
        single(family, [1, 0], 1),
        {"max_new_tokens": 3, "num_beams": 3},
    )
    plain, beams = greedy(model, alone, 3), model.generate(**alone, **options, do_sample=False)[0, -3:]
    with vlm_fix.wrapped(model, spec):
        tokens, logits, scores = greedy(model, batch, 3)
        together = model.generate(**batch, **options, do_sample=False)[1, -3:]
    assert not close(scores[0], logits[0]), "the prompt with an image is to be changed"
    assert torch.equal(scores[1], logits[1])
    assert torch.equal(tokens[1], plain[0][0]) and close(scores[1], plain[2][0])
    assert torch.equal(together, beams)
