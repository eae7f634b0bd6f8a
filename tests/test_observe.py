"""observe against eager attention weights of a float64 twin."""

from __future__ import annotations

import copy

import pytest
import reference as ref
import torch
from conftest import IMAGE, make_inputs, single
from test_methods import VAR_TINY, error

import vlm_fix

ANSWER = [5, 17, 40, 8]


def eager(model, inputs, run=None):
    """Weights [layers, H, L, L] of prompt and answer at once in float64, by eager attention or a reference with edits."""
    twin = copy.deepcopy(model).double().eval() if run is None else ref.double(model)
    if run is None:
        twin.set_attn_implementation({"text_config": "eager"})
    seen, hooks = [], []
    for layer in twin.model.language_model.layers:
        hooks.append(layer.self_attn.register_forward_hook(lambda m, a, o: seen.append(o[1][0])))
    ref.teacher_forced(twin, run, inputs, torch.tensor(ANSWER))
    return torch.stack(seen), twin


def groups(inputs):
    """Columns by kind, from the ids alone: image, system, text after the last image (the answer included)."""
    ids = inputs["input_ids"][0].tolist() + ANSWER
    visual = [j for j, t in enumerate(ids) if t == IMAGE]
    return visual, list(range(min(visual))), list(range(max(visual) + 1, len(ids)))


@pytest.mark.parametrize("spec", [None, "pai:alpha=0.5", f"var:{VAR_TINY}"])
def test_masses_and_heatmaps_equal_eager(family, model, spec):
    inputs = single(family, [1, 2], 1)
    visual, system, text = groups(inputs)
    length = inputs["input_ids"].shape[1]
    if spec:
        vlm_fix.wrap(model, spec)
        before = model(**inputs).logits
        seen = vlm_fix.observe(model, inputs, ANSWER)
        assert torch.equal(model(**inputs).logits, before), "observing must leave the wrapped model as it was"
        vlm_fix.unwrap(model)
        run = (
            ref.PaiReference(visual, length, [2, 3], alpha=0.5)
            if spec.startswith("pai")
            else ref.VarReference(visual, length, [1, 2, 3], tau=2.2, rho=0.2, min_visual_mass=0.1)
        )
    else:
        attributes = set(model.__dict__)
        seen, run = vlm_fix.observe(model, inputs, torch.tensor(ANSWER)), None
        assert set(model.__dict__) == attributes and not any("_vlm_fix" in m.__dict__ for m in model.modules())
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.language_model.modules())
    a, _ = eager(model, inputs, run)
    a = a[:, :, length - 1 :]
    assert torch.equal(seen.tokens, torch.tensor(ANSWER)) and seen.kept.all()
    assert seen.weights_to_image.shape == (4, 4, len(ANSWER) + 1, len(visual))
    for got, columns in ((seen.visual_mass, visual), (seen.system_mass, system), (seen.text_mass, text)):
        assert error(got, a[..., columns].sum(-1)) < 1e-5
    assert error(seen.weights_to_image, a[..., visual]) < 1e-5
    vas = sum(
        sum(float(x[j]) for j in visual) / sum(float(x[j]) for j in system) for x in a.reshape(-1, a.shape[-1])
    ) / (4 * 4 * (len(ANSWER) + 1))
    assert abs(seen.vas / vas - 1) < 1e-4
    grids = [(6, 6), (6, 6)] if family == "llava" else [(2, 4), (4, 3)]
    assert seen.grids == grids
    h, w = grids[1]
    offset, expected = grids[0][0] * grids[0][1], torch.zeros(h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            expected[y, x] = a[[1, 3], 2, 1, visual[offset + y * w + x]].mean()
    assert error(seen.heatmap(1, layers=[1, 3], heads=[2], image=1), expected) < 1e-5


def test_sinks_head_outputs_and_norms(family, model):
    inputs = single(family, [1, 2], 1)
    visual, _, _ = groups(inputs)
    last = inputs["input_ids"].shape[1] - 1
    seen = vlm_fix.observe(model, inputs, ANSWER, tau=2.5, text_only=True)
    twin = ref.double(model)
    run, norms = ref.Reference(visual, last + 1, [0, 1, 2, 3]), {}
    hooks = [
        getattr(layer, part).register_forward_hook(
            lambda m, a, o, key=(part, i): norms.__setitem__(key, (o[0] if isinstance(o, tuple) else o)[0].norm(dim=-1))
        )
        for i, layer in enumerate(twin.model.language_model.layers)
        for part in ("self_attn", "mlp")
    ]
    ref.teacher_forced(twin, run, inputs, torch.tensor(ANSWER))
    for hook in hooks:
        hook.remove()
    text = ref.text_only_outputs(twin, inputs, range(4))
    for i in range(4):
        phi = torch.stack([(x.abs() / (x.pow(2).mean() + 1e-6).sqrt()).max() for x in run.inputs[i]])
        assert error(seen.phi[i], phi) < 1e-5
        assert seen.sinks[i].tolist() == [float(p) > 2.5 for p in phi]
        assert error(seen.heads[i], run.outputs[i][:, last]) < 1e-5
        assert error(seen.heads_text[i], text[i]) < 1e-5
        assert error(seen.divergence[i], (run.outputs[i][:, last] - text[i]).norm(dim=-1)) < 1e-5
        assert error(seen.attention_norm[i], norms["self_attn", i][last:]) < 1e-5
        assert error(seen.mlp_norm[i], norms["mlp", i][last:]) < 1e-5
    assert seen.image_sinks.any() and torch.equal(seen.image_sinks, seen.sinks[:, visual])
    raw, masked = (seen.heatmap(0, sinks=s) for s in (True, False))
    h, w = seen.grids[0]
    shown = seen.weights_to_image[:, :, 0, : h * w].clone()
    assert torch.allclose(raw.flatten(), shown.mean((0, 1)))
    for i in range(4):
        for j in range(h * w):
            if seen.sinks[i, visual[j]]:
                shown[i, :, j] = 0
    assert torch.allclose(masked.flatten(), shown.mean((0, 1))) and not torch.equal(raw, masked)
    some = vlm_fix.observe(model, inputs, sink_dims=[3, 17], tau=1.5)
    x = run.inputs[2][0]
    assert abs(float(some.phi[2, 0]) - float(x[[3, 17]].abs().max() / (x.pow(2).mean() + 1e-6).sqrt())) < 1e-5


def test_head_methods_and_pruners_are_seen(family, model):
    """Heads as VHR scales them; dropped patches weigh nothing, and what is kept equals the pruned model's own rows."""
    inputs = single(family, [1, 2], 1)
    plain = vlm_fix.observe(model, inputs, ANSWER)
    with vlm_fix.wrapped(model, "vhr:layers=0,alpha=3"):
        scaled = vlm_fix.observe(model, inputs, ANSWER)
    ratio = (scaled.heads[0].norm(dim=-1) / plain.heads[0].norm(dim=-1)).round(decimals=4)
    assert sorted(ratio.tolist()) == [1, 1, 3, 3]
    with vlm_fix.wrapped(model, "hiprune:keep=4"):
        pruned = vlm_fix.observe(model, inputs, ANSWER)
    kept = pruned.kept[0]
    assert int(kept.sum()) == 8 and pruned.kept.shape == plain.kept.shape and (pruned.kept == kept).all()
    assert (pruned.weights_to_image[..., ~kept] == 0).all()
    assert torch.allclose(pruned.weights_to_image.sum(-1), pruned.visual_mass, atol=1e-6)
    assert pruned.sinks.shape[1] == plain.sinks.shape[1] - int((~kept).sum())


def test_layers_behind_a_drop(family, model):
    """FastV before layer 2: what layer 1 looks at least is gone, and the rest of layer 2's softmax grows by its share."""
    inputs = single(family, [1, 2], 1)
    plain = vlm_fix.observe(model, inputs, ANSWER)
    with vlm_fix.wrapped(model, "fastv:keep=4,layer=2"):
        seen = vlm_fix.observe(model, inputs, ANSWER)
    expected = torch.zeros_like(plain.kept[0])
    scores, first = plain.weights_to_image[1, :, 0].mean(0), plain.grids[0][0] * plain.grids[0][1]
    for start, part in ((0, scores[:first]), (first, scores[first:])):
        expected[start + part.topk(4).indices] = True
    assert seen.kept.shape == plain.kept.shape and seen.kept[:2].all() and (seen.kept[2:] == expected).all()
    assert torch.allclose(seen.weights_to_image[:2, :, 0], plain.weights_to_image[:2, :, 0], atol=1e-6)
    row = plain.weights_to_image[2, :, 0]
    rest = 1 - row[:, ~expected].sum(-1, keepdim=True)
    assert error(seen.weights_to_image[2, :, 0][:, expected], row[:, expected] / rest) < 1e-5
    assert (seen.weights_to_image[2:][..., ~expected] == 0).all()
    assert torch.allclose(seen.weights_to_image.sum(-1), seen.visual_mass, atol=1e-6)
    total = seen.visual_mass + seen.system_mass + seen.text_mass
    assert (total <= 1 + 1e-5).all() and seen.phi.shape == plain.phi.shape
    visual = [j for j, t in enumerate(inputs["input_ids"][0].tolist()) if t == IMAGE]
    gone = torch.tensor(visual)[~expected]
    assert (seen.phi[2:, gone] == 0).all() and torch.allclose(seen.phi[:2], plain.phi[:2], atol=1e-4)
    others = [j for j in range(inputs["input_ids"].shape[1]) if j not in gone.tolist()]
    assert torch.allclose(seen.phi[2][others], plain.phi[2][others], atol=1e-4)


@pytest.mark.parametrize("spec", ["knorm:keep=4", "downsample_image:keep=4"])
def test_what_cannot_be_followed_is_said(model, family, spec):
    with vlm_fix.wrapped(model, spec), pytest.raises(vlm_fix.VlmFixError, match="observe"):
        vlm_fix.observe(model, single(family, [1], 0), ANSWER)


def test_chunks_change_nothing(model, family, monkeypatch):
    import vlm_fix.attention.kernel as kernel

    inputs = single(family, [1, 2], 1)
    with vlm_fix.wrapped(model, [f"var:{VAR_TINY}", "pai"]):
        whole = vlm_fix.observe(model, inputs, ANSWER)
        monkeypatch.setattr(kernel, "CHUNK_BYTES", 1)
        rows = vlm_fix.observe(model, inputs, ANSWER)
    assert torch.allclose(whole.weights_to_image, rows.weights_to_image, atol=1e-6)
    assert torch.allclose(whole.text_mass, rows.text_mass, atol=1e-6)


def test_errors(models):
    model, one = models["llava"], single("llava", [1], 0)
    for bad, sentence in (
        (make_inputs("llava", [1, 1]), "one prompt at a time, not a batch of 2"),
        ({"input_ids": torch.tensor([[1, 5, 6]])}, "needs an image"),
        ({}, "takes the processor's output"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.observe(model, bad)
    with pytest.raises(vlm_fix.VlmFixError, match="sink_dims=\\(640,\\) do not fit"):
        vlm_fix.observe(model, one, sink_dims=[640])
    seen = vlm_fix.observe(model, one)
    assert seen.visual_mass.shape == (4, 4, 1)
    with pytest.raises(vlm_fix.VlmFixError, match="there is no row 1; this observation has rows 0 to 0"):
        seen.heatmap(1)
    with pytest.raises(vlm_fix.VlmFixError, match="text_only=True"):
        _ = seen.divergence
    assert "generate" not in model.__dict__ and model.config.get_text_config()._attn_implementation == "sdpa"
