"""Every method in double precision, and without a cache: the tokens it gives otherwise, or one sentence."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.cases import SPECS, named
from tests.support.models import BUILD, IMAGE, make_inputs

HOW = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}


@pytest.fixture(scope="module")
def doubled():
    """{family: the session's models in float64}."""
    made = {}
    for name, build in BUILD.items():
        made[name] = build(torch.float64)
        made[name].load_state_dict({k: v.double() for k, v in build().state_dict().items()})
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_double_precision(family, model, doubled, spec):
    inputs = make_inputs(family, [1, 2])
    with vlm_fix.wrapped(model, spec):
        expected = model.generate(**inputs, **HOW)
    with vlm_fix.wrapped(doubled[family], spec) as double:
        assert torch.equal(
            double.generate(**inputs | {"pixel_values": inputs["pixel_values"].double()}, **HOW), expected
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_without_a_cache(family, model, spec):
    inputs = make_inputs(family, [1, 2])
    with vlm_fix.wrapped(model, spec):
        expected = model.generate(**inputs, **HOW)
        if spec.startswith(("opera", "sgrs", "a_vl", "expected_attention", "knorm", "kvcompose", "razor")):
            with pytest.raises(vlm_fix.VlmFixError, match="drop use_cache=False"):
                model.generate(**inputs, **HOW, use_cache=False)
        else:
            assert torch.equal(model.generate(**inputs, **HOW, use_cache=False), expected)
