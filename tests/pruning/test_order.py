"""Images and videos of one prompt, in any order: each keeps its own features, scores and columns."""

from __future__ import annotations

import copy

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, PAD, VIDEO
from tests.support.references import base as ref
from tests.support.references.pruning_before import divprune
from tests.support.run import error, greedy
from vlm_fix.registry import get_method

SHAPES = {"i": (IMAGE, 1, 6, 6), "j": (IMAGE, 1, 4, 8), "v": (VIDEO, 2, 4, 6), "w": (VIDEO, 3, 4, 4)}
ORDERS = [["vi"], ["ivj"], ["vw"], ["jvi", "wv"], ["vi", "i", "wj"], ["iv"]]
PRUNERS = ["hiprune:keep=4", "divprune:keep=4", "visionzip:keep=5,contextual=0.4", "vscan:windows=2,keep=8",
           "zoo_prune:keep=4,directions=3", "uniform_grid:keep=4", "random_tokens:keep=4", "cdpruner:keep=4",
           "vispruner:keep=4", "holov:keep=5,crops=3", "scope:keep=4", "prumerge:keep=5", "flowcut:keep=4",
           "agilepruner:keep=4", "visiontrim:keep=5", "fastvid:keep=0.5", "fastv:keep=9", "dart:keep=8", "pyramid_drop",
           "sparsevlm", "a_vl:core=0.2", "ptp:keep=8", "knorm:keep=9", "kvcompose:keep=9",
           "expected_attention:keep=9"]  # fmt: skip


def pixels_of(name):
    _, t, h, w = SHAPES[name]
    return torch.randn(t * h * w, 96, generator=torch.Generator().manual_seed(ord(name)))


def prompts(rows):
    """A left-padded batch; each row is a word of SHAPES' letters, in the order in which the prompt shows them."""
    texts = []
    for names in rows:
        ids = [1, 7 + len(names), 8]
        for name in names:
            token, t, h, w = SHAPES[name]
            ids += [93, *[token] * (t * h * w // 4), 94, ord(name) - 90, 21]
        texts.append(ids)
    width = max(map(len, texts))
    ids = torch.tensor([[PAD] * (width - len(t)) + t for t in texts])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    for token, values, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        own = [name for names in rows for name in names if SHAPES[name][0] == token]
        if own:
            inputs[values] = torch.cat([pixels_of(name) for name in own])
            inputs[grid] = torch.tensor([SHAPES[name][1:] for name in own])
            if token == VIDEO:
                inputs["second_per_grid_ts"] = torch.ones(len(own))
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


@pytest.mark.parametrize("rows", ORDERS, ids="+".join)
@pytest.mark.parametrize("beams", [1, 2])
def test_each_image_comes_with_its_own_features(models, monkeypatch, rows, beams):
    """Pixels, projected features and embeddings that a pruner sees belong to one image, in the prompts' order."""
    model, seen, method = models["qwen2_5_vl"], [], get_method("divprune")
    select = method.select
    monkeypatch.setattr(method, "select", lambda self, image: seen.append(image) or select(self, image))
    with vlm_fix.wrapped(model, "divprune:keep=4"):
        model.generate(**prompts(rows), max_new_tokens=2, do_sample=False, num_beams=beams)
    names = "".join(rows)
    assert len(seen) == len(names)
    for name, image in zip(names, seen, strict=True):
        assert torch.equal(image.pixels, pixels_of(name)) and image.video == (SHAPES[name][0] == VIDEO)
        assert torch.allclose(image.features, image.project(image.raw()), atol=1e-5)


@torch.no_grad()
def expected(twin, names, inputs, budget, tokens):
    """Logits of the whole prompt with the columns masked that DivPrune drops, item by item."""
    z = [twin.model.get_image_features(pixels_of(n).double(), torch.tensor([SHAPES[n][1:]]), return_dict=True).pooler_output[0]
         for n in names]  # fmt: skip
    kept, start = [], 0
    for features in z:
        kept += [start + i for i in divprune({"z": features}, budget, None)]
        start += len(features)
    ids, visual = inputs["input_ids"], ref.visual_columns(inputs["input_ids"])
    full = torch.cat([ids, tokens[None, :-1]], 1)
    mask = torch.ones_like(full)
    mask[0, visual] = 0
    mask[0, [visual[i] for i in kept]] = 1
    embeds = twin.get_input_embeddings()(full)
    embeds[0, visual] = torch.cat(z)
    given = {k: v for k, v in inputs.items() if "grid" in k}
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(tokens) - 1))
    position = twin.model.get_rope_index(full, mm_token_type_ids=types, **given)[0]
    out = twin.model.language_model(inputs_embeds=embeds, position_ids=position, attention_mask=mask, use_cache=False)
    return twin.lm_head(out.last_hidden_state)[0, -len(tokens) :]


@pytest.mark.parametrize("names", ["vi", "ivj", "vw", "iv"])
def test_answer_equals_reference(models, names):
    model, inputs = models["qwen2_5_vl"], prompts([names])
    with vlm_fix.wrapped(model, "divprune:keep=4"):
        tokens, logits, _ = greedy(model, inputs, 4, suppress_tokens=[IMAGE, VIDEO])
    assert error(logits[0], expected(copy.deepcopy(model).double(), names, inputs, 4, tokens[0])) < 1e-5


@pytest.mark.parametrize("spec", PRUNERS)
def test_batch_answers_as_single(models, spec):
    """Every pruner, with rows whose videos stand before, between and behind their images."""
    model, rows = models["qwen2_5_vl"], ["vi", "ivj", "wv"]
    with vlm_fix.wrapped(model, spec):
        together = greedy(model, prompts(rows), 4, suppress_tokens=[IMAGE, VIDEO])
        for i, row in enumerate(rows):
            alone = greedy(model, prompts([row]), 4, suppress_tokens=[IMAGE, VIDEO])
            assert torch.equal(alone[0][0], together[0][i]) and torch.allclose(alone[1][0], together[1][i], atol=1e-4)


@pytest.mark.parametrize("names", ["vi", "ivj", "wv"])
def test_causalmm_weights_each_image_by_its_own_attention(models, names):
    """Alone among the images of another row, an image has the features it has alone."""
    from vlm_fix.methods.contrast import causalmm

    model, seen, real = models["qwen2_5_vl"], [], causalmm.map_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causalmm, "map_of", lambda image, *rest: seen.append(image) or real(image, *rest))
        with vlm_fix.wrapped(model, "causalmm:vision=reversed,language=none"):
            greedy(model, prompts([names]), 2, suppress_tokens=[IMAGE, VIDEO])
    assert [torch.equal(image.pixels, pixels_of(n)) for image, n in zip(seen, names, strict=True)] == [True] * len(
        names
    )
