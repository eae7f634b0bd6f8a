"""Contrasts and edits of the distribution come before all of generate's own processors, on the scores of official code."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

import vlm_fix
from tests.support.cases import SPECS
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.contrast import branches, contrasted
from tests.support.references.decoding import deco, dola
from tests.support.run import error, greedy
from vlm_fix.decoding.kinds import Contrast, LogitEdit

OFFICIAL = ["dola:layers=0|1|2|3", "deco:layers=1-3", "vcd", "icd:tokens=11|12|13", "m3id:decay=0.3", "sid", "causalmm"]
SCORERS = [s for s, case in SPECS.items() if case.scores and isinstance(vlm_fix.parse_spec(s), Contrast | LogitEdit)
           and getattr(vlm_fix.parse_spec(s), "contrasts", True)]  # fmt: skip
STEPS = 5


def official(model, twin, spec, inputs, answer):
    """The scores [V] that the official code hands to generate's processors: logits, or log-probabilities."""
    method = vlm_fix.parse_spec(spec)
    if method.name in ("dola", "deco"):
        n = inputs["input_ids"].shape[1]
        run = ref.Reference(ref.visual_columns(inputs["input_ids"]), n, [])
        main = ref.teacher_forced(twin, run, inputs, answer)[-1]
        states = {i: run.inputs[i][n - 1 + len(answer)] for i in vlm_fix.method.parse_layers(method.layers, 4, "")}
        if method.name == "dola":
            main, p = main.log_softmax(-1), main.softmax(-1)
            z, keep = dola(twin, method, main, states, [float(v) >= method.beta * float(p.max()) for v in p])
        else:
            z, keep = deco(twin, method, main, states, None)
        return z.masked_fill(~torch.tensor(keep), -math.inf)
    main, others = branches(model, twin, spec, inputs, answer)
    if method.name == "m3id":
        main, others = main.log_softmax(-1), [o.log_softmax(-1) for o in others]
    return contrasted(method, len(answer), main, others)


def penalised(z, seen, penalty):
    """The repetition penalty of Keskar et al. (2019) on scores [V]."""
    z = z.clone()
    for token in seen:
        z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
    return z


@pytest.mark.parametrize("penalty", [1.05, 1.3])
@pytest.mark.parametrize("spec", OFFICIAL)
def test_repetition_penalty_acts_on_the_official_scores(family, model, spec, penalty):
    inputs, twin, moved = single(family, [1, 2], 1), ref.double(model), 0.0
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs, STEPS, repetition_penalty=penalty)
    for t in range(STEPS):
        seen = {*inputs["input_ids"][0].tolist(), *tokens[0, :t].tolist()}
        z = official(model, twin, spec, inputs, tokens[0, :t])
        theirs, cut = penalised(z, seen, penalty), torch.isinf(z)
        assert torch.equal(torch.isinf(scores[0, t]), cut)
        assert error(scores[0, t][~cut], theirs[~cut]) < 1e-5
        assert int(tokens[0, t]) == int(theirs.argmax())
        other = penalised(z.log_softmax(-1), seen, penalty).log_softmax(-1)
        moved = max(moved, float((other - theirs.log_softmax(-1))[~cut].abs().max()))
    normalised = spec.startswith(("dola", "m3id"))
    assert moved > (0 if normalised else 1e-4), "the penalty must depend on the level of the scores"


class Along(LogitsProcessor):
    """Writes down what it is given, and lets generate take given tokens [T] alone."""

    def __init__(self, start, path):
        self.start, self.path, self.seen = start, path, []

    def __call__(self, input_ids, scores):
        self.seen.append(scores[0].clone())
        only = torch.full_like(scores, -math.inf)
        only[:, self.path[input_ids.shape[1] - self.start]] = 0
        return only


def unprocessed(model, inputs, path):
    """Scores [T, V] of a wrapped model along `path` before any processor of generate's own."""
    along = Along(inputs["input_ids"].shape[1], path)
    model.generate(**inputs, max_new_tokens=len(path), do_sample=False, logits_processor=[along])
    return torch.stack(along.seen)


def processed(model, inputs, path, scores, options):
    """Scores [T, V] after the processors that transformers makes for `options`."""
    ids = inputs["input_ids"]
    config = GenerationConfig(**{"eos_token_id": 2, "pad_token_id": 91} | options)
    model._prepare_special_tokens(config, device="cpu")
    chain = type(model)._get_logits_processor(
        model, config, ids.shape[1], ids, device="cpu", model_kwargs={"attention_mask": inputs["attention_mask"]}
    )
    rows = (torch.cat([ids, path[None, :t]], dim=1) for t in range(len(path)))
    return torch.cat([chain(row, s[None]) for row, s in zip(rows, scores, strict=True)])


OWN = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [69, 32]], "min_new_tokens": 4,
       "suppress_tokens": [IMAGE, 7], "begin_suppress_tokens": [3], "sequence_bias": [[[20], 1.5]],
       "exponential_decay_length_penalty": (2, 1.1)}  # fmt: skip
WARPERS = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize("spec", SCORERS, ids=lambda s: s[:60])
@pytest.mark.parametrize("options", [OWN, OWN | WARPERS], ids=["greedy", "sampling"])
def test_every_processor_of_generate_follows(family, model, spec, options):
    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, spec):
        torch.manual_seed(0)
        out = model.generate(**inputs, **{"do_sample": False} | options, max_new_tokens=STEPS, eos_token_id=2,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
        path = out.sequences[0, inputs["input_ids"].shape[1] :]
        raw = unprocessed(model, inputs, path)
    theirs, ours = processed(model, inputs, path, raw, options), torch.cat(out.scores)
    cut = torch.isinf(theirs)
    assert torch.equal(torch.isinf(ours), cut) and torch.allclose(ours[~cut], theirs[~cut], atol=1e-4)


@pytest.mark.parametrize("spec", SCORERS, ids=lambda s: s[:60])
def test_beams_add_up_processed_log_probabilities(family, model, spec):
    inputs, options = single(family, [1, 2], 1), {"repetition_penalty": 1.3, "suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(model, spec):
        out = model.generate(**inputs, **options, max_new_tokens=4, num_beams=2, do_sample=False, length_penalty=0.0,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
        path = out.sequences[0, inputs["input_ids"].shape[1] :]
        raw = unprocessed(model, inputs, path)
    total = processed(model, inputs, path, raw.log_softmax(-1), options).gather(1, path[:, None]).sum()
    assert float(total) == pytest.approx(float(out.sequences_scores[0]), abs=2e-4)


@pytest.mark.parametrize("spec", ["vcd:beta=0", "dola:layers=0|1|2|3,beta=0", "pai:alpha=0.5", "sid:beta=0"])
def test_guidance_follows(models, spec, recwarn):
    """generate's own guidance runs the model on another prompt, whose forwards are none of the call's.

    transformers' own guidance fails on Qwen2.5-VL, wrapped or not.
    """
    model, inputs, negative = models["llava"], single("llava", [1, 2], 1), torch.tensor([[1, 30, 31, 32]])
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs, 4, guidance_scale=1.7, negative_prompt_ids=negative)
        raw = unprocessed(model, inputs, tokens[0])
    assert not [w for w in recwarn if "changed nothing" in str(w.message)]
    for t in range(4):
        plain = model(input_ids=torch.cat([negative, tokens[:, :t]], dim=1)).logits[0, -1].log_softmax(-1)
        theirs = 1.7 * (raw[t].log_softmax(-1) - plain) + plain
        assert torch.allclose(scores[0, t], theirs, atol=2e-4)


@pytest.mark.parametrize("spec", ["vcd:beta=0.01", "deco:layers=1-3", "dola:layers=0|1|2|3"])
def test_drafting_under_a_penalty_gives_greedys_tokens(family, model, spec):
    inputs = single(family, [1, 2], 1)
    how = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.3, "suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(model, spec):
        expected = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, prompt_lookup_num_tokens=2), expected)


def test_the_callers_processors_come_last(family, model):
    """As without a method: after those of generate's own, and they see what those left."""
    inputs, seen = make_inputs(family, [1, 2]), []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    with vlm_fix.wrapped(model, "vcd"):
        _, _, scores = greedy(model, inputs, 3, repetition_penalty=1.3, suppress_tokens=[4], logits_processor=[Look()])
    assert all(torch.isinf(s[:, 4]).all() for s in seen) and torch.equal(torch.stack(seen, 1), scores)


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 2}])
@pytest.mark.parametrize("spec", ["vcd:beta=1", "dola:layers=0|1|2|3,beta=1", "deco:top_k=1"])
def test_a_forbidden_token_that_alone_is_plausible(family, model, spec, mode):
    """Where the cut-off leaves what generate forbids (here the likeliest tokens), the model's own scores decide."""
    inputs, start = make_inputs(family, [1, 2]), make_inputs(family, [1, 2])["input_ids"].shape[1]
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1].unique().tolist()
    how = {"max_new_tokens": 3, "suppress_tokens": [*first, IMAGE]} | mode
    torch.manual_seed(0)
    plain = model.generate(**inputs, **how)
    with vlm_fix.wrapped(model, spec):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **how)
    assert torch.equal(ours[:, start], plain[:, start]) or mode["do_sample"] or "num_beams" in mode
    assert not torch.isin(ours[:, start:], torch.tensor(how["suppress_tokens"])).any()


def test_a_generate_without_processors_is_an_error(family, model):
    """A loop of the caller's own that never asks for them would leave the contrast out without a word."""
    inputs = single(family, [1, 2], 1)
    model.generate = lambda input_ids, **kwargs: input_ids
    try:
        with vlm_fix.wrapped(model, "vcd"), pytest.raises(vlm_fix.VlmFixError, match="does not ask the model"):
            model.generate(**inputs, max_new_tokens=2)
    finally:
        del model.generate
