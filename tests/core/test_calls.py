"""Calls: a caller's own loop, threads, stacks of every kind, rows without an image."""

from __future__ import annotations

import warnings

import pytest
import torch

import vlm_fix
from tests.support.models import BUILD, make_inputs, single
from tests.support.run import VAR_TINY, greedy
from vlm_fix.families.compat import CACHE, cache_of

EVERY = ["pai:alpha=0.5", "pai:alpha=0.5,gamma=1.3", f"var:{VAR_TINY}", "vhr", "vcd:beta=0.01", "hiprune:keep=4"]


@pytest.mark.parametrize("spec", EVERY)
def test_row_without_image_is_untouched(family, model, spec):
    """In a mixed batch a text-only prompt is generated as by the plain model (guidance and contrast see no difference)."""
    inputs = make_inputs(family, [1, 0, 2])
    tokens, logits, _ = greedy(model, inputs)
    with vlm_fix.wrapped(model, spec):
        t, l, _ = greedy(model, inputs)
    assert torch.equal(t[1], tokens[1])
    if "vcd" in spec or "gamma" in spec:  # a joined step has more rows, which moves rounding
        assert torch.allclose(l[1], logits[1], atol=1e-5)
    elif "hiprune" not in spec:  # its row is re-padded, which moves rounding
        assert torch.equal(l[1], logits[1])
    assert not torch.equal(t, tokens) or not torch.equal(l, logits) or "vcd" in spec


@pytest.mark.parametrize("spec", EVERY)
def test_own_decoding_loop(family, model, spec):
    """A caller's forward loop with the returned cache gives generate's tokens (contrast methods act in generate only)."""
    if "vcd" in spec or "gamma" in spec:
        pytest.skip("a contrast needs generate's logits processor")
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, spec):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
        with torch.no_grad():
            out, got, mask = model(**inputs), [], inputs["attention_mask"]
            for _ in range(5):
                token = out.logits[:, -1:].argmax(-1)
                got.append(int(token))
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                extra = {} if family == "qwen2_5_vl" else {"position_ids": mask.sum(1, keepdim=True) - 1}
                out = model(input_ids=token, **{CACHE: cache_of(out)}, **extra)
    assert got == expected


OUTSIDE = {
    "vcd": "vcd does not contrast",
    "pai:gamma=1.3": "pai does not contrast",
    "dola:layers=0|2": "dola does not edit the logits",
    "sgrs": "sgrs does not choose the tokens",
    "carve:black=0|0|0": "carve does not change the inputs",
}


def said(caught):
    return [
        str(w.message) for w in caught if issubclass(w.category, UserWarning) and "deprecated" not in str(w.message)
    ]


@pytest.mark.parametrize("spec", OUTSIDE)
@torch.no_grad()
def test_forwards_of_ones_own_say_what_they_go_without(family, model, spec):
    """Once, in the prompt or later; neither generate nor observe, whose forwards are their own, says so."""
    inputs, sentence = single(family, [1], 0), f"{OUTSIDE[spec]} in this forward: that is done only inside generate"
    plain = model(**inputs).logits
    with vlm_fix.wrapped(model, spec), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if "carve" not in spec:  # it wants larger images than these
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            vlm_fix.observe(model, inputs, out.sequences[0, -3:])
        assert not said(caught)
        out = model(**inputs)
        for _ in range(2):
            model(**{**inputs, "input_ids": inputs["input_ids"]})
        assert [sentence in s for s in said(caught)] == [True]
    assert torch.equal(out.logits, plain) == ("pai" not in spec)


@torch.no_grad()
def test_a_later_forward_on_generates_cache_says_it_too(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "vcd"):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        with pytest.warns(UserWarning, match="vcd does not contrast in this forward"):
            model(input_ids=out.sequences[:, -1:], **{CACHE: cache_of(out)})


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_two_models_in_two_threads(family):
    from concurrent.futures import ThreadPoolExecutor

    inputs, twins = make_inputs(family, [1, 2]), [BUILD[family](seed=s) for s in (1, 2)]
    specs = ["pai:alpha=0.5", ["vcd:beta=0.01", f"var:{VAR_TINY}"]]
    for m, s in zip(twins, specs, strict=True):
        vlm_fix.wrap(m, s)
    alone = [greedy(m, inputs)[2] for m in twins]
    with ThreadPoolExecutor(2) as pool:
        together = [
            f.result() for f in [pool.submit(lambda m=m: [greedy(m, inputs)[2] for _ in range(3)]) for m in twins]
        ]
    for a, runs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for b in runs)


@pytest.mark.filterwarnings("ignore:var changed nothing in this call")
def test_stack_of_all_kinds(family, model):
    images, stack = [1, 2, 1], ["hiprune:keep=4", f"var:{VAR_TINY}", "vhr", "pai:alpha=0.3", "vcd:beta=0.01"]
    with vlm_fix.wrapped(model, stack):
        tokens, _, _ = greedy(model, make_inputs(family, images))
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])
