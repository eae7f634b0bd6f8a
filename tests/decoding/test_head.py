"""Layers are read through all that stands between the decoder's last layer and the logits."""

from __future__ import annotations

import copy

import pytest
import torch

import vlm_fix
from tests.support import families
from tests.support.models import IMAGE, single, tiny_llava
from tests.support.references.decoding import deco, dola
from tests.support.run import greedy

SPECS = ["deco:layers=1-3", "dola:layers=1|2|3,beta=0.01"]


def ending(change):
    """A LLaVA that does something to its logits in the end, as decoders with muP do."""
    model = tiny_llava()
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", change(out.logits)))
    return model


def capped(name, cap=2.0):
    model = families.build(name)
    model.config.get_text_config().final_logit_softcapping = cap
    return model, families.prompt(name, [1, 2, 1], rows=[1]), lambda z: cap * torch.tanh(z / cap)


@torch.no_grad()
def expected(model, spec, inputs, tokens, finish):
    """Log-probabilities [T, V] of the formula, over transformers' own hidden_states of prompt and answer in float64."""
    method, twin, start = vlm_fix.parse_spec(spec), copy.deepcopy(model).double(), inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"][0], tokens[:-1]])[None]
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()} | {"input_ids": ids}
    for key, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if key in given:
            given[key] = torch.nn.functional.pad(given[key], (0, len(tokens) - 1), value=fill)
    out, rows = twin(**given, output_hidden_states=True, use_cache=False), []
    for t in range(len(tokens)):
        place, p = start - 1 + t, out.logits[0, start - 1 + t].softmax(-1)
        states = {i: out.hidden_states[i][0, place] for i in vlm_fix.method.parse_layers(method.layers, 4, "")}
        if method.name == "deco":
            z, keep = deco(twin, method, out.logits[0, place], states, None, finish)
        else:
            keep = [float(v) >= method.beta * float(p.max()) for v in p]
            z, keep = dola(twin, method, out.logits[0, place].log_softmax(-1), states, keep, finish)
        rows.append(z.masked_fill(~torch.tensor(keep), -torch.inf).log_softmax(-1))
    return torch.stack(rows)


def compare(model, spec, inputs, finish, steps=4):
    with vlm_fix.wrapped(model, spec):
        tokens, _, scores = greedy(model, inputs, steps, suppress_tokens=None)
    theirs, ours = expected(model, spec, inputs, tokens[0], finish), scores[0].log_softmax(-1)
    cut = torch.isinf(theirs)
    assert torch.equal(torch.isinf(ours), cut) and float((ours - theirs)[~cut].abs().max()) < 1e-4
    if finish is not None:
        unfinished = expected(model, spec, inputs, tokens[0], None)
        both = ~cut & ~torch.isinf(unfinished)
        assert float((unfinished - theirs)[both].abs().max()) > 1e-3, "the head's end must matter"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["paligemma2", "gemma4"])
def test_soft_caps(name, spec):
    model, inputs, finish = capped(name)
    steps = 1 if name == "paligemma2" else 4  # PaliGemma's prompt sees all of itself, so that no answer may be in it
    compare(model, spec, inputs, finish, steps)


@pytest.mark.parametrize("spec", SPECS)
def test_scaled_logits(spec):
    compare(ending(lambda z: z * 0.4), spec, single("llava", [1, 2], 1), lambda z: z * 0.4)


@pytest.mark.parametrize("spec", SPECS)
def test_a_cap_in_the_config_that_the_model_leaves_out(spec):
    """Gemma 3 with images never caps, whatever its config says."""
    model = families.build("gemma3")
    model.config.get_text_config().final_logit_softcapping = 2.0
    compare(model, spec, families.prompt("gemma3", [1, 2, 1], rows=[1]), None)


@pytest.mark.parametrize("why", ["neither its output nor", "is not a norm's output"])
@pytest.mark.parametrize("spec", SPECS)
def test_heads_that_cannot_be_followed_are_refused(spec, why):
    model = ending(lambda z: z + z**3 if "neither" in why else z)
    if "norm" in why:
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 3,))
    with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match=why):
        model.generate(**single("llava", [1, 2], 1), max_new_tokens=2)
    with vlm_fix.wrapped(model, "apc_only"):
        model.generate(**single("llava", [1, 2], 1), max_new_tokens=2, suppress_tokens=[IMAGE])


@pytest.mark.parametrize("name", [n for n in families.TINY if n != "gemma3n"])  # no exits: test_kinds.py
def test_every_family_is_followed(name):
    """The head of each family gives the model's own logits from the last layer's normalised output."""
    model, seen = families.build(name), []
    with vlm_fix.wrapped(model, "deco:layers=1-3"):
        model.generate(**families.prompt(name, [1]), max_new_tokens=1, do_sample=False)
        head = next(w.head for w in model._vlm_fix_engine.wings if hasattr(w, "head"))
        hook = head.norm.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
        logits = greedy(model, families.prompt(name, [1]), 1)[1]
        hook.remove()
        x = seen[0][0][:, -1]
        assert torch.allclose(head(x, norm=True), logits[:, 0], atol=1e-5)
