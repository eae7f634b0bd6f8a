"""The next turn on a kept cache, with or without a new image, against the whole conversation as one prompt; drafts.

The edits are in the last layer, so that the first turn leaves no trace of them in the cache: both must be equal.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, single
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix import launches
from vlm_fix.families.compat import CACHE, cache_of

EQUAL = [
    "pai:alpha=0.5,layers=3",
    "hgai:alpha=0.8,layers=3",
    "vaf:enhance=1.6,suppress=0.5,layers=3",
    "avar:visual=1.5,system=0.4,layers=3",
    "zerotuning:rate=0.2,layers=3",
    "locore:beta=0.9,layers=3",
    "spin:keep=0.5,layers=3",
    "ad_hh:threshold=0.1,head_list=3.0|3.1|3.2",
    "head_pursuit:head_list=3.0|3.2",
    "vhr:layers=3",
    "random_heads:layers=3",
    "paint:layers=3",
]
READERS = ["gift:alpha=3,source_layer=2,layers=3", "gift:alpha=3,source_layer=3,layers=3"]  # of what follows the image
VAR = "var:sink_dims=3|17|40,tau=1.5,min_visual_mass=0,rho=0,p=0.9,layers=3"


def conversation(family, model, second_image):
    """-> (first turn's inputs, the conversation as one prompt, the second turn alone) with the cache of the first."""
    first, second = single(family, [1], 0), single(family, [int(second_image)], 0, seed=5)
    out = model.generate(
        **first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, suppress_tokens=[IMAGE]
    )
    ids = torch.cat([out.sequences, second["input_ids"][:, 1:]], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "qwen2_5_vl":
        turn["mm_token_type_ids"] = (ids == IMAGE).int()
    images = {k: first[k] for k in ("pixel_values", "image_grid_thw") if k in first}
    new = {"pixel_values": second["pixel_values"]} if second_image else {}
    whole = {**turn, **images, **{k: torch.cat([images[k], new[k]]) for k in new}}
    return first["input_ids"].shape[1], whole, {**turn, **new, CACHE: cache_of(out)}


def both(family, model, spec, second_image):
    """-> the first prompt's length, the conversation's inputs, (tokens, logits) of it and of the second turn alone."""
    with vlm_fix.wrapped(model, spec):
        n, whole, turn = conversation(family, model, second_image)
        return n, whole, *(greedy(model, inputs, 5, suppress_tokens=[IMAGE])[:2] for inputs in (whole, turn))


@pytest.mark.parametrize(
    "spec, second_image", [*itertools.product(EQUAL, (False, True)), *((s, True) for s in READERS)]
)
def test_second_turn_equals_whole_conversation(family, model, spec, second_image):
    if second_image and family == "qwen2_5_vl":
        pytest.skip("transformers itself cannot place a new image on a kept cache here")
    _, inputs, whole, turn = both(family, model, spec, second_image)
    plain = greedy(model, inputs, 5, suppress_tokens=[IMAGE])[1]
    assert not torch.allclose(plain, whole[1], atol=1e-3), "the edit must matter for this test to mean anything"
    assert torch.equal(whole[0], turn[0]) and torch.allclose(whole[1], turn[1], atol=2e-4)


LAUNCHED = (
    "act:threshold=0.06,beta=0.1,layers=3",
    "var:tau=2,min_visual_mass=0.1,rho=0.2,p=0.9,layers=3",
    "tame:layers=3",
)


@pytest.mark.parametrize("spec", (*LAUNCHED, "ad_hh:threshold=0.15,head_list=3.0|3.1|3.2", "visual_topk:k=5,layers=3"))
def test_a_second_turn_in_one_launch_equals_the_row_kernel(models, spec):
    """What was made ahead for the answer's rows is made anew for those of the next turn."""
    found = []
    for launched in (False, True):
        before = launches.use(launched)
        try:
            with vlm_fix.wrapped(models["llava"], spec):
                found.append(greedy(models["llava"], conversation("llava", models["llava"], False)[2], 4)[1])
        finally:
            launches.use(before)
    assert error(found[1], found[0].double()) < 1e-5


def test_cca_refuses_a_new_image_on_a_kept_cache(models):
    model = models["llava"]
    with vlm_fix.wrapped(model, "cca"):
        turn = conversation("llava", model, True)[2]
        with pytest.raises(vlm_fix.VlmFixError, match="for a new image pass all of it, without the kept cache"):
            model.generate(**turn, max_new_tokens=2)


@dataclass
class Answered(ref.VarReference):
    """Tokens that were generated in the first turn are no sinks: they were never tested."""

    answer: tuple = ()

    def sinks(self, layer):
        return [j for j in super().sinks(layer) if j not in self.answer]


@pytest.mark.parametrize("second_image", [False, True])
def test_var_keeps_each_turn_in_its_columns(family, model, second_image):
    if second_image and family == "qwen2_5_vl":
        pytest.skip("transformers itself cannot place a new image on a kept cache here")
    n, inputs, _, turn = both(family, model, VAR, second_image)
    ids, twin = inputs["input_ids"], ref.double(model)
    run = Answered(
        ref.visual_columns(ids), ids.shape[1], [3], dims=(3, 17, 40), tau=1.5, rho=0, p=0.9, min_visual_mass=0
    )
    run.answer = tuple(range(n, n + 4))  # the fifth token enters the cache with the second turn
    expected = ref.teacher_forced(twin, run, inputs, turn[0][0, :-1])
    late = [j for j in run.sinks(3) if j >= n + 4]
    assert late and run.hits > 5 and run.margin > 1e-6
    assert error(turn[1][0], expected) < 1e-5


def test_gift_previews_a_second_turn(family, model):
    """A map from a pass of its own, on a copy of the kept cache: two more tokens of the turn see what they saw without it."""
    n, _, _, turn = both(family, model, "gift:alpha=3,source_layer=2,layers=1", False)
    with vlm_fix.wrapped(model, "gift:alpha=3,source_layer=2,layers=1") as wrapped:
        cache = conversation(family, wrapped, False)[2][CACHE]
        assert cache.get_seq_length() == n + 4
        again = conversation(family, wrapped, False)[2]
        assert torch.equal(greedy(wrapped, again, 5, suppress_tokens=[IMAGE])[1], turn[1])
        assert again[CACHE].get_seq_length() == again["input_ids"].shape[1] + 4
    with vlm_fix.wrapped(model, "gift:alpha=0.001,source_layer=2,layers=1"):
        weak = greedy(model, conversation(family, model, False)[2], 5, suppress_tokens=[IMAGE])
    assert not torch.allclose(weak[1], turn[1], atol=1e-3)


def repeating(family, seed):
    """A prompt that ends in its own last three tokens again, so that prompt lookup drafts at once."""
    inputs = single(family, [1], 0, seed=seed)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -3:]], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


@pytest.mark.parametrize("spec", ["vhr", "vhr:prompt_rows=all"])
def test_vhr_chooses_by_the_prompts_last_row_beside_drafts(family, model, spec, monkeypatch):
    from vlm_fix.methods.heads.vhr import VHR

    chosen, rows = [], []
    choose, heads = VHR.choose, VHR.edit_heads
    monkeypatch.setattr(VHR, "choose", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    monkeypatch.setattr(VHR, "edit_heads", lambda *a: rows.append(a[1].shape[2]) or heads(*a))
    with vlm_fix.wrapped(model, spec):
        for seed in range(3):
            inputs, found = repeating(family, seed), []
            for option in ({}, {"prompt_lookup_num_tokens": 4}):
                tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, **option)
                found.append((tokens, torch.stack(chosen[:3]), rows[0]))
                chosen.clear(), rows.clear()
            (tokens, heads_of, first), (again, beside_drafts, more) = found
            assert more > first, "the first forward must hold drafts for this test to mean anything"
            assert torch.equal(heads_of, beside_drafts) and torch.equal(tokens, again)


def test_vhr_on_all_rows_needs_the_whole_prompt(models):
    model, inputs = models["llava"], single("llava", [1], 0)
    with (
        vlm_fix.wrapped(model, "vhr:prompt_rows=all"),
        pytest.raises(vlm_fix.VlmFixError, match="prompt_rows=all needs the whole prompt.*drop prefill_chunk_size"),
    ):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=11)
