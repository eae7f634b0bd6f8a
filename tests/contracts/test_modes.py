"""Every mode of `generate` gives the same tokens, or one sentence that says why it cannot."""

import pytest
import torch

import vlm_fix
from tests.support.cases import SPECS, named
from tests.support.models import make_inputs, single
from tests.support.run import OPTIONS, Streamed, works

pytestmark = pytest.mark.parametrize("spec", SPECS, ids=named)


def refused(model, inputs, sentence, **options):
    with pytest.raises(vlm_fix.VlmFixError, match=sentence) as caught:
        model.generate(**inputs, max_new_tokens=3, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("."), "a refusal is one sentence"


def test_static_caches_chunks_and_drafts_agree_or_are_refused(family, model, spec):
    inputs, case = single(family, [1, 2], 1), SPECS[spec]
    with vlm_fix.wrapped(model, spec):
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for number, option in enumerate(OPTIONS):
            (name,) = option
            if name in case.refuses:
                refused(model, inputs, case.refuses[name], do_sample=False, **option)
            elif works(family, number):
                got = model.generate(**inputs, max_new_tokens=6, do_sample=False, **option)
                assert torch.equal(got, plain), f"{name} changes the tokens"
        again = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(again, plain), "a prompt that was run before is answered otherwise"


def test_seeded_samples_repeat_or_are_refused(family, model, spec):
    inputs, case, runs = make_inputs(family, [1, 2]), SPECS[spec], []
    with vlm_fix.wrapped(model, spec):
        if "num_return_sequences" in case.refuses:
            refused(model, inputs, case.refuses["num_return_sequences"], num_return_sequences=2)
            if "do_sample" in case.refuses:
                refused(model, inputs, case.refuses["do_sample"], do_sample=True)
            return
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(model.generate(**inputs, max_new_tokens=5, do_sample=True, num_return_sequences=2))
    assert torch.equal(*runs), "the same seed draws other tokens"
    assert len(runs[0]) == 4


def test_streamed_tokens_are_those_returned_or_streaming_is_refused(family, model, spec):
    inputs, case, streamer = single(family, [1, 2], 0), SPECS[spec], Streamed()
    with vlm_fix.wrapped(model, spec):
        if "streamer" in case.refuses:
            return refused(model, inputs, case.refuses["streamer"], streamer=streamer)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended
