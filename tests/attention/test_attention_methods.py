"""Attention methods: neutral values, stacks, known heads and sinks, refusals; `test_matrix` has their references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vlm_fix
from tests.support.models import BUILD, make_inputs, single
from tests.support.run import greedy, works_unwrapped
from vlm_fix.families.compat import CACHE, cache_of

NEUTRAL = [
    "spin:keep=1",
    "spin:epsilon=1",
    "ad_hh:threshold=1.5,head_list=0.0",
    "zerotuning:rate=1",
    "vaf:enhance=1,suppress=1",
    "avar:visual=1,system=0",
    "locore:beta=0",
    "hgai:alpha=0",
    "gift:alpha=0",
]


@pytest.mark.parametrize("spec", NEUTRAL)
def test_neutral_is_bit_identical(family, model, spec):
    inputs = make_inputs(family, [1, 2, 0])
    tokens, logits, _ = greedy(model, inputs)
    with vlm_fix.wrapped(model, spec):
        t, seen, _ = greedy(model, inputs)
    assert torch.equal(t, tokens) and torch.equal(seen, logits)


def test_stack_with_pruning_and_contrast(family, model):
    stack = ["hiprune:keep=4", "vcd:beta=0.01", "zerotuning:rate=0.2", "avar:system=0.4", "locore:beta=0.9", "hgai"]
    images, heads = [1, 2, 1], "ad_hh:threshold=0.15,head_list=0.0|1.1|3.2"
    with vlm_fix.wrapped(model, [*stack, heads, "gift:source_layer=1,layers=2-3", "spin:keep=0.5"]):
        tokens = greedy(model, make_inputs(family, images))[0]
        for row in range(3):
            assert torch.equal(greedy(model, single(family, images, row))[0][0], tokens[row])


@pytest.mark.parametrize("spec", ["gift:alpha=3,source_layer=1,layers=1-3", "gift:alpha=3,source_layer=2,layers=1-3"])
def test_gift_in_chunks(models, spec):
    """What was read between two images does not count, though it was the question until the second one came."""
    model, inputs = models["llava"], single("llava", [1, 2], 1)
    chunks = {"prefill_chunk_size": 43}  # the second image begins the second chunk
    if not works_unwrapped(model, inputs, chunks):
        pytest.skip("this version of transformers cannot chunk a prompt with images")
    with vlm_fix.wrapped(model, spec):
        whole, parts = greedy(model, inputs), greedy(model, inputs, **chunks)
    assert torch.equal(whole[0], parts[0]) and torch.allclose(whole[1], parts[1], atol=2e-4)


def test_gift_reads_the_question_of_each_turn(models, monkeypatch):
    """On a kept cache the second turn makes a map of its own text rows: the first one's shifts are gone."""
    from vlm_fix.methods.attention import gift

    model, seen, inputs = models["llava"], [], single("llava", [1], 0)
    original = gift.saliency_map

    def spy(shift, visual):
        seen.append((shift, original(shift, visual)))
        return seen[-1][1]

    monkeypatch.setattr(gift, "saliency_map", spy)
    with vlm_fix.wrapped(model, "gift:alpha=3,source_layer=1,layers=2-3"):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        mask = torch.ones_like(ids)
        model.generate(input_ids=ids, attention_mask=mask, **{CACHE: cache_of(out)}, max_new_tokens=3, do_sample=False)
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1][:, : seen[0][1].shape[1]])
    first, second = (float(shift.sum()) for shift, _ in seen)
    assert 0 < second < first, "four new rows shift less than the whole question"


def test_known_sink_dimensions():
    def dims(family, **sizes):
        arch = replace(vlm_fix.families.arch_of(BUILD["llava"]()), family=family, **sizes)
        return vlm_fix.parse_spec("var").resolve(arch).sink_dims

    by_name = {f.name: f for f in vlm_fix.families.FAMILIES}
    llama = {"text_type": "llama", "hidden": 4096, "depth": 32}
    qwen = {"text_type": "qwen2_vl_text", "hidden": 3584, "depth": 28}
    assert dims(by_name["llava"], **llama, vocab=32064) == (1415, 2533)
    assert dims(by_name["llava"], text_type="llama", hidden=5120, depth=40, vocab=32000) == (2100, 4743)
    assert dims(by_name["qwen2_vl"], **qwen, vocab=152064) == (458, 2570)
    assert dims(by_name["internvl"], **llama, vocab=92553) == (3584,)
    for unknown in (
        dims(by_name["llava"], **llama, vocab=128256),
        dims(by_name["qwen2_5_vl"], **qwen, vocab=152064),
        dims(by_name["internvl"], **llama, vocab=151674),
    ):
        assert unknown is None


def test_known_heads_are_those_of_llava():
    arch = replace(vlm_fix.families.arch_of(BUILD["llava"]()), depth=32, heads=32, vocab=32064)
    method: Any = vlm_fix.parse_spec("ad_hh").resolve(arch)
    assert len(set(method.head_list)) == 20 and method.layers[0] == 13 and method.layers[-1] == 31
    other: Any = vlm_fix.parse_spec("ad_hh").resolve(replace(arch, depth=40, heads=40))
    assert len(set(other.head_list)) == 35 and other.layers[0] == 0


def test_refusals(model):
    for spec, message in {
        "zerotuning:head_indices=0|9": "heads 0 to 3",
        "gift:source_layer=7": "layers 0 to 3",
        "vaf:enhance=-1": "at least 0",
        "ad_hh": "head_list",
        "ad_hh:head_list=1.4": "layer.head",
        "ad_hh:head_list=3": "layer.head",
    }.items():
        with pytest.raises(vlm_fix.VlmFixError, match=message):
            vlm_fix.wrap(model, spec)


@pytest.mark.parametrize("depth", [1, 2, 3, 28, 32, 40])
def test_defaults_fit_every_depth(depth):
    for build in BUILD.values():
        arch = replace(vlm_fix.families.arch_of(build()), depth=depth)
        for name in ("zerotuning", "vaf", "avar", "locore", "hgai", "gift", "spin"):
            resolved: Any = vlm_fix.parse_spec(name).resolve(arch)
            assert resolved.layers and set(resolved.layers) <= set(range(depth))
            assert not resolved.neutral
            assert vlm_fix.parse_spec(resolved.spec()) == replace(resolved, layers="|".join(map(str, resolved.layers)))
