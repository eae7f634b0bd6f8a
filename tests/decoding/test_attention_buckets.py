"""attention_buckets against models that were made with other bases, in float64."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.models import make_inputs, single
from tests.support.references.base import decoder, double, teacher_forced
from tests.support.run import greedy
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method

STEPS = 5


def with_base(model, ratio):
    """A float64 copy whose config has another base, and whose rotary module was made by that config."""
    twin = double(model)
    config = twin.config.get_text_config()
    config.rope_parameters = {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] * ratio}
    own = decoder(twin).rotary_emb
    decoder(twin).rotary_emb = type(own)(config=config)
    return twin


@pytest.mark.parametrize("weights", ["equal", "confidence"])
def test_scores_are_the_mean_over_models_with_other_bases(model, family, weights):
    """A batch, so that the branches join; rows alone, in which they do not."""
    bases, images = (0.02, 30.0), [1, 2]
    twins = [with_base(model, base) for base in (1.0, *bases)]
    with vlm_fix.wrapped(model, f"attention_buckets:bases=0.02|30,weights={weights}"):
        tokens, _, scores = greedy(model, make_inputs(family, images), STEPS)
        alone = [greedy(model, single(family, images, row), STEPS) for row in range(2)]
    for row in range(2):
        inputs = single(family, images, row)
        each = [teacher_forced(twin, None, inputs, tokens[row][:-1]).softmax(dim=-1) for twin in twins]
        assert float((each[0] - each[1]).abs().max()) > 1e-2, "another base must change the distribution"
        for t in range(STEPS):
            p = torch.zeros(each[0].shape[1], dtype=torch.float64)
            tops = [float(x[t].max()) if weights == "confidence" else 1.0 for x in each]
            for x, top in zip(each, tops, strict=True):
                p += x[t] * top / sum(tops)
            assert torch.allclose(scores[row, t].double().exp(), p, atol=1e-5)
            assert torch.allclose(alone[row][2][0, t].double().exp(), p, atol=1e-5)
        assert torch.equal(alone[row][0][0], tokens[row])


def test_the_model_keeps_its_base(model, family):
    buffers = {k: v.clone() for k, v in decoder(model).rotary_emb.named_buffers()}
    with vlm_fix.wrapped(model, "attention_buckets"):
        model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, do_sample=False)
    assert all(torch.equal(v, buffers[k]) for k, v in decoder(model).rotary_emb.named_buffers())


def test_a_model_without_rotary_tables_is_refused(model, family, monkeypatch):
    monkeypatch.setitem(decoder(model)._modules, "rotary_emb", torch.nn.Identity())
    with pytest.raises(VlmFixError, match="has none of its own"):
        vlm_fix.wrap(model, "attention_buckets")
    assert isinstance(vlm_fix.parse_spec("attention_buckets:bases=1.5"), Method)
