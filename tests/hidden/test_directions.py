"""VTI's calibration and its tower, directions from files, and the pairs of captions that directions are made of."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vlm_fix
from tests.hidden.test_nullu import pairs
from tests.support import tensors
from tests.support.models import make_inputs, single
from tests.support.references import base as ref
from tests.support.run import greedy
from vlm_fix.families import arch_of
from vlm_fix.methods.hidden.masked_images import mask_patches
from vlm_fix.methods.hidden.vti import direction


def test_directions_are_the_mean_and_the_first_component():
    """By power iteration over the covariance; one pair alone has no component."""
    d = tensors.drawn(7, 5, 3, 4).double()
    mean = d.mean(0)
    centred = (d - mean).flatten(1)
    v = torch.ones(12, dtype=torch.float64)
    for _ in range(3000):
        v = centred.T @ (centred @ v)
        v = v / v.norm()
    scores = centred @ v
    v = v * scores[scores.abs().argmax()].sign()
    assert torch.allclose(direction(d), mean + v.view(3, 4), atol=1e-6)


def test_masked_patches_take_the_mean_colour():
    x = tensors.drawn(3, 2, 3, 8, 12)
    masked = mask_patches(x, 0.5, 4, torch.Generator().manual_seed(0))
    blocks = [(masked[:, :, i : i + 4, j : j + 4], x[:, :, i : i + 4, j : j + 4]) for i in (0, 4) for j in (0, 4, 8)]
    kept = [torch.equal(new, old) for new, old in blocks]
    mean = x.mean(dim=(2, 3), keepdim=True).expand(-1, -1, 4, 4)
    assert sum(kept) == 3 and all(same or torch.equal(new, mean) for same, (new, _) in zip(kept, blocks, strict=True))
    rows = tensors.drawn(4, 10, 6)
    new = mask_patches(rows, 0.3, 4, torch.Generator().manual_seed(0))
    assert sum(torch.equal(a, b) for a, b in zip(new, rows, strict=True)) == 7


def test_calibrated_directions_of_decoder_and_tower(family, model):
    """Text directions from whole float64 passes; LLaVA's tower has one for each token, packed images share one."""
    samples = pairs(family)
    found = vlm_fix.parse_spec("vti:trials=2,masked=0.5").calibrate(model, samples, 0, lambda *_: None)["file"].named
    assert {key.partition(".")[0] for key in found} == {"text", "vision"} and len(found) == 8
    assert found["vision.1"].shape == ((37, 32) if family == "llava" else (32,))
    twin, apart = ref.double(model), []
    for s in samples:
        states = []
        for ids in s.answers:
            kept = {}
            handles = [
                layer.register_forward_hook(
                    lambda m, a, o, i=i, kept=kept: kept.__setitem__(i, (o[0] if isinstance(o, tuple) else o)[0, -1])
                )
                for i, layer in enumerate(ref.decoder(twin).layers)
            ]
            ref.teacher_forced(twin, None, s.inputs, ids[0])
            for handle in handles:
                handle.remove()
            states.append(torch.stack([kept[i] for i in range(4)]))
        apart.append(states[0] - states[1])
    expected = direction(torch.stack(apart).detach())
    for i in range(4):
        assert torch.allclose(found[f"text.{i}"].double(), expected[i], atol=1e-3), i
    method = vlm_fix.registry.get_method("vti")(file=vlm_fix.tensors.Tensors(found), alpha_text=3, alpha_vision=3)
    plain = greedy(model, inputs := make_inputs(family, [1, 0]), 2)[1]
    with vlm_fix.wrapped(model, method):
        edited = greedy(model, inputs, 2)[1]
    assert torch.equal(edited[1], plain[1]) and not torch.allclose(edited[0], plain[0], atol=1e-2)


def test_vti_files_of_other_models_are_refused(models, tmp_path):
    model = models["llava"]
    save_file({"text.0": torch.ones(64)}, tmp_path / "text.safetensors")
    save_file({"text.7": torch.ones(64)}, tmp_path / "deep.safetensors")
    save_file({"vision.0": torch.ones(9, 32)}, tmp_path / "tokens.safetensors")
    save_file({"text.0": torch.ones(2, 64)}, tmp_path / "rows.safetensors")
    save_file({"vision.0": torch.ones(1, 9, 32)}, tmp_path / "cube.safetensors")
    save_file({"vision.0": torch.zeros(9, 32)}, tmp_path / "zero.safetensors")
    for spec, sentence in (
        ("vti", "run `vlm-fix calibrate vti"),
        (f"vti:file={tmp_path}/text.safetensors", "holds no vision.LAYER; set alpha_vision=0"),
        (f"vti:file={tmp_path}/deep.safetensors,alpha_vision=0", "this one has 4 text layers"),
        (f"vti:file={tmp_path}/text.safetensors,alpha_vision=0,layers=2-", "zeros, if anything, for the layers 2, 3"),
        (
            f"vti:file={tmp_path}/rows.safetensors,alpha_vision=0",
            r"text.0 in .* has the shape \[2, 64\]; it must be \[C\]",
        ),
        (
            f"vti:file={tmp_path}/cube.safetensors,alpha_text=0",
            r"vision.0 in .* \[1, 9, 32\]; it must be \[Cv\] or \[N, Cv\]",
        ),
        (f"vti:file={tmp_path}/tokens.safetensors,alpha_text=0,layers=1", "layers are those of alpha_text"),
        (f"vti:file={tmp_path}/zero.safetensors,alpha_text=0", "every vision.LAYER in .* is zeros; set alpha_vision=0"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(model, spec)
    without = dataclasses.replace(arch_of(model), vision_depth=0)
    with pytest.raises(vlm_fix.VlmFixError, match="no transformer blocks to steer; set alpha_vision=0"):
        vlm_fix.parse_spec(f"vti:file={tmp_path}/tokens.safetensors").resolve(without)
    with (
        vlm_fix.wrapped(model, f"vti:file={tmp_path}/tokens.safetensors,alpha_text=0"),
        pytest.raises(vlm_fix.VlmFixError, match=r"vision.0 is \[9, 32\], but the tower's layer has \[37, 32\]"),
    ):
        greedy(model, make_inputs("llava", [1]), 1)


def artifact(folder, component, kind="direction", **site):
    folder.mkdir()
    rows = tensors.drawn(201, 64) if kind == "direction" else tensors.drawn(201, 2, 64)
    save_file({"direction" if kind == "direction" else "basis": rows}, folder / "tensors.safetensors")
    site = {"stream": "language", "component": component, "layer": 1, "unit": None, "io": "output", **site}
    (folder / "manifest.json").write_text(json.dumps({"artifact_type": kind, "site": site}))
    return folder


def test_steering_by_a_repsteer_artifact_is_steering_by_its_tensor(models, tmp_path):
    """resid_pre is a layer's input: the output of the layer before."""
    model, inputs, results = models["llava"], make_inputs("llava", [1]), {}
    save_file({"direction.0": tensors.drawn(201, 64)}, tmp_path / "before.safetensors")
    for name, spec in {
        "mlp": f"steer:file={artifact(tmp_path / 'mlp', 'mlp_out')},strength=0.4",
        "mlp by hand": f"steer:file={tensors.DIRECTIONS},strength=0.4,place=mlp_output,layers=1",
        "post": f"steer:file={artifact(tmp_path / 'post', 'resid_post')},strength=0.4",
        "post by hand": f"steer:file={tensors.DIRECTIONS},strength=0.4,layers=1",
        "pre": f"steer:file={artifact(tmp_path / 'pre', 'resid_pre')},strength=0.4",
        "pre by hand": f"steer:file={tmp_path}/before.safetensors,strength=0.4",
        "attention": f"steer:file={artifact(tmp_path / 'attn', 'attn_out')},strength=0.4,place=attention_output",
        "attention by hand": f"steer:file={tensors.DIRECTIONS},strength=0.4,place=attention_output,layers=1",
    }.items():
        with vlm_fix.wrapped(model, spec):
            results[name] = greedy(model, inputs, 2)[1]
    made = ("mlp", "post", "pre", "attention")
    assert all(torch.equal(results[name], results[f"{name} by hand"]) for name in made)
    assert not any(torch.equal(results[a], results[b]) for a in made for b in made if a != b)


@pytest.mark.parametrize(
    ("component", "site", "sentence"),
    [
        ("router", {}, "its place, 'router' .output. of layer 1, is none of those that are known"),
        ("mlp_out", {"io": "input"}, "its place, 'mlp_out' .input. of layer 1, is none"),
        ("resid_mid", {}, "'resid_mid' .output. of layer 1, between attention and MLP, is none"),
        ("resid_pre", {"layer": 0}, "'resid_pre' .output. of layer 0, the embeddings, is none"),
        (["mlp_out"], {}, "is none of those that are known"),
        ("head_result", {"io": "input", "unit": 1}, "of a part of head_result alone, unit 1"),
        ("mlp_out", {"unit": {"kind": "indices", "values": [1]}}, "of a part of mlp_out alone"),
        ("mlp_out", {"layer": True}, "is not of one layer of the language model"),
        ("mlp_out", {"layer": None}, "is not of one layer of the language model"),
        ("mlp_out", {"stream": "vision"}, "is not of one layer of the language model"),
    ],
)
def test_artifacts_of_other_places_are_refused(models, tmp_path, component, site, sentence):
    for method, kind in (("steer", "direction"), ("nullu", "subspace")):
        file = artifact(tmp_path / method, component, kind, **site)
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(models["llava"], f"{method}:file={file}")


def test_what_steer_is_given_beside_vectors_of_its_place_is_refused(models, tmp_path):
    for spec, sentence in (
        (f"steer:file={tensors.SUBSPACE}", "holds 6 rows for layer 0, a subspace: project it out with nullu"),
        (
            f"steer:file={artifact(tmp_path / 'a', 'mlp_out')},place=layer_output",
            "made for mlp_output by its manifest, not for",
        ),
        (
            f"nullu:file={artifact(tmp_path / 'b', 'attn_out', 'subspace')},layers=0-",
            "is of attention outputs by its manifest",
        ),
        ("steer", "steer: name the vectors"),
    ):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(models["llava"], spec)


@pytest.mark.parametrize("method", ["steer", "nullu", "vti"])
def test_tensors_that_cannot_be_meant_are_refused(models, tmp_path, method):
    x, file, name = tensors.drawn(7, 64), tmp_path / "x.safetensors", "text" if method == "vti" else "direction"
    beside = (
        {} if method == "vti" else {"one layer": ({"attn.2": x, "mlp.2": x + 1}, "attn.2 and mlp.2, both for layer 2")}
    )
    beside |= {} if method == "vti" else {"zeros before": ({f"{name}.1": x, f"{name}.01": x + 1}, "both for layer 1")}
    for named, sentence in (
        *beside.values(),
        ({f"{name}.2": x * torch.nan}, f"{name}.2 in .* holds NaN"),
        ({f"{name}.2": x.clone().index_fill_(0, torch.tensor([3]), torch.inf)}, f"{name}.2 in .* holds NaN, infinite"),
        ({f"{name}.2": torch.zeros(64)}, "zeros|holds no vector"),
        ({f"{name}.2": torch.zeros(0)}, "empty|0 channels|shape"),
    ):
        save_file(named, file)
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(
                models["llava"], f"{method}:file={file},layers=0-{',alpha_vision=0' if method == 'vti' else ''}"
            )


def test_controls_of_steering_take_its_place_rows_and_strength(models):
    from vlm_fix.eval.run.plan import _controls

    specs = [f"steer:file={tensors.DIRECTIONS},strength=-0.3,layers=1", "rudder:alpha=0.2", "rudder:absolute=20,k=3"]
    wanted = _controls([[vlm_fix.parse_spec(spec)] for spec in specs], models["llava"], yes_no=False)
    assert [spec for spec in wanted if spec.startswith(("random_direction", "random_reminder"))] == [
        "random_direction:strength=0.3,place=layer_output,prompt_rows=last,layers=1",
        "random_reminder:layers=3,alpha=0.2",
        "random_reminder:layers=3,absolute=20.0,k=3.0",
    ]


@pytest.mark.parametrize(
    "spec", ["rudder:alpha=0.7,layers=2", "rudder:absolute=4,gate_on=attention,k=9,layers=1", "rudder:gated=false"]
)
def test_rudders_control_adds_as_much_at_the_same_place_in_another_direction(models, spec):
    """What both add to the attention output of the same first pass, row by row."""
    model, inputs, added = models["llava"], make_inputs("llava", [1, 2]), {}
    method = vlm_fix.parse_spec(spec).resolve(arch_of(model))
    control, (layer,) = vlm_fix.parse_spec(method.control), method.layers
    for made in (method, control):
        cls, seen = type(made.resolve(arch_of(model))), []
        kept = cls.attention_output
        try:
            cls.attention_output = lambda self, x, rows, kept=kept, seen=seen: (
                seen.append((new := kept(self, x, rows)) - x),
                new,
            )[1]
            with vlm_fix.wrapped(model, made):
                greedy(model, inputs, 1)
        finally:
            if cls is type(method):
                cls.attention_output = kept
            else:
                del cls.attention_output
        added[made.name] = seen[0]
    ours, theirs = added["rudder"], added["random_reminder"]
    assert torch.allclose(ours.norm(dim=-1), theirs.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert float(ours[:, -1].norm(dim=-1).min()) > 0.1 and not bool(ours[:, :-1].any() or theirs[:, :-1].any())
    assert float(torch.cosine_similarity(ours[:, -1], theirs[:, -1], dim=-1).abs().max()) < 0.6
    assert layer == control.resolve(arch_of(model)).layers[0]


def test_hulluedit_refuses_beams_and_memvr_says_when_it_never_looked(family, model):
    inputs = single(family, [1], 0)
    with vlm_fix.wrapped(model, "hulluedit"), pytest.raises(vlm_fix.VlmFixError, match="does not go with beam search"):
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
    plain = greedy(model, inputs, 2)[1]
    with (
        vlm_fix.wrapped(model, "memvr:threshold=0.9999"),
        pytest.warns(UserWarning, match="no early exit was that unsure"),
    ):
        assert torch.equal(greedy(model, inputs, 2)[1], plain)


def test_pictos_pairs_differ_by_an_absent_object():
    from vlm_fix.eval.picto import world
    from vlm_fix.eval.tasks import pairs as made
    from vlm_fix.eval.tasks.sample import Sample

    scenes = world.scenes("train", 12, 3)
    samples = [Sample(str(i), s.image_id, s.file_name, s.image, "?", {}) for i, s in enumerate(scenes)]
    found = made.of_picto(samples, 0)
    assert len(found) > 8
    for pair in found:
        present = next(s.names for s in scenes if s.file_name == pair.sample.file)
        words = {word for n in world.COCO_IDS if n not in present for word in (n, *world._SAID_AS.get(n, ()))}
        said = {word for word in words if f" {word}" in pair.hallucinated}
        assert said and not any(f" {word} " in f"{pair.truthful} " for word in said)
        assert pair.sample.prompt == "Please describe this image in detail."


def test_pairs_of_a_file_are_read_as_vti_and_lure_publish_them(tmp_path):
    from vlm_fix.eval.tasks import pairs as made

    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [{"image": n, "value": f"true {n}", "h_value": f"false {n}"} for n in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")]
    lines[1]["question"] = "What?"
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = {p.sample.file: p for p in made.of_file(str(file), tmp_path, 9, {"c.jpg"}, 0)}
    assert set(found) == {"a.jpg", "b.jpg"} and found["b.jpg"].sample.prompt == "What?"
    assert (found["a.jpg"].truthful, found["a.jpg"].hallucinated) == ("true a.jpg", "false a.jpg")
    with pytest.raises(vlm_fix.VlmFixError, match="names no image"):
        made.of_file(str(file), tmp_path, 9, {"a.jpg", "b.jpg", "c.jpg"}, 0)
    words = "true\u2028a\x0c\x85b"  # what splitlines takes for line ends is part of a caption
    file.write_text(json.dumps({**lines[0], "value": words}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert made.of_file(str(file), tmp_path, 9, set(), 0)[0].truthful == words
    file.write_text('{"image": "a.jpg"}')
    with pytest.raises(vlm_fix.VlmFixError, match="give a JSONL file with image, value and h_value"):
        made.of_file(str(file), tmp_path, 9, set(), 0)
