"""Qwen-VL's other towers and decoders: what pruners read there, and features of several depths that go with their tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

import vlm_fix
from tests.pruning.test_after import EveryOther, every_other
from tests.support import families
from tests.support.models import IMAGE
from tests.support.references import base as ref
from tests.support.references import pruning_choices as more
from tests.support.references.pruning_after import Slow
from tests.support.references.pruning_before import divprune, uniform_grid, visionzip, zoo_prune
from tests.support.run import error, greedy
from vlm_fix.families import table
from vlm_fix.pruning import PruningWing
from vlm_fix.wing import engine_of

build = functools.cache(families.build)
STEPS = 4
CHOICES = {
    "divprune:keep=5": divprune,
    "zoo_prune:directions=3,seed=4,keep=5": zoo_prune,
    "uniform_grid:keep=5": uniform_grid,
    "visionzip:contextual=0.4,keep=5": visionzip,
    "cdpruner:keep=5": more.cdpruner,
    "vispruner:step=2,keep=5": more.vispruner,
    "holov:crops=3,keep=5": more.holov,
    "scope:keep=5": more.scope,
    "flowcut:keep=5": more.flowcut,
    "agilepruner:slope=0.1,keep=5": more.agilepruner,
    "prumerge:neighbours=3,keep=5": more.prumerge,
    "fastvid:keep=5": more.fastvid,
    "visiontrim:complement=0.4,keep=5": more.visiontrim,
}


@torch.no_grad()
def masked_logits(twin, inputs, kept, tokens):
    """Logits of the full-length prompt whose dropped columns are masked; kept: indices, or {index: merged feature}."""
    visual = ref.visual_columns(inputs["input_ids"])
    full = torch.cat([inputs["input_ids"], tokens[None, :-1]], dim=1)
    mask = torch.ones_like(full)
    mask[0, visual] = 0
    mask[0, [visual[i] for i in kept]] = 1
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(tokens) - 1))
    grids = {"image_grid_thw": inputs["image_grid_thw"], "mm_token_type_ids": types}

    def merged(module, args, kwargs):
        for i, z in kept.items() if isinstance(kept, dict) else ():
            kwargs["inputs_embeds"][0, visual[i]] = z

    hook = twin.model.language_model.register_forward_pre_hook(merged, with_kwargs=True)
    pixels = inputs["pixel_values"].double()
    places = twin.model.get_rope_index(full, **grids)[0]
    out = twin(full, attention_mask=mask, position_ids=places, pixel_values=pixels, **grids, use_cache=False)
    hook.remove()
    return out.logits[0, -len(tokens) :]


@pytest.mark.parametrize("spec", CHOICES)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_before_the_language_model(name, spec):
    """The choice by loops over the tower, the answer from a prompt whose dropped columns are masked."""
    model, inputs = build(name), families.prompt(name, [2])
    with vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, inputs, STEPS, suppress_tokens=[IMAGE])
        method = engine_of(model).wing(PruningWing).pruners.pruner
    twin, kept, offset = copy.deepcopy(model).double(), {}, 0
    for image in more.described(name, twin, inputs):
        found = CHOICES[spec](image, 5, method)
        kept |= {offset + i: found[i] if isinstance(found, dict) else image["z"][i] for i in found}
        offset += len(image["z"])
    assert error(logits[0], masked_logits(twin, inputs, kept, tokens[0])) < 1e-5
    other = [i for i in range(offset) if i not in kept][: len(kept)]
    assert error(logits[0], masked_logits(twin, inputs, other, tokens[0])) > 1e-3


@pytest.mark.parametrize("at", [(0,), (1,), (2,), (3,), (0, 1, 2)])
def test_inside_the_language_model(at):
    """Drops before, between and after the layers where deeper features are added, in a padded batch."""
    name = "qwen3_vl"
    model, images, method = build(name), [1, 2, 1], EveryOther(at)
    with vlm_fix.wrapped(model, method):
        tokens, logits, _ = greedy(model, families.prompt(name, images), 6, suppress_tokens=[IMAGE])
    for row in range(3):
        run = Slow(name, model, families.prompt(name, images, rows=[row]), at, every_other(3))
        assert error(logits[row], run.logits(tokens[row])) < 1e-5


def test_deeper_features_matter():
    """Of what is compared above: without them the logits are a thousand times further off than the comparisons allow."""
    model, inputs = build("qwen3_vl"), families.prompt("qwen3_vl", [2])
    plain = greedy(model, inputs, 1)[1]

    def without(module, args, kwargs):
        return args, {**kwargs, "deepstack_visual_embeds": None}

    hook = model.model.language_model.register_forward_pre_hook(without, with_kwargs=True)
    changed = greedy(model, inputs, 1)[1]
    hook.remove()
    assert error(changed, plain.double()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_hybrid_decoders_read_a_shorter_prompt(name):
    """Linear attention, too, reads only what was kept: the language model by itself on the rows that are left."""
    model, inputs, seen = build(name), families.prompt(name, [2]), {}
    language = model.model.language_model
    hook = language.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    plain = model(**inputs).logits[:, -1]
    embeds, places = seen["inputs_embeds"], seen["position_ids"]
    hook.remove()
    with vlm_fix.wrapped(model, "uniform_grid:keep=5"):
        found = model(**inputs).logits[:, -1]
    kept, offset = [], 0
    for _, h, w in inputs["image_grid_thw"].tolist():
        image = {"grid": (h // 2, w // 2)}
        kept += [offset + i for i in uniform_grid(image, 5, None)]
        offset += h * w // 4
    visual = ref.visual_columns(inputs["input_ids"])
    gone = {visual[i] for i in range(offset) if i not in kept}
    stay = [j for j in range(inputs["input_ids"].shape[1]) if j not in gone]
    out = language(inputs_embeds=embeds[:, stay], position_ids=places[..., stay], use_cache=False)[0]
    expected = model.lm_head(out[:, -1])
    assert float((found - expected).abs().max()) < 1e-4 and float((found - plain).abs().max()) > 1e-2


def test_a_prompt_that_sees_ahead_is_refused(monkeypatch):
    """Of a family whose table row does not say so: Molmo 2's image tokens see each other."""
    model, inputs = build("molmo2"), families.prompt("molmo2", [1, 2])
    with pytest.raises(
        vlm_fix.VlmFixError, match="fastv does not work with this model's bidirectional image attention"
    ):
        vlm_fix.wrap(model, "fastv")
    rows = tuple(dataclasses.replace(f, causal=True) for f in table.FAMILIES)
    monkeypatch.setattr(table, "FAMILIES", rows)
    with (
        vlm_fix.wrapped(model, "fastv:keep=4"),
        pytest.raises(vlm_fix.VlmFixError, match="fastv does not work with this model's bidirectional image attention"),
    ):
        greedy(model, inputs, 2)
    with vlm_fix.wrapped(build("qwen2_vl"), "fastv:keep=4"):
        greedy(build("qwen2_vl"), families.prompt("qwen2_vl", [1, 2]), 2)
