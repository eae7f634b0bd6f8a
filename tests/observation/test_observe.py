"""observe against eager attention weights of a float64 twin."""

from __future__ import annotations

import copy

import pytest
import torch

import vlm_fix
from tests.support.families import TINY, build, prompt
from tests.support.models import IMAGE, make_inputs, single
from tests.support.references import base as ref
from tests.support.references.attention import ZeroTuning
from tests.support.run import VAR_TINY, error

ANSWER = [5, 17, 40, 8]


def eager(model, inputs, run=None):
    """Weights [layers, H, L, L] of prompt and answer at once in float64, by eager attention or a reference with edits."""
    twin = copy.deepcopy(model).double().eval() if run is None else ref.double(model)
    if run is None:
        twin.set_attn_implementation({"text_config": "eager"})
    seen, hooks = [], []
    for layer in ref.decoder(twin).layers:
        hooks.append(layer.self_attn.register_forward_hook(lambda m, a, o: seen.append(o[1][0])))
    ref.teacher_forced(twin, run, inputs, torch.tensor(ANSWER))
    return torch.stack(seen), twin


def groups(inputs):
    """Columns by kind, from the ids alone: image, system, text after the last image (the answer included)."""
    ids = inputs["input_ids"][0].tolist() + ANSWER
    visual = [j for j, t in enumerate(ids) if t == IMAGE]
    return visual, list(range(min(visual))), list(range(max(visual) + 1, len(ids)))


def hooks(model):
    """Those of the language model by module; transformers leaves some of its own when outputs are captured."""
    return [[*m._forward_pre_hooks, *m._forward_hooks] for m in model.model.language_model.modules()]


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
        attributes, hooked = set(model.__dict__), hooks(model)
        seen, run = vlm_fix.observe(model, inputs, torch.tensor(ANSWER)), None
        assert set(model.__dict__) == attributes and not any("_vlm_fix" in m.__dict__ for m in model.modules())
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        assert hooks(model) == hooked
    a, _ = eager(model, inputs, run)
    a = a[:, :, length - 1 :]
    assert torch.equal(seen.tokens, torch.tensor(ANSWER)) and seen.kept.all()
    assert seen.weights_to_image.shape == (4, 4, len(ANSWER) + 1, len(visual))
    for got, columns in ((seen.visual_mass, visual), (seen.system_mass, system), (seen.text_mass, text)):
        assert error(got, a[..., columns].sum(-1)) < 1e-5
    assert error(seen.weights_to_image, a[..., visual]) < 1e-5
    rows = a.reshape(-1, a.shape[-1])
    vas = sum(float(x[j]) for x in rows for j in visual) / sum(float(x[j]) for x in rows for j in system)
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


def test_calls_that_observe_cannot_answer_are_refused(models):
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


@pytest.mark.parametrize("name", ["gemma3", "aya_vision"])
def test_vas_of_sliding_windows(name):
    """Rows whose window has passed the system text are left out, layer by layer."""
    model, inputs = build(name), prompt(name, [1, 2], rows=[1])
    visual, system, _ = groups(inputs)
    a, _ = eager(model, inputs)
    a = a[:, :, inputs["input_ids"].shape[1] - 1 :].flatten(0, 2)
    masses = [(sum(float(x[j]) for j in visual), sum(float(x[j]) for j in system)) for x in a]
    inside = [(v, s) for v, s in masses if s > 0]
    assert 0 < len(inside) < len(masses)
    seen = vlm_fix.observe(model, inputs, ANSWER)
    assert abs(seen.vas / (sum(v for v, _ in inside) / sum(s for _, s in inside)) - 1) < 1e-4


def test_vas_is_not_one_heads_affair(family, model):
    """A head that all but ignores the system text moves it by no more than its share."""
    inputs = single(family, [1, 2], 1)
    seen = vlm_fix.observe(model, inputs, ANSWER)
    before = seen.vas
    seen.system_mass[2, 1, 0] = 1e-12
    assert abs(seen.vas / before - 1) < 0.05


def test_vas_needs_text_before_the_image():
    model, inputs = build("paligemma"), prompt("paligemma", [1])
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([ids[ids == IMAGE], ids[ids != IMAGE]])[None]
    seen = vlm_fix.observe(model, inputs, ANSWER)
    assert (seen.visual_mass > 0).all() and (seen.system_mass == 0).all()
    with pytest.raises(vlm_fix.VlmFixError, match="VAS needs text before the image"):
        _ = seen.vas


@pytest.mark.parametrize("name", [n for n in TINY if n != "mllama"])  # no column of it shows an image
@torch.no_grad()
def test_outputs_are_what_layers_add(name):
    """Attention's and the MLP's output add up to what each layer changes, whatever norms lie in between."""
    if name == "gemma4":
        pytest.skip("Gemma 4's layers also add per-layer embeddings and scale what they pass on")
    model, inputs = build(name), prompt(name, [1])
    if name == "gemma3n":
        with pytest.raises(vlm_fix.VlmFixError, match="observe reads hidden states .* 4 streams"):
            vlm_fix.observe(model, inputs, ANSWER)
        return
    last, stream, hooks = inputs["input_ids"].shape[1] - 1, [], []
    seen = vlm_fix.observe(model, inputs, ANSWER, outputs=True)
    twin = ref.float64(model)
    for layer in ref.decoder(twin).layers:
        hooks.append(
            layer.register_forward_pre_hook(lambda m, a, k: stream.append((*a, *k.values())[0]), with_kwargs=True)
        )
        hooks.append(layer.register_forward_hook(lambda m, a, o: stream.append(o[0] if isinstance(o, tuple) else o)))
    ref.teacher_forced(twin, None, inputs, torch.tensor(ANSWER))
    added = [
        (after - before).view(-1, before.shape[-1])[last:]
        for before, after in zip(stream[::2], stream[1::2], strict=True)
    ]
    assert seen.attention_output.shape == seen.mlp_output.shape == (4, len(ANSWER) + 1, 64)
    assert error(seen.attention_output.double() + seen.mlp_output, torch.stack(added)) < 1e-5
    assert error(seen.attention_norm, seen.attention_output.norm(dim=-1)) < 1e-6
    assert error(seen.mlp_norm, seen.mlp_output.norm(dim=-1)) < 1e-6
    half = vlm_fix.observe(model, inputs, outputs=True, dtype=torch.float16)
    assert half.mlp_output.dtype == torch.float16 and half.mlp_norm.dtype == torch.float32


def test_outputs_are_those_that_a_hidden_edit_left(family, model):
    """On a wrapped model: what IRI injects is in the outputs."""
    inputs, stream, hooks = single(family, [1], 0), [], []
    plain = vlm_fix.observe(model, inputs, outputs=True)
    with vlm_fix.wrapped(model, "iri:rr_attention=1|0.2|0.3|0.1,rr_mlp=0.3|1|0.2|0.1,sources=2,targets=4,lambda_a=0.9"):
        for layer in ref.decoder(model).layers:
            hooks.append(
                layer.register_forward_pre_hook(lambda m, a, k: stream.append((*a, *k.values())[0]), with_kwargs=True)
            )
            hooks.append(
                layer.register_forward_hook(lambda m, a, o: stream.append(o[0] if isinstance(o, tuple) else o))
            )
        seen = vlm_fix.observe(model, inputs, outputs=True)
        for hook in hooks:
            hook.remove()
    added = torch.stack(
        [after[0, -1:] - before[0, -1:] for before, after in zip(stream[::2], stream[1::2], strict=True)]
    )
    assert torch.allclose(seen.attention_output + seen.mlp_output, added, atol=1e-4)
    assert not torch.allclose(seen.attention_output[1], plain.attention_output[1], atol=1e-2)


def check_rows(model, inputs, run, seen):
    """Question rows and column sums against materialised weights."""
    visual, _, _ = groups(inputs)
    a, _ = eager(model, inputs, run)
    length = inputs["input_ids"].shape[1]
    assert error(seen.question_to_image, a[:, :, max(visual) + 1 : length][..., visual]) < 1e-5
    sums = torch.zeros(a.shape[0], a.shape[1], a.shape[3], dtype=torch.float64)
    for row in range(a.shape[2]):
        sums += a[:, :, row]
    assert error(seen.column_sums, sums) < 1e-5
    assert error(seen.weights_to_image, a[:, :, length - 1 :][..., visual]) < 1e-5


@pytest.mark.parametrize("spec", [None, "pai:alpha=0.5", f"var:{VAR_TINY}", "zerotuning:rate=0.2"])
def test_question_rows_and_column_sums_equal_eager(family, model, spec, monkeypatch):
    import vlm_fix.attention.kernel as kernel

    inputs = single(family, [1, 2], 1)
    visual, length = groups(inputs)[0], inputs["input_ids"].shape[1]
    run = {
        "b": None,
        "p": ref.PaiReference(visual, length, [2, 3], alpha=0.5),
        "v": ref.VarReference(visual, length, [1, 2, 3], tau=2.2, rho=0.2, min_visual_mass=0.1),
        "z": ZeroTuning(visual, length, [0, 1, 2, 3], rate=0.2),
    }[(spec or "baseline")[0]]
    with vlm_fix.wrapped(model, spec or "baseline"):
        whole = vlm_fix.observe(model, inputs, ANSWER, question=True, columns=True)
        monkeypatch.setattr(kernel, "CHUNK_BYTES", 1)
        rows = vlm_fix.observe(model, inputs, ANSWER, question=True, columns=True)
    for seen in (whole, rows):
        check_rows(model, inputs, run, seen)
    plain = vlm_fix.observe(model, inputs, ANSWER)
    assert plain.question_to_image is plain.column_sums is plain.attention_output is plain.mlp_output is None


@pytest.mark.parametrize("name", ["gemma3", "aya_vision", "paligemma"])
def test_question_rows_and_column_sums_of_other_masks(name):
    model, inputs = build(name), prompt(name, [1, 2], rows=[1])
    check_rows(model, inputs, None, vlm_fix.observe(model, inputs, ANSWER, question=True, columns=True))


def test_gaze_shift_and_column_means_from_what_is_seen(family, model):
    """GIFT's map is made of the question's rows alone."""
    inputs = single(family, [1], 0)
    seen = vlm_fix.observe(model, inputs, question=True)
    shift = seen.question_to_image[1].diff(dim=1).clamp(min=0).sum(dim=1)
    from vlm_fix.methods.attention import saliency

    found, look = [], saliency.saliency_map
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency, "saliency_map", lambda x, v: (found.append(x[0][:, v[0]]), look(x, v))[1])
        with vlm_fix.wrapped(model, "gift:source_layer=1,layers=2-3"):
            model(**inputs)
    assert error(shift, found[0]) < 1e-5


def test_padding_adds_nothing_to_columns(models):
    model, inputs = models["llava"], single("llava", [1], 0)
    padded = {k: torch.nn.functional.pad(v, (3, 0)) if v.dim() == 2 else v for k, v in inputs.items()}
    a, b = (vlm_fix.observe(model, x, ANSWER, columns=True).column_sums for x in (inputs, padded))
    assert (b[..., :3] == 0).all() and torch.allclose(a, b[..., 3:], atol=1e-5)


def test_columns_behind_a_drop(family, model):
    """Dropped columns keep what earlier layers gave them, and get nothing from the layers that lost them."""
    inputs = single(family, [1, 2], 1)
    visual, rows = groups(inputs)[0], inputs["input_ids"].shape[1] + len(ANSWER)
    plain = vlm_fix.observe(model, inputs, ANSWER, columns=True, question=True)
    with vlm_fix.wrapped(model, "fastv:keep=4,layer=2"):
        seen = vlm_fix.observe(model, inputs, ANSWER, columns=True, question=True)
    assert torch.allclose(seen.column_sums[:2], plain.column_sums[:2], atol=1e-5)
    gone = torch.tensor(visual)[~seen.kept[2]]
    assert (seen.column_sums[2:][..., gone] == 0).all() and seen.column_sums.shape == plain.column_sums.shape
    assert torch.allclose(seen.column_sums[2:].sum(-1), torch.tensor(float(rows - len(gone))), rtol=1e-5)
    assert (seen.question_to_image[2:][..., ~seen.kept[2]] == 0).all()
    assert torch.equal(seen.question_to_image[:, :, -1], seen.weights_to_image[:, :, 0])


def video(name):
    """A prompt and its grids: two videos, with an image between them for Qwen2.5-VL, or OneVision's one."""
    g = torch.Generator().manual_seed(0)
    if name == "llava_onevision":
        ids = [1, 5, 6, *[92] * (3 * 9 + 1), 7, 8, 9]
        return {"input_ids": torch.tensor([ids]), "pixel_values_videos": torch.randn(1, 3, 3, 24, 24, generator=g)}, [
            (3, 3)
        ] * 3
    grids, still = [(2, 4, 4), (3, 4, 6)], (1, 4, 8)
    ids, types = [1, 5, 6], [0, 0, 0]

    def put(t, h, w, kind, each):
        nonlocal ids, types
        for _ in range(t if each else 1):
            n = (1 if each else t) * h * w // 4
            ids, types = [*ids, 93, *[IMAGE if kind == 1 or each else 92] * n, 94, 7], [*types, 0, *[kind] * n, 0, 0]

    put(*grids[0], 2, name == "glm4v")
    if name != "glm4v":  # it shows videos with the tokens of images: one prompt has no room for both
        put(*still, 1, False)
    put(*grids[1], 2, name == "glm4v")
    ids, types = [*ids, *range(10, 22)], [*types, *[0] * 12]  # text ends behind the last frame's position in time
    patches = [sum(t * h * w for t, h, w in x) for x in (grids, [still])]
    made = {
        "input_ids": torch.tensor([ids]),
        "mm_token_type_ids": torch.tensor([types]).int(),
        "pixel_values_videos": torch.randn(patches[0], 96, generator=g),
        "video_grid_thw": torch.tensor(grids),
    }
    if name == "glm4v":
        return made, [(2, 2)] * 2 + [(2, 3)] * 3
    picture = {"pixel_values": torch.randn(patches[1], 96, generator=g), "image_grid_thw": torch.tensor([still])}
    return made | picture, [(2, 2)] * 2 + [(2, 4)] + [(2, 3)] * 3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v", "llava_onevision"])
def test_videos_are_seen(models, name):
    """Masses and maps of each frame against eager weights, videos and images in the prompt's order."""
    model = models[name] if name in models else build(name)
    inputs, grids = video(name)
    ids = inputs["input_ids"][0].tolist()
    seen = vlm_fix.observe(model, inputs, ANSWER, text_only=True)
    a, _ = eager(model, inputs)
    a = a[:, :, len(ids) - 1 :]
    visual = [j for j, t in enumerate(ids) if t in (IMAGE, 92)]
    assert error(seen.visual_mass, a[..., visual].sum(-1)) < 1e-5 and seen.vas > 0
    assert error(seen.weights_to_image, a[..., visual]) < 1e-5
    assert seen.grids == grids
    start = 0
    for i, (h, w) in enumerate(grids):
        block = a[:, :, 2, visual[start : start + h * w]].mean((0, 1)).view(h, w)
        assert error(seen.heatmap(2, image=i), block) < 1e-5
        start += h * w


def test_unexplained_pictures_are_refused_before_any_pass(models, monkeypatch):
    model, (inputs, _) = models["qwen2_5_vl"], video("qwen2_5_vl")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("a pass ran"))
    for changed, what in (
        ({"video_grid_thw": torch.tensor([[2, 4, 4], [3, 4, 8]])}, "26 video tokens"),
        ({"image_grid_thw": torch.tensor([[1, 8, 8]])}, "8 image tokens"),
        ({"input_ids": torch.full((1, 5), 7)}, "needs an image"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=what):
            vlm_fix.observe(model, {**inputs, **changed}, ANSWER)
    unknown = single("llava", [1], 0) | {"pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)}
    with pytest.raises(vlm_fix.VlmFixError, match="0 video tokens, which the videos given with it do not explain"):
        vlm_fix.observe(models["llava"], unknown)


def test_an_answer_may_be_ids_an_output_or_text(family, model):
    inputs = single(family, [1, 2], 1)
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    wanted = vlm_fix.observe(model, inputs, new[0])
    kept = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)

    class Words:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [int(word) for word in text.split()]}

    words = " ".join(map(str, new[0].tolist()))
    for answer in (new, output, kept, new[0].tolist(), words):
        seen = vlm_fix.observe(model, inputs, answer, tokenizer=Words())
        assert torch.equal(seen.tokens, new[0]) and torch.equal(seen.weights_to_image, wanted.weights_to_image)


def test_answers_that_are_none(family, model):
    inputs = single(family, [1, 2], 1)
    cases = (
        (torch.ones(2, 3).long(), "one answer at a time, not 2"),
        (torch.tensor([IMAGE, 3]), "the answer holds image tokens"),
        ("a dog", "needs its tokenizer: observe"),
        (object(), "must be token ids, what generate returned, or text"),
    )
    for answer, says in cases:
        with pytest.raises(vlm_fix.VlmFixError, match=says):
            vlm_fix.observe(model, inputs, answer)


def test_a_short_repr_and_a_figure(family, model):
    seen = vlm_fix.observe(model, single(family, [1, 2], 1), ANSWER)
    assert len(repr(seen)) < 200 and f"{len(ANSWER)} answer tokens" in repr(seen)
    figure = seen.plot()
    maps = [axis for axis in figure.axes if axis.images]
    assert len(maps) == len(ANSWER) and len({axis.images[0].get_clim() for axis in maps}) == 1, "one scale for all"
    assert maps[1].get_title() == "row 1"
    shown = maps[2].images[0].get_array()
    assert torch.equal(torch.tensor(shown), seen.heatmap(2))
    (one,) = [axis for axis in seen.plot(len(ANSWER), layers=[1], image=shown).axes if axis.images]
    assert one.get_title() == "(what comes next)" and len(one.images) == 2
    with pytest.raises(vlm_fix.VlmFixError, match="there is no row 99"):
        seen.plot([99])
