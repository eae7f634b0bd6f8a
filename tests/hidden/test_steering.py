"""Steering: what the matrix does not see of VISTA, and the control that steering has to beat."""

from __future__ import annotations

import pytest
import torch

import vlm_fix
from tests.support.families import build, prompt
from tests.support.models import make_inputs, single
from tests.support.references import base as ref
from tests.support.references import hidden
from tests.support.run import error, greedy
from vlm_fix.hidden.states import unit_between
from vlm_fix.methods.controls.random_direction import drawn
from vlm_fix.methods.hidden import vista


@pytest.mark.parametrize("pruner", ["downsample_image:keep=2", "hiprune:keep=2"])
def test_a_pass_over_the_prompt_sees_the_image_that_was_given(family, model, pruner, monkeypatch):
    seen, last_rows = [], vista.last_rows
    monkeypatch.setattr(vista, "last_rows", lambda *a: seen.append(last_rows(*a)) or seen[-1])
    for stack in ("vista:alpha=0", f"vista:alpha=0+{pruner}"):
        with vlm_fix.wrapped(model, stack):
            model.generate(**single(family, [1], 0), max_new_tokens=2, do_sample=False)
    (image, text, with_pruner, again) = seen
    for alone, beside in ((image, with_pruner), (text, again)):
        assert max(error(beside[i], alone[i].double()) for i in alone) < 1e-5


def test_self_logits_augmentation_mixes_the_heads_of_late_layers(family, model):
    """Scores of every step against float64: outputs of the layers through the language head, without the final norm."""
    inputs = single(family, [1, 2], 0)
    with vlm_fix.wrapped(model, "vista:lam=0,alpha=0.4,mixed_layers=1-2"):
        tokens, logits, scores = greedy(model, inputs)
    twin = ref.double(model)
    run = ref.Reference([], 0, [])
    plain = ref.teacher_forced(twin, run, inputs, tokens[0, :-1])
    last = inputs["input_ids"].shape[1] - 1
    late = [twin.lm_head(run.inputs[i + 1][last:]) for i in (1, 2)]  # the output of a layer is the next one's input
    expected = (0.6 * plain + 0.4 * (late[0] + late[1]) / 2).log_softmax(-1)
    assert error(logits[0], plain) < 1e-5 and error(scores[0].log_softmax(-1), expected) < 1e-5
    assert error(plain.log_softmax(-1), expected) > 1e-2


def test_rows_without_an_image_keep_their_distribution(family, model):
    inputs = make_inputs(family, [1, 0])
    with vlm_fix.wrapped(model, "vista:lam=0.4,alpha=0.4"):
        _, logits, scores = greedy(model, inputs, 3)
    assert torch.equal(scores[1], logits[1])
    assert not torch.allclose(scores[0].log_softmax(-1), logits[0].log_softmax(-1), atol=1e-2)


@pytest.mark.parametrize("name, seed", [("qwen3_5", 5), ("minicpmv4_6", 91)])
def test_what_is_noise_between_the_passes_is_no_direction(name, seed):
    """Linear attention hides the image from a row of the first layer: noise, which padding changes, is all that is left."""
    model, batch = build(name), prompt(name, [1, 2, 1], seed=seed)
    with vlm_fix.wrapped(model, "vista:alpha=0"):
        scores = greedy(model, batch, 3)[2]
        for row in range(3):
            alone = greedy(model, prompt(name, [1, 2, 1], seed=seed, rows=[row]), 3)[2]
            assert torch.allclose(alone[0], scores[row], atol=5e-3), row
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    units = unit_between(x, x - torch.tensor([[1e-5, 0.0], [0.01, 0.0]]), torch.float32)
    assert torch.equal(units, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert not unit_between(x, x - 0.01, torch.bfloat16).any()


def test_vista_takes_layers_of_a_7b_model_in_proportion(models):
    method = vlm_fix.parse_spec("vista").resolve(vlm_fix.families.arch_of(models["llava"]))
    assert method.mixed_layers == (2,) and method.exits == (3,) and method.layers == (0, 1, 2, 3)
    with pytest.raises(vlm_fix.VlmFixError, match="must end before the last layer, 3"):
        vlm_fix.wrap(models["llava"], "vista:mixed_layers=2-3")
    for spec, words in {
        "vista:lam=0,alpha=0.4,layers=1": "layers are those of lam",
        "vista:alpha=0,mixed_layers=1": "mixed_layers are those of alpha",
    }.items():
        with pytest.raises(vlm_fix.VlmFixError, match=words):
            vlm_fix.wrap(models["llava"], spec)


def test_vista_refuses_a_cache_whose_images_it_does_not_have(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "vista"):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([out.sequences, inputs["input_ids"][:, -2:]], dim=1)
        again = {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
        if "mm_token_type_ids" in again:
            again["mm_token_type_ids"] = ref.modalities(longer, again)
        with pytest.raises(vlm_fix.VlmFixError, match="start this turn without the cache"):
            model.generate(**again, max_new_tokens=2, past_key_values=out.past_key_values)


@pytest.mark.parametrize("place", ["mlp_output", "attention_output", "layer_output"])
def test_random_directions_turn_every_row_by_the_same_share(family, model, place):
    inputs = single(family, [1, 2], 0)
    with vlm_fix.wrapped(model, f"random_direction:strength=0.3,seed=5,place={place},layers=1-2"):
        tokens, logits, _ = greedy(model, inputs)
    twin = ref.double(model)

    def turn(x, r, i):
        u = drawn(5, i, x.shape[-1]).double()
        assert abs(hidden.length(u) - 1) < 1e-6
        y = x[r] / hidden.length(x[r]) + 0.3 * u
        return y / hidden.length(y) * hidden.length(x[r])

    for i in (1, 2):
        layer = ref.decoder(twin).layers[i]
        module = {"mlp_output": layer.mlp, "attention_output": layer.self_attn, "layer_output": layer}[place]
        hidden.changed(module, lambda x, r, i=i: turn(x, r, i))
    assert error(logits[0], ref.teacher_forced(twin, None, inputs, tokens[0, :-1])) < 1e-5
    assert not torch.equal(drawn(5, 1, 64), drawn(5, 2, 64)) and not torch.equal(drawn(5, 1, 64), drawn(6, 1, 64))


def test_steering_is_measured_against_random_directions_of_its_own_strength(models):
    from vlm_fix.eval.run.plan import _controls

    stack = [vlm_fix.parse_spec("vista:lam=0.2,prompt_rows=last,layers=1-2")]
    wanted = _controls([stack], models["llava"], yes_no=False)
    assert "random_direction:strength=0.2,prompt_rows=last,layers=1|2" in wanted
    assert not any(
        "random_direction" in spec for spec in _controls([[vlm_fix.parse_spec("pai")]], models["llava"], False)
    )
