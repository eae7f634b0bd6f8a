"""What users hand to generate beside the processor's output: merged embeddings, caches of every kind, copies of a cache."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

import vlm_fix
from tests.support.models import BUILD, IMAGE, make_inputs, single
from tests.support.run import VAR_TINY, greedy
from vlm_fix.families.compat import CACHE, cache_of, with_cache

EDITS = ["pai:alpha=0.5", "zerotuning:rate=0.1", f"var:{VAR_TINY}", "vhr", "gift:alpha=3,source_layer=1,layers=2-3",
         "icd:tokens=11|12|13,beta=0.01", "m3id:decay=0.3,beta=0.01", "sid:beta=0.01", "deco:layers=1-3", "dagcd:alpha=6",
         "decore:head_list=1.0|1.3|2.2|3.1"]  # fmt: skip
BEFORE = ["uniform_grid:keep=4", "hiprune:keep=4", "visionzip:contextual=0.4"]
INSIDE = ["fastv:keep=5", "knorm:keep=3", "a_vl:core=0.2"]


@torch.no_grad()
def merged(model, inputs):
    """The same prompt with its image features in place of pixel_values."""
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].clone())

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return {k: v for k, v in inputs.items() if k != "pixel_values"} | {"inputs_embeds": seen[0]}


@pytest.mark.parametrize("spec", EDITS, ids=lambda s: s[:40])
def test_merged_embeddings_beside_their_token_ids(family, model, spec):
    """The token ids say which columns show the image, whoever merged its features."""
    inputs = make_inputs(family, [1, 2])
    given = merged(model, inputs)
    with vlm_fix.wrapped(model, spec):
        theirs, ours = (
            greedy(model, inputs, 4, suppress_tokens=[IMAGE]),
            greedy(model, given, 4, suppress_tokens=[IMAGE]),
        )
        assert torch.equal(ours[0], theirs[0]) and torch.allclose(ours[1], theirs[1], atol=1e-4)
        beams = {"num_beams": 2, "do_sample": False, "max_new_tokens": 3, "suppress_tokens": [IMAGE]}
        if family == "llava":  # transformers expands no grids of Qwen's that go with embeddings
            assert torch.equal(model.generate(**given, **beams), model.generate(**inputs, **beams))


@pytest.mark.parametrize("spec", ["pai:alpha=0.5", "vhr", "vcd"])
@torch.no_grad()
def test_merged_embeddings_alone_are_said_to_hide_the_images(family, model, spec):
    """A forward of one's own cannot tell them from text, and does not call them so."""
    inputs = single(family, [1, 2], 1)
    given, plain = merged(model, inputs), model(**inputs).logits
    del given["input_ids"]
    with vlm_fix.wrapped(model, spec), pytest.warns(UserWarning) as caught:
        assert torch.allclose(model(**given).logits, plain, atol=1e-5) or family == "qwen2_5_vl"  # its places need ids
    said = [str(w.message) for w in caught]
    assert any("inputs_embeds alone hide where the images are; pass input_ids and pixel_values" in s for s in said)
    assert not any("no prompt contains an image token" in s for s in said)


@pytest.mark.parametrize("spec", ["vcd", *BEFORE[1:], "paint"])
def test_what_reads_pixels_says_so_of_merged_embeddings(family, model, spec):
    given = merged(model, make_inputs(family, [1, 2]))
    with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match="pixel_values"):
        model.generate(**given, max_new_tokens=2)


@pytest.mark.parametrize("spec", [*BEFORE, *INSIDE])
def test_a_dynamic_cache_by_name_is_the_default(family, model, spec):
    inputs = make_inputs(family, [1, 2])
    with vlm_fix.wrapped(model, spec):
        default = greedy(model, inputs, 3)
        assert all(map(torch.equal, greedy(model, inputs, 3, cache_implementation="dynamic"), default))


def quantized(model):
    return QuantizedCache(backend="fp8", config=model.config.get_text_config())


FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


@torch.no_grad()
@pytest.mark.parametrize("spec", BEFORE)
def test_pruners_before_the_language_model_with_a_quantized_cache(family, model, spec):
    """The pruned prompt, read by the language model alone into such a cache."""
    inputs, seen = single(family, [1, 2], 1), []
    with vlm_fix.wrapped(model, spec):
        logits = greedy(model, inputs, 4, **FP8)[1]
        hook = model.model.language_model.register_forward_pre_hook(
            lambda m, a, k: seen.append(k), with_kwargs=True)  # fmt: skip
        greedy(model, inputs, 4, **FP8)
        hook.remove()
    cache = quantized(model)
    for t, given in enumerate(seen):
        given = {k: v for k, v in with_cache(given, cache).items() if k != "attention_mask"}
        hidden = model.model.language_model(**given).last_hidden_state
        assert torch.allclose(model.lm_head(hidden[0, -1]), logits[0, t], atol=1e-4)
    exact = greedy(model, inputs, 1)[1]
    assert not torch.equal(exact[0, 0], logits[0, 0]), "nothing was pruned"


@pytest.mark.parametrize("spec", INSIDE)
@pytest.mark.parametrize(
    ("kind", "why"), [("quantized", "holds codes"), ("offloaded", "leave the device"), ("static", "a static")]
)
def test_pruners_inside_say_why_they_refuse_a_cache(family, model, spec, kind, why):
    with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match=why):
        model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, cache_implementation=kind)


EMPTY = ["hiprune:keep=4", "fastv:keep=5", "knorm:keep=3", "sgrs", "opera"]


@pytest.mark.parametrize("spec", EMPTY)
@pytest.mark.parametrize("configured", [False, True])
def test_an_empty_cache_is_no_earlier_turn(family, model, spec, configured):
    """The caller's own DynamicCache, with nothing in it yet: as if generate had made it, which then holds the answer."""
    inputs, how = single(family, [1, 2], 1), {"max_new_tokens": 4, "do_sample": False}
    with vlm_fix.wrapped(model, spec):
        cache = DynamicCache(config=model.config.get_text_config()) if configured else DynamicCache()
        expected = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, **{CACHE: cache}), expected)
        assert cache.get_seq_length()
        with pytest.raises(vlm_fix.VlmFixError, match="a cache of an earlier turn"):
            model.generate(**inputs, **how, **{CACHE: cache})


@pytest.mark.parametrize("spec", EMPTY)
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda config: StaticCache(config=config, max_cache_len=128), "static"),
        (lambda config: DynamicCache(config=config, offloading=True), "offloaded"),
        (lambda config: QuantizedCache(config=config, backend="fp8"), "quantized"),
    ],
)
def test_an_empty_cache_of_another_kind_is_refused_by_its_kind(family, model, spec, make, why):
    if spec == EMPTY[0]:
        pytest.skip("a pruner before the decoder never looks into the cache")
    with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match=why):
        model.generate(**make_inputs(family, [1, 2]), max_new_tokens=2, **{CACHE: make(model.config.get_text_config())})


@pytest.mark.parametrize("spec", ["icd:tokens=11|12|13,beta=0", "sid:beta=0", "decore:head_list=1.0|3.1", "vcd:beta=0"])
def test_contrasts_share_no_codes_of_a_quantized_cache(family, model, spec):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, spec):
        default, ours = greedy(model, inputs, 1), greedy(model, inputs, 3, **FP8)
    assert torch.allclose(ours[2][:, 0], default[2][:, 0], atol=1e-4) and torch.isfinite(ours[2].amax(-1)).all()


@torch.no_grad()
@pytest.mark.parametrize("spec", [*EDITS[:5], "fastv:keep=5"])
def test_a_copied_prefix_goes_on_as_the_prefix(family, model, spec):
    """One prefix, read once; each question goes on from a copy of its cache, edited like the prefix itself."""
    inputs, questions = single(family, [1, 2], 1), [torch.tensor([[11, 12, 13]]), torch.tensor([[44, 17]])]
    with vlm_fix.wrapped(model, spec):

        def answer(cache, question):
            return model(input_ids=question, **{CACHE: cache}).logits[0, -1]

        expected = [answer(cache_of(model(**inputs, use_cache=True)), q) for q in questions]
        prefix = cache_of(model(**inputs, use_cache=True))
        for question, theirs in zip(questions, expected, strict=True):
            assert torch.allclose(answer(copy.deepcopy(prefix), question), theirs, atol=1e-5)
        assert torch.allclose(answer(prefix, questions[0]), expected[0], atol=1e-5)


@torch.no_grad()
def test_a_cache_takes_its_session_along_and_nothing_else(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "pai"):
        cache = cache_of(model(**inputs, use_cache=True))
        assert len(pickle.dumps(cache)) < 2**20, "a pickled cache must not hold the model"
        stranger = pickle.loads(pickle.dumps(cache))
        with pytest.raises(vlm_fix.VlmFixError, match="while the model was not wrapped"):
            model(input_ids=torch.tensor([[5]]), **{CACHE: stranger})
        session = weakref.ref(model._vlm_fix_engine.sessions[cache])
        del cache
        gc.collect()
        assert session() is None, "a session ends with its cache"


def test_two_models_that_share_a_config(family):
    """Each is edited alone, in any order of wrap and unwrap, and both are as before in the end."""
    first, second = BUILD[family](), BUILD[family](seed=1)
    second.config = first.config
    for one, other in zip(first.modules(), second.modules(), strict=True):
        if hasattr(one, "config"):
            other.config = one.config
    inputs = make_inputs(family, [1, 2])
    plain = [greedy(m, inputs, 3)[1] for m in (first, second)]
    edited = []
    for model in (first, second):
        with vlm_fix.wrapped(model, "pai:alpha=0.5"):
            edited.append(greedy(model, inputs, 3)[1])
    for order in ((first, second), (second, first)):
        vlm_fix.wrap(first, "pai:alpha=0.5")
        assert torch.equal(greedy(second, inputs, 3)[1], plain[1])
        vlm_fix.wrap(second, "pai:alpha=0.5")
        assert all(torch.equal(greedy(m, inputs, 3)[1], e) for m, e in zip((first, second), edited, strict=True))
        vlm_fix.unwrap(order[0])
        left = order[1]
        assert torch.equal(greedy(left, inputs, 3)[1], edited[left is second])
        assert torch.equal(greedy(order[0], inputs, 3)[1], plain[order[0] is second])
        vlm_fix.unwrap(left)
        assert first.config.get_text_config()._attn_implementation == "sdpa"
        assert all(torch.equal(greedy(m, inputs, 3)[1], p) for m, p in zip((first, second), plain, strict=True))


@pytest.mark.parametrize("spec", ["icd:tokens=11|12|13,beta=0.01", "dola:layers=0|2"])
def test_logits_beside_bare_forwards_in_another_thread(family, model, spec):
    """A call's branches and hidden states are those of its own sessions: others may come and go."""
    inputs, stop, failed = single(family, [1, 2], 1), threading.Event(), []
    other = single(family, [1, 2], 1, seed=3)
    with vlm_fix.wrapped(model, spec):
        expected = greedy(model, inputs, 4)[0]

        def forwards():
            kept = []
            while not stop.is_set():
                with torch.no_grad():
                    kept.append(cache_of(model(**other, use_cache=True)))

        thread = threading.Thread(target=forwards)
        thread.start()
        try:
            failed += [1 for _ in range(4) if not torch.equal(greedy(model, inputs, 4)[0], expected)]
        finally:
            stop.set()
            thread.join()
    assert not failed


@pytest.mark.parametrize("cut", [0, 2])
def test_a_cache_that_is_cut_back_through_its_image_has_none(family, model, cut):
    """What follows is text alone: the model's own logits; where the image stays, the edit acts as on a cache never longer."""
    whole = single(family, [1], 0)
    ids = whole["input_ids"]
    kept = ids.shape[1] - cut if cut else int((ids[0] == IMAGE).nonzero()[0])
    text = torch.tensor([[5, 6, 7, 8]])
    outs = []
    for edited in (False, True):
        with torch.no_grad(), vlm_fix.wrapped(model, "pai:alpha=3") if edited else contextlib.nullcontext():
            cache = cache_of(model(**whole, use_cache=True))
            cache.crop(kept - ids.shape[1])
            places = torch.arange(kept, kept + 4)[None]
            outs.append(model(input_ids=text, position_ids=places, use_cache=True, **{CACHE: cache}).logits)
    assert torch.equal(*outs) == (not cut)
