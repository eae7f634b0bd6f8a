"""SHIELD's attack against torch's Adam in float64, and what the tower is asked for."""

from __future__ import annotations

import copy

import pytest
import torch

import vlm_fix
from tests.support.models import make_inputs, single
from tests.support.references.base import visual_columns
from tests.support.references.contrast import shield_images, shield_pixels
from tests.support.run import error, greedy
from vlm_fix.call import Call
from vlm_fix.families import family_of
from vlm_fix.methods.contrast.tower import features


@pytest.mark.parametrize("options", ["steps=6,lr=0.14", "steps=5,lr=0.02,scale=2,epsilon=0.03,seed=2"])
def test_attack_equals_adam_in_float64(family, model, options):
    twin, inputs = copy.deepcopy(model).double(), single(family, [1, 2], 1)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    spec = f"shield:{options}"
    method = vlm_fix.parse_spec(spec)
    with vlm_fix.wrapped(twin, spec):
        ours = method.attacked(inputs["pixel_values"], Call(twin, family_of(twin), inputs))
    theirs = shield_pixels(twin, method, inputs)
    assert float((ours - theirs).abs().max()) < 1e-9
    moved = (ours - inputs["pixel_values"]).abs()
    assert 0.1 * method.epsilon * method.scale < float(moved.max()) <= method.epsilon * method.scale + 1e-9
    assert not ours.requires_grad and all(p.grad is None for p in twin.parameters())


def test_attack_moves_the_tower_further_than_its_beginning(family, model):
    """A step lowers the likeness to what the tower saw: more steps, less of it."""
    inputs, spec = single(family, [1], 0), "shield:bias=0"
    likeness = []
    with vlm_fix.wrapped(model, spec), torch.no_grad():
        call = Call(model, family_of(model), inputs)
        grid = inputs.get("image_grid_thw")
        clean = features(call, inputs["pixel_values"], grid)
        for steps in (1, 4, 12):
            v = vlm_fix.parse_spec(f"shield:steps={steps},lr=0.02").attacked(inputs["pixel_values"], call)
            x = features(call, v, grid)
            likeness.append(float(torch.nn.functional.cosine_similarity(x, clean, dim=1).mean()))
    assert likeness[0] > likeness[1] > likeness[2]


def test_image_features_without_the_towers_bias(family, model):
    """What the language model gets, against the tower's mean over noise in float64."""
    inputs, spec = single(family, [1, 2], 1), "shield:alpha=0,bias=0.7,samples=4,seed=3"
    seen = []
    with vlm_fix.wrapped(model, spec):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        greedy(model, inputs, 1)
        hook.remove()
    expected = shield_images(copy.deepcopy(model).double(), vlm_fix.parse_spec(spec), inputs)
    ours = seen[0][0, visual_columns(inputs["input_ids"])]
    assert error(ours, expected) < 1e-5
    plain = torch.cat(list(model.model.get_image_features(**pixels(inputs)).pooler_output))
    assert error(plain, expected) > 1e-2


def pixels(inputs):
    return {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}


def test_noise_is_asked_for_once_a_size(family, model):
    """One run of the tower for the prompt, one for noise of each size, and steps + 1 for each attack."""
    inputs, runs = make_inputs(family, [2, 1]), []
    tower = vlm_fix.families.get_part(model, family_of(model).vision)
    hook = tower.register_forward_hook(lambda *a: runs.append(1))
    sizes = {tuple(g) for g in inputs.get("image_grid_thw", torch.zeros(1, 3)).tolist()}
    with vlm_fix.wrapped(model, "shield:steps=2,samples=2"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    hook.remove()
    assert len(runs) == 1 + len(sizes) + 3 * (1 + 2) + 1


def test_prompts_without_pixels_or_with_videos_are_refused(family, model):
    inputs = single(family, [1], 0)
    for given in (
        {k: v for k, v in inputs.items() if k != "pixel_values"},
        {**inputs, "pixel_values_videos": inputs["pixel_values"]},
    ):
        with pytest.raises(vlm_fix.VlmFixError, match="shield needs pixel_values of images, and no video"):
            vlm_fix.parse_spec("shield").negative(Call(model, family_of(model), given))
