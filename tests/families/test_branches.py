"""The second branch of a contrast says, on every family, what the model itself says to that prompt."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.product import FAMILIES, answer, inputs_of, model_of, plain
from vlm_fix.call import Call
from vlm_fix.families import family_of
from vlm_fix.methods.contrast.icd import after_image
from vlm_fix.packing import by_token

TOKENS = (11, 12, 13)


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_prompt_on_the_same_images(family):
    """Image features are shared; what the family gives beside the token ids must reach the branch: kinds of tokens."""
    model, inputs = model_of(family), inputs_of(family, True)
    longer = after_image(Call(model, family_of(model), inputs), TOKENS)
    assert all(longer[k].shape == longer["input_ids"].shape != inputs["input_ids"].shape for k in by_token(inputs))
    how = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    other, own = model.generate(**longer, **how).logits[0], plain(family, True)[1][1][:, 0]
    with vlm_fix.wrapped(model, f"icd:tokens={'|'.join(map(str, TOKENS))},alpha=1,beta=0"):
        found = answer(family, True)[1][0][:, 0]
    expected = (2 * own - other).masked_fill(found.isinf(), -torch.inf).log_softmax(dim=-1)
    finite = torch.isfinite(found)
    assert float((own - other).abs().max()) > 0.1, "the instruction must matter for this test to mean anything"
    assert float((expected - found.log_softmax(dim=-1))[finite].abs().max()) < 1e-4
