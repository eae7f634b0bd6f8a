"""A reduced matrix for every supported transformers: `make test-oldest` and `make test-newest` run it with `test_doctor`.

Two families, one method of each kind, the decoding modes. A mode that the plain model of a version does not manage by
itself is skipped with that reason: what vlm-fix adds cannot be judged there.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

import vlm_fix
from tests.support.models import make_inputs, single
from vlm_fix.families import compat

RATES = "0.9|0.6|0.4|0.2"
KINDS = {
    "attention": "pai:alpha=1",
    "heads": "vhr:alpha=3",
    "hidden states": f"iri:lambda_a=2,lambda_m=2,rr_attention={RATES},rr_mlp={RATES}",
    "contrast": "vcd:alpha=2,beta=0.01",
    "logits": "dola:alpha=2,beta=0.01",
    "pruning before the LM": "hiprune:keep=4",
    "pruning in layers": "fastv:keep=4",
    "pruning of the cache": "knorm:keep=0.25",
}
LOOPS = {"procedure": "sgrs"}
SHORTENS = ("hiprune", "fastv", "knorm")
MODES = {
    "static cache": {"cache_implementation": "static"},
    "chunked prompt": {"prefill_chunk_size": 11},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def answer(model, inputs, **how):
    """-> new tokens, and the logits before and after processors, stacked over steps."""
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **how,
    )
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1), torch.stack(out.scores, 1)


def tokens(model, inputs, **how):
    return model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False, **how})[:, -STEPS:]


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_acts_leaves_no_state_and_comes_off_exactly(family, model, kind):
    inputs, other = make_inputs(family, [1, 2]), make_inputs(family, [1], seed=3)
    plain = answer(model, inputs)
    with vlm_fix.wrapped(model, KINDS[kind]):
        first = answer(model, inputs)
        answer(model, other)
        again = answer(model, inputs)
    assert not same(first, plain), f"{KINDS[kind]} changed nothing"
    assert same(first, again), "a second run of the same prompt differs"
    assert same(answer(model, inputs), plain), "unwrap did not restore the model"


@pytest.mark.parametrize("kind", LOOPS)
def test_a_decoding_loop_acts_and_comes_off_exactly(family, model, kind):
    inputs = single(family, [1], 0)
    plain = answer(model, inputs)
    with vlm_fix.wrapped(model, LOOPS[kind]):
        first, again = tokens(model, inputs), tokens(model, inputs)
    assert torch.equal(first, again) and not torch.equal(first, plain[0])
    assert same(answer(model, inputs), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_its_rows(family, model, kind):
    with vlm_fix.wrapped(model, KINDS[kind]):
        batch = answer(model, make_inputs(family, [1, 2]))[0]
        for row in range(2):
            assert torch.equal(answer(model, single(family, [1, 2], row))[0][0], batch[row])


@pytest.mark.parametrize("images", [[1, 1], [1, 2]], ids=["one image", "two images"])
@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_a_batch_equal_those_of_its_rows(family, model, kind, images):
    if not keeps_images_together(model, single(family, images, 1)):
        pytest.skip(f"transformers {transformers.__version__} gives the copies of a prompt other images by itself")
    with vlm_fix.wrapped(model, KINDS[kind]):
        beams = tokens(model, make_inputs(family, images), num_beams=3)
        for row in range(2):
            assert torch.equal(tokens(model, single(family, images, row), num_beams=3)[0], beams[row])


def keeps_images_together(model, inputs):
    """True if a prompt that the plain model copies, as for beams, answers as the prompt itself."""
    copies = tokens(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    return torch.equal(copies, tokens(model, inputs).expand(2, -1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_modes_give_the_greedy_answer_or_are_refused(family, model, kind, mode):
    inputs, option = single(family, [1], 0), MODES[mode]
    if KINDS[kind].startswith(SHORTENS) and not (kind == "pruning before the LM" and mode == "static cache"):
        with vlm_fix.wrapped(model, KINDS[kind]), pytest.raises(vlm_fix.VlmFixError, match="does not work with"):
            tokens(model, inputs, **option)
        return
    plain = tokens(model, inputs)
    try:
        works = torch.equal(tokens(model, inputs, **option), plain)
    except (RuntimeError, ValueError, TypeError):
        works = False
    if not works:
        pytest.skip(f"transformers {transformers.__version__} does not manage a {mode} with an image by itself")
    with vlm_fix.wrapped(model, KINDS[kind]):
        assert torch.equal(tokens(model, inputs, **option), tokens(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_a_seed_is_repeatable(family, model, kind):
    inputs = make_inputs(family, [1, 2])
    drawn = []
    with vlm_fix.wrapped(model, KINDS[kind]):
        for _ in range(2):
            torch.manual_seed(5)
            drawn.append(tokens(model, inputs, do_sample=True, temperature=0.7, num_return_sequences=2))
    assert torch.equal(*drawn) and drawn[0].shape[0] == 4


# ------------------------------------------------------------------------------- what vlm-fix says of a transformers


@pytest.mark.parametrize(
    ("version", "known"),
    [("5.16.1", False), ("5.17.0", True), ("5.24.9", True), ("5.25.0", False), ("6.0.0.dev0", False), ("main", False)],
)
def test_an_untested_transformers_warns_once(model, monkeypatch, version, known):
    monkeypatch.setattr(
        compat.transformers, "__version__", version
    )  # another import may have replaced the module since
    monkeypatch.setattr(compat, "_warned", False)
    caught = []  # not by catch_warnings, which threads of other tests undo
    monkeypatch.setattr(
        warnings, "warn", lambda message, *args, stacklevel=1: caught.append((str(message), stacklevel))
    )
    for _ in range(2):
        with vlm_fix.wrapped(model, "pai"):
            pass
    said = [(text, level) for text, level in caught if "vlm-fix doctor" in text]
    assert len(said) == (0 if known else 1) and compat.is_tested() == known
    for text, level in said:
        assert f"transformers {version}" in text and "5.17 to 5.24" in text
        assert level == 3, "the warning points at the caller of wrap"


def test_a_decode_step_without_a_cache_is_an_error(family, model):
    """As if a new version handed its cache on under a name that is not known here."""
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "pai:alpha=1"), torch.no_grad():
        out = model(**inputs)
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
        with pytest.raises(vlm_fix.VlmFixError, match="a decode step came without a cache.*vlm-fix doctor"):
            model(input_ids=token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1)


def test_a_second_forward_of_generate_without_a_cache_is_an_error(family, model, monkeypatch):
    inputs = single(family, [1], 0)
    prepare = type(model).prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        return {k: v for k, v in prepare(self, *args, **kwargs).items() if k not in compat.CACHE_NAMES}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", renamed)
    with (
        vlm_fix.wrapped(model, "pai:alpha=1"),
        pytest.raises(vlm_fix.VlmFixError, match="without a cache.*vlm-fix doctor"),
    ):
        tokens(model, inputs)


def test_generate_without_a_cache_is_served_when_it_was_asked_for(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "pai:alpha=1"):
        assert torch.equal(tokens(model, inputs, use_cache=False), tokens(model, inputs))


def test_only_compat_spells_the_name_of_the_cache():
    """A version that renames it again is met in one file."""
    home = Path(compat.__file__).resolve()
    files = [p for room in ("vlm_fix", "methods", "eval", "demo") for p in sorted((ROOT / room).rglob("*.py"))]
    assert home in files and len(files) > 100
    assert "past_key_values" in home.read_text()
    assert not [str(p.relative_to(ROOT)) for p in files if p != home and "past_key_values" in p.read_text()]
